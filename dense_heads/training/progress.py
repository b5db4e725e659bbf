"""Progress a person can follow: a bar over the steps, and one line for each validation."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from dense_heads.training.base import DenseModule

log = logging.getLogger("dense_heads")

LINE_SECONDS = 15  # between lines where there is no terminal


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress of long work outside the trainer: gives a function that is told how much is done."""
    if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    started = last = time.monotonic()
    first: int | None = None

    def say(done: int) -> None:
        nonlocal last, first
        now = time.monotonic()
        first = done if first is None else first
        if now - last >= LINE_SECONDS and done > first:
            left = (now - started) / (done - first) * (total - done)
            log.info("%s: %d of %d (%.0f %%), about %.0f s left", what, done, total, 100 * done / total, left)
            last = now

    yield say


class Progress(RichProgressBar):
    """Rich bars on a terminal; the validation lines also go where there is none (a log file, SLURM)."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was measured."""
        super().on_validation_end(trainer, pl_module)
        if isinstance(pl_module, DenseModule) and "val" in pl_module.results and trainer.state.fn == "fit":
            leader = pl_module.leader()
            scores = pl_module.results["val"].scores[leader]
            shown = [name for name in pl_module.headline or scores if name in scores]
            text = "  ".join(f"val/{name} {scores[name]:.4f}" for name in shown)
            best = f"  ({pl_module.candidates[leader].name})" if len(pl_module.candidates) > 1 else ""
            log.info("step %d/%d  %s%s", trainer.global_step, trainer.max_steps, text, best)

    @property
    def total_train_batches(self) -> int | float:
        """All of the run: Lightning would take those that are left after a resume, and count those done before too."""
        return self.trainer.num_training_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "train"  # by steps; Lightning would count epochs

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Without Lightning's version number, which says nothing here."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
