"""Training and measuring, as all modes that train do it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from dense_heads.build.config import plain
from dense_heads.build.parts import Parts
from dense_heads.build.training import make_loggers, make_trainer
from dense_heads.models.inference import Inference
from dense_heads.modes.resume import checkpoint_to_resume
from dense_heads.training.checkpoints import load_best
from dense_heads.training.loggers import abandon_loggers
from dense_heads.training.stopwatch import Stopwatch
from dense_heads.training.support import observe


@dataclass(frozen=True)
class Trained:
    """What is left of a training besides the module."""

    trainer: pl.Trainer
    loggers: list[Logger]  # to be finished, with the final numbers
    seconds: dict[str, float]  # where the time went


def train(cfg: DictConfig, parts: Parts, folder: Path, callbacks: Sequence[pl.Callback] = ()) -> Trained:
    """Train in `folder`, from its newest checkpoint on where `cfg.resume` says so.

    Afterwards the module holds the heads that the protocol selects, and they are validated where a choice needs it.
    """
    loggers = make_loggers(cfg, folder)
    trainer = make_trainer(cfg, folder, parts, loggers, callbacks)
    checkpoint = checkpoint_to_resume(cfg, folder, loggers[0])
    started = time.monotonic()
    try:
        learn(cfg, trainer, parts, checkpoint)
    except Exception:
        abandon_loggers(loggers)
        raise
    features = {} if cfg.cache.kind == "off" else {"features": parts.feature_seconds}
    seconds = {**features, "train": time.monotonic() - started, **Stopwatch.of(trainer)}
    if not parts.module.training_free and cfg.task.protocol.select == "best":
        trainer.strategy.barrier()
        load_best(parts.module, folder / "checkpoints")
        trainer.validate(parts.module, parts.data, verbose=False)  # ranks the candidates by what they are now
    return Trained(trainer, loggers, seconds)


def learn(cfg: DictConfig, trainer: pl.Trainer, parts: Parts, checkpoint: Path | None = None) -> None:
    """Train the heads; those that need no training look at their labelled images instead."""
    if not parts.module.training_free:
        trainer.fit(parts.module, parts.data, ckpt_path=checkpoint, weights_only=True)
        return
    assert parts.support is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    observe(parts.module.to(device), parts.support, Inference(**plain(cfg.task.inference)))


def measure(trainer: pl.Trainer, parts: Parts) -> str:
    """Measure on the test split, or on validation where there is none; returns the stage's name."""
    if parts.data.test is not None:
        trainer.test(parts.module, parts.data, verbose=False)
        return "test"
    validate(trainer, parts)
    return "val"


def validate(trainer: pl.Trainer, parts: Parts) -> None:
    """Measure on validation, unless that has just been done on these very weights."""
    if not parts.module.is_measured("val", trainer.global_step):
        trainer.validate(parts.module, parts.data, verbose=False)
