"""Seeds that are functions of what they are for, never of when or where they are drawn."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any plain values, the same in every process and on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def forked_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Random numbers of PyTorch from `seed` inside the block; the global generators stay as they were."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
