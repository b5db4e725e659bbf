"""Schedules and parameter groups of training a whole ViT (facts sheet 4.1)."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dense_heads.errors import UserError


@dataclass(frozen=True)
class CosineSchedule:
    """Linear from `start` over `warmup` steps, then cosine from `base` to `final` at `steps`; `final` afterwards."""

    base: float
    final: float
    steps: int
    warmup: int = 0
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup and self.warmup >= self.steps:
            raise UserError(f"A warmup of {self.warmup} steps does not end within the {self.steps} steps of the run.")

    def __call__(self, step: int) -> float:
        """The value at a step counted from 0."""
        if step >= self.steps:
            return self.final
        if step < self.warmup:  # as numpy.linspace over the warmup, both ends included
            return self.start + (self.base - self.start) * step / max(self.warmup - 1, 1)
        progress = (step - self.warmup) / (self.steps - self.warmup)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WarmupSchedule:
    """Linear from `start` to `base` over `warmup` steps, then `base`: the teacher's temperature."""

    start: float
    base: float
    warmup: int

    def __call__(self, step: int) -> float:
        """The value at a step counted from 0."""
        if step >= self.warmup:
            return self.base
        return self.start + (self.base - self.start) * step / max(self.warmup - 1, 1)


def parameter_groups(
    modules: Iterable[tuple[str, nn.Module]], layer_decay: float = 1.0, patch_embed_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Groups with `lr_multiplier`, `wd_multiplier` and `last_layer`, parameters of equal values together.

    Biases, norms and LayerScale do not decay; tokens and the positional embedding do, as in the original. A backbone's
    block i of L learns at layer_decay^(L - i) times the rate, tokens, positions and patches at layer_decay^(L + 1),
    the patch embedding by `patch_embed_lr` less again. Heads learn at the full rate, except the `last_layer`, which
    a run can hold still at first.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for title, module in modules:
        kind = title.partition("/")[0]  # of several students: backbone/vits14_reg
        num_blocks = int(getattr(module, "num_blocks", 0))
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = layer_decay ** (num_blocks + 1 - _depth(name, num_blocks)) if kind == "backbone" else 1.0
            if kind == "backbone" and "patch_embed" in name:
                rate *= patch_embed_lr
            still = name.endswith(".bias") or "norm" in name or "gamma" in name
            key = (rate, 0.0 if still else 1.0, "last_layer" in name)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_multiplier": rate, "wd_multiplier": decay, "last_layer": last}
        for (rate, decay, last), parameters in groups.items()
    ]


def _depth(name: str, num_blocks: int) -> int:
    if found := re.match(r"blocks\.(\d+)\.", name):
        return int(found[1]) + 1
    at_the_start = name.startswith(("cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed"))
    return 0 if at_the_start else num_blocks + 1
