"""In which type a frozen backbone computes."""

from typing import Any

import torch

from dense_heads.errors import unknown_name

PRECISIONS = ("auto", "float32", "bfloat16", "streamed")


def resolve_precision(name: str) -> torch.dtype:
    """The type that a precision stands for; `auto` is bfloat16 where the processor multiplies in it, else float32.

    So is `streamed`, whose weights are in bfloat16 all the same.

    Raises:
        UserError: an unknown name.
    """
    if name not in PRECISIONS:
        raise unknown_name("backbone.precision:", str(name), PRECISIONS)
    if name in ("auto", "streamed"):
        return torch.bfloat16 if is_native() else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def is_native() -> bool:
    """Whether products in bfloat16 are computed by units made for it."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_multiplies_bfloat16()


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has units for it; without them PyTorch's products are hundreds of times slower."""
    return bool(_capabilities().get("avx512_bf16") or _capabilities().get("amx_bf16"))


def cpu_has_avx512() -> bool:
    """Whether the processor computes with vectors of 512 bits."""
    return bool(_capabilities().get("avx512_f"))


def _capabilities() -> dict[str, Any]:
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}
