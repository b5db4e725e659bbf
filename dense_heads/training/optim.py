"""Schedules of the learning rate and of the momentum, as functions of the step."""

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from dense_heads.errors import UserError, unknown_name

KINDS = ("poly", "cosine", "constant")
MOMENTUM_KINDS = ("constant", "one_cycle")


@dataclass(frozen=True)
class Schedule:
    """Factor of the base learning rate at a step counted from 0, with linear warmup as in mmcv's lr_updater.

    poly: (1 - t/T)^power. cosine: half a wave. Both fall from 1 to `end`. In the first `warmup_steps` W the value is
    multiplied by 1 - (1 - t/W)(1 - warmup_ratio), so warmup and decay overlap, as they did where the published numbers
    were made.

    Raises:
        UserError: an unknown kind, an end that is none, or a warmup that does not end within the run.
    """

    kind: str
    max_steps: int
    power: float = 1.0
    warmup_steps: int = 0
    warmup_ratio: float = 1e-6
    end: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("schedule", self.kind, KINDS)
        if not 0 <= self.end <= 1:
            raise UserError(f"task.protocol.end={self.end!r}: expected a share of the learning rate, from 0 to 1.")
        if self.warmup_steps and self.warmup_steps >= self.max_steps:
            raise UserError(
                f"The warmup of {self.warmup_steps} steps does not end within trainer.max_steps={self.max_steps}. "
                "Set task.protocol.warmup_steps to a lower number, such as 4 % of the run."
            )

    def __call__(self, step: int) -> float:
        """The factor at `step`; `end` after the end."""
        progress = min(step / self.max_steps, 1.0)
        factor = 1.0
        if self.kind == "poly":
            factor = (1.0 - progress) ** self.power
        elif self.kind == "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * progress))
        if self.kind != "constant":
            factor = self.end + (1.0 - self.end) * factor
        if step < self.warmup_steps:
            factor *= 1.0 - (1.0 - step / self.warmup_steps) * (1.0 - self.warmup_ratio)
        return factor


@dataclass(frozen=True)
class Momentum:
    """Momentum (Adam's first beta) at a step counted from 0: the optimiser's own, or one cycle of it.

    one_cycle: from `high` to `low` over the first `turn` of the run and back to `high` at its last step, each way half
    a cosine wave; steps are counted as torch's OneCycleLR and mmcv's OneCycle updater count them.

    Raises:
        UserError: an unknown kind, or values that are no momenta.
    """

    kind: str
    max_steps: int
    high: float = 0.95
    low: float = 0.85
    turn: float = 0.3

    def __post_init__(self) -> None:
        if self.kind not in MOMENTUM_KINDS:
            raise unknown_name("momentum schedule", self.kind, MOMENTUM_KINDS)
        if not (0 <= self.low <= self.high < 1 and 0 < self.turn < 1):
            raise UserError(
                f"optim.momentum: low={self.low!r}, high={self.high!r}, turn={self.turn!r}; expected "
                "0 <= low <= high < 1 and 0 < turn < 1, such as 0.85, 0.95 and 0.3."
            )

    def __call__(self, step: int) -> float:
        """The momentum of one_cycle at `step`."""
        turn, last = self.turn * self.max_steps - 1, self.max_steps - 1
        if turn <= 0 or last <= turn:  # a run of a few steps has no room for a cycle
            return self.high
        if step <= turn:
            progress, start, end = step / turn, self.high, self.low
        else:
            progress, start, end = min((step - turn) / (last - turn), 1.0), self.low, self.high
        return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))

    def apply(self, group: MutableMapping[str, Any], step: int) -> None:
        """Set the momentum of an optimiser's parameter group for the step that comes; `constant` leaves it alone."""
        if self.kind == "constant":
            return
        if "betas" in group:
            group["betas"] = (self(step), *group["betas"][1:])
        elif "momentum" in group:
            group["momentum"] = self(step)
        else:
            raise UserError("task.protocol.momentum=one_cycle: this optimiser has no momentum. Set it to constant.")
