"""`mode=fit`: train a head, measure it, write the run folder."""

import dataclasses
import logging
import os
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from dense_heads.build.backbone_training import BACKBONE_FAMILIES
from dense_heads.build.config import recomposed
from dense_heads.build.data import keep_split
from dense_heads.build.model import run_card
from dense_heads.build.parts import Parts, make_parts
from dense_heads.build.training import make_trainer
from dense_heads.errors import UserError
from dense_heads.models.artefact import save_artefact
from dense_heads.modes import pretrain
from dense_heads.modes.folder import run_folder
from dense_heads.modes.learning import learn, measure, train
from dense_heads.modes.outcome import Measured, untrained, write_outcome
from dense_heads.modes.teaching import beside_teacher
from dense_heads.report.html import write_report
from dense_heads.report.tables import print_tables
from dense_heads.training.loggers import finish_loggers

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
    # After all is saved: their failure costs nothing.
    distillation = beside_teacher(cfg, parts, folder)
    baseline = _baseline(cfg, parts.notes)
    seconds["total"] = time.monotonic() - started
    if first:
        beside = untrained(cfg, parts, stage)
        finals = write_outcome(
            folder, dataclasses.replace(measured, baseline=baseline, distillation=distillation, **beside)
        )
        write_report(folder)
        finish_loggers(trained.loggers, finals["metrics"])
        print_tables(finals)
        log.info("report %s", folder / "report.html")
    return score


def keep(folder: Path, measured: Measured) -> None:
    """Write the leading head with its card, and `metrics.json`, into the run folder."""
    parts = measured.parts
    leader = parts.module.candidates[parts.module.leader()]
    save_artefact(folder, leader.head, run_card(measured.cfg, parts, leader), parts.module.backbone)
    write_outcome(folder, measured)


def _baseline(cfg: DictConfig, notes: list[str]) -> dict[str, Any] | None:
    """The same head and protocol on another backbone (raw pixels), so that a score can be read."""
    name = cfg.task.baseline
    if name is None or name == cfg.backbone.name:
        return None
    log.info("for comparison: the same head on backbone=%s", name)
    try:
        other = recomposed("backbone", name)
        other.resume, other.distill, other.trainer.max_steps = None, None, cfg.trainer.max_steps
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
