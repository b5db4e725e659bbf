"""`mode=fit`: train a head, measure it, write the run folder."""

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from dense_heads.build.backbone_training import BACKBONE_FAMILIES
from dense_heads.build.config import plain, recomposed
from dense_heads.build.data import keep_split
from dense_heads.build.model import run_card
from dense_heads.build.parts import Parts, make_parts
from dense_heads.build.training import make_loggers, make_trainer
from dense_heads.errors import UserError
from dense_heads.models.artefact import save_artefact
from dense_heads.models.inference import Inference
from dense_heads.modes import pretrain
from dense_heads.modes.folder import run_folder
from dense_heads.modes.outcome import Measured, untrained, write_outcome
from dense_heads.modes.resume import checkpoint_to_resume
from dense_heads.report.html import write_report
from dense_heads.report.tables import print_tables
from dense_heads.training.checkpoints import load_best
from dense_heads.training.loggers import abandon_loggers, finish_loggers
from dense_heads.training.stopwatch import Stopwatch
from dense_heads.training.support import observe

log = logging.getLogger("dense_heads")

TITLES = {"pixels": "raw pixels"}  # of baselines, in reports


def main(cfg: DictConfig) -> float | None:
    """Train, select, measure, write; returns the primary metric."""
    started = time.monotonic()
    if cfg.resume is None and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0:
        cfg.resume = "auto"  # the cluster started this job again
    if cfg.task.family in BACKBONE_FAMILIES:
        return pretrain.main(cfg)
    parts = make_parts(cfg)  # every mistake that shows cheaply shows here, before a folder is made
    return run_in(cfg, run_folder(cfg), parts, started)


def run_in(cfg: DictConfig, folder: Path, parts: Parts | None = None, started: float | None = None) -> float:
    """The same in a folder that is there, with `config.yaml` and `overrides.yaml` in it."""
    started = time.monotonic() if started is None else started
    parts = make_parts(cfg) if parts is None else parts
    log.info("run folder %s", folder)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        keep_split(folder, cfg, parts.loaded)
    trained = train(cfg, parts, folder)
    trainer = trained.trainer
    stage = measure(trainer, parts)
    score = parts.module.results[stage].scores[parts.module.leader()][parts.module.primary]
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    seconds = dict(trained.seconds)
    measured = Measured(cfg, parts, stage, trainer.global_step, seconds, HydraConfig.get().runtime.choices)
    if first:
        keep(folder, measured)
    baseline = _baseline(cfg, parts.notes)  # after all is saved: its failure costs nothing
    seconds["total"] = time.monotonic() - started
    if first:
        beside = untrained(cfg, parts, stage)
        finals = write_outcome(folder, dataclasses.replace(measured, baseline=baseline, **beside))
        write_report(folder)
        finish_loggers(trained.loggers, finals["metrics"])
        print_tables(finals)
        log.info("report %s", folder / "report.html")
    return score


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


def keep(folder: Path, measured: Measured) -> None:
    """Write the leading head with its card, and `metrics.json`, into the run folder."""
    parts = measured.parts
    leader = parts.module.candidates[parts.module.leader()]
    save_artefact(folder, leader.head, run_card(measured.cfg, parts, leader), parts.module.backbone)
    write_outcome(folder, measured)


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


def _baseline(cfg: DictConfig, notes: list[str]) -> dict[str, Any] | None:
    """The same head and protocol on another backbone (raw pixels), so that a score can be read."""
    name = cfg.task.baseline
    if name is None or name == cfg.backbone.name:
        return None
    log.info("for comparison: the same head on backbone=%s", name)
    try:
        other = recomposed("backbone", name)
        other.resume, other.trainer.max_steps = None, cfg.trainer.max_steps
        if "weights" in other.head:
            other.head.weights = None
        parts = make_parts(other, check=False)
        trainer = make_trainer(other, None, parts, [])
        learn(other, trainer, parts)
        stage = measure(trainer, parts)
    except UserError as error:
        notes.append(f"The baseline {name} could not be measured: {error}")
        return None
    scores = parts.module.results[stage].scores[parts.module.leader()]
    return {"name": TITLES.get(name, name), "metrics": {f"{stage}/{key}": value for key, value in scores.items()}}
