"""What a search over many runs hears of each while it trains."""

from collections.abc import Callable

import lightning.pytorch as pl

from dense_heads.training.base import DenseModule

# (step, the leading candidate's primary metric) of a validation -> whether the training should stop
Report = Callable[[int, float], bool]


class Reporting(pl.Callback):
    """Tells every validation's score, and ends the training when the answer asks for it.

    A validation is told before its checkpoint is written, so none is left out when the run is killed and goes on from
    there; the last one is told again then, so that its answer holds.
    """

    def __init__(self, report: Report) -> None:
        """`report` must take a step that it has heard of before."""
        self.report = report
        self.stopped = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Of a run that goes on: what its last validation measured."""
        self._tell(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a validation within training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._tell(trainer, pl_module)

    def _tell(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DenseModule)
        result = pl_module.results.get("val")
        if result is None:
            return
        stop = self.report(result.step, result.scores[pl_module.leader()][pl_module.primary])
        if stop and trainer.global_step < trainer.max_steps:  # a training that is done is let be
            self.stopped = trainer.should_stop = True
