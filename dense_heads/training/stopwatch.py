"""Where the time of a training goes."""

import time
from collections import defaultdict
from typing import Any

import lightning.pytorch as pl


class Stopwatch(pl.Callback):
    """Seconds that this process waited for batches, and spent in each part of the steps and in validation.

    `forward` is the backbone (unless its features are cached), the heads and their losses. Work that a GPU does later
    counts where the process waits for it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._since = 0.0
        self._validation_since = 0.0

    @staticmethod
    def of(trainer: pl.Trainer) -> dict[str, float]:
        """What a trainer's stopwatch counted, as `train/loading` and so on; nothing where it has none."""
        watches = [callback for callback in trainer.callbacks if isinstance(callback, Stopwatch)]  # type: ignore[attr-defined]
        return {f"train/{part}": seconds for watch in watches for part, seconds in watch.seconds.items()}

    def _count(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self._since
        self._since = now

    def on_train_epoch_start(self, *_: Any) -> None:
        """The first batch is waited for from here on."""
        self._since = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        """The batch is there."""
        self._count("loading")

    def on_before_backward(self, *_: Any) -> None:
        """The losses are there."""
        self._count("forward")

    def on_after_backward(self, *_: Any) -> None:
        """The gradients are there."""
        self._count("backward")

    def on_train_batch_end(self, *_: Any) -> None:
        """The step is done."""
        self._count("optimiser")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Within training validation stands between two steps."""
        self._validation_since = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What follows is waiting for a batch again."""
        spent = time.perf_counter() - self._validation_since
        self.seconds["validation"] += spent
        self._since += spent
