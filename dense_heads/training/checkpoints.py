"""Checkpoints that a kill cannot spoil: written aside and renamed, tensors and plain values only."""

import logging
import math
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file, save

from dense_heads.errors import UserError
from dense_heads.ops.files import replacing, write_atomically
from dense_heads.training.base import DenseModule

log = logging.getLogger("dense_heads")

BEST_FILE = "best.safetensors"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written atomically and read with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write beside the target, then rename."""
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Tensors and plain values only, whatever the caller asks."""
        return load_checkpoint(Path(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint on the CPU.

    Raises:
        UserError: it is truncated, or holds anything but tensors and plain values.
    """
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, end of file: torch raises whatever it meets
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {str(error)[:120]})."
        ) from error
    return loaded


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run that reads whole.

    Raises:
        UserError: there is none.
    """
    found = sorted(folder.glob("step=*.ckpt"), reverse=True)
    for path in found:
        try:
            load_checkpoint(path)
        except UserError:
            continue
        return path
    state = f"{len(found)} file(s), none of them whole" if found else "none"
    raise UserError(f"No checkpoint to go on from in {folder}: {state}. Start the run again without `resume`.")


def load_best(module: DenseModule, folder: Path) -> None:
    """Put what a run learnt best back into its module; without a validation there is none, and all stays."""
    path = folder / BEST_FILE
    if path.is_file():
        module.load_learnt(load_file(path))


class Checkpoints(Checkpoint):
    """Writes `step=N.ckpt` at a step interval and after each validation, and keeps the best heads apart.

    The newest `keep` checkpoints stay. `best.safetensors` holds the heads of the step whose validation was best.
    """

    def __init__(self, folder: str | Path, every: int = 200, keep: int = 2) -> None:
        """`folder`: the run's `checkpoints/`; `every`: steps."""
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.best: float | None = None
        self.saved_at = -1
        self.asked = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """SIGUSR1 asks for a checkpoint after the step under way, as clusters do before they stop a job."""
        taken = signal.getsignal(signal.SIGUSR1) not in (signal.SIG_DFL, signal.SIG_IGN, None)
        if not taken and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "asked", True))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the step interval, or when asked for; never between the batches of one step.

        Before a validation neither: a run that went on from there would not make it up. Its end is the time to save.
        """
        between = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        validated_next = (batch_idx + 1) % (trainer.val_check_batch or math.inf) == 0
        if not between and not validated_next and (trainer.global_step % self.every == 0 or self.asked):
            self.asked = False
            self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """SIGTERM between two steps: that step is kept (see above). Whatever the reason, say how to go on."""
        if trainer.state.fn != "fit":
            return
        if isinstance(exception, SIGTERMException) and not trainer.validating:
            self.save(trainer)
        if trainer.is_global_zero and any(self.folder.glob("step=*.ckpt")):
            log.info("stopped at step %d; go on with resume=%s", trainer.global_step, self.folder.parent)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a validation within training: the best heads first, so that the checkpoint knows of them."""
        if not trainer.state.fn == "fit" or trainer.sanity_checking:
            return
        if isinstance(pl_module, DenseModule):  # a module that trains a backbone keeps its latest
            self._keep_best(trainer, pl_module)
        self.asked = False
        self.save(trainer)

    def _keep_best(self, trainer: pl.Trainer, pl_module: DenseModule) -> None:
        result = pl_module.results["val"]
        score = result.scores[pl_module.leader()][pl_module.primary]
        better = self.best is None or (score > self.best if pl_module.direction == "max" else score < self.best)
        if better and score == score:
            self.best = score
            if trainer.is_global_zero:
                learnt = {key: value.contiguous().cpu() for key, value in pl_module.learnt().items()}
                facts = {"step": str(result.step), pl_module.primary: repr(score), "candidate": str(pl_module.leader())}
                write_atomically(self.folder / BEST_FILE, save(learnt, metadata=facts))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last step, whatever the interval."""
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint of this step, then drop what is too old."""
        if self.saved_at == trainer.global_step:
            return
        self.saved_at = trainer.global_step
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step:08d}.ckpt")
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step=*.ckpt"))[: -self.keep]:
                old.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.best = state_dict["best"]
