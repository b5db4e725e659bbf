"""Learning-rate schedules, as factors of the base rate."""

import math
from dataclasses import dataclass

from dense_heads.errors import UserError, unknown_name

KINDS = ("poly", "cosine", "constant")


@dataclass(frozen=True)
class Schedule:
    """Factor of the base learning rate at a step counted from 0, with linear warmup as in mmcv's lr_updater.

    poly: (1 - t/T)^power. cosine: from 1 to 0. In the first `warmup_steps` W the value is multiplied by
    1 - (1 - t/W)(1 - warmup_ratio), so warmup and decay overlap, as they did where the published numbers were made.

    Raises:
        UserError: an unknown kind, or a warmup that does not end within the run.
    """

    kind: str
    max_steps: int
    power: float = 1.0
    warmup_steps: int = 0
    warmup_ratio: float = 1e-6

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("schedule", self.kind, KINDS)
        if self.warmup_steps and self.warmup_steps >= self.max_steps:
            raise UserError(
                f"The warmup of {self.warmup_steps} steps does not end within trainer.max_steps={self.max_steps}. "
                "Set task.protocol.warmup_steps to a lower number, such as 4 % of the run."
            )

    def __call__(self, step: int) -> float:
        """The factor at `step`; 0 after the end."""
        progress = min(step / self.max_steps, 1.0)
        factor = 1.0
        if self.kind == "poly":
            factor = (1.0 - progress) ** self.power
        elif self.kind == "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * progress))
        if step < self.warmup_steps:
            factor *= 1.0 - (1.0 - step / self.warmup_steps) * (1.0 - self.warmup_ratio)
        return factor
