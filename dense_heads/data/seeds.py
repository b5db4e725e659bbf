"""Seeds that depend on what is asked for, never on who asks or when."""

import hashlib


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed from any words and numbers: the same on every machine, process and run (Python's hash is not)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
