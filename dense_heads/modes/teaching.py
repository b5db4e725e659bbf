"""What a teacher was worth: its own score, and that of the same student without it."""

import copy
import dataclasses
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dense_heads.build.heads import measured_only
from dense_heads.build.parts import Parts, family_of, make_parts
from dense_heads.build.training import make_trainer
from dense_heads.modes.learning import measure, train
from dense_heads.training.base import DenseModule
from dense_heads.training.task_distillation import Taught

log = logging.getLogger("dense_heads")


def beside_teacher(cfg: DictConfig, parts: Parts, folder: Path) -> dict[str, Any] | None:
    """The teacher's score by this task's protocol, the student's share of it, and the same without a teacher.

    The other student has the same config, seed and steps, and sees the labelled images only; its training stands in
    `folder/alone`. None where nobody taught.
    """
    module = parts.module
    if not isinstance(module, Taught):
        return None
    teacher = module.teacher
    log.info("for comparison: the teacher, %s", teacher.run)
    measured = family_of(cfg).module(cfg, parts.loaded, teacher.backbone, [measured_only(cfg, teacher.head)])
    stage = measure(make_trainer(cfg, None, None, []), dataclasses.replace(parts, module=measured))
    return {
        "run": teacher.run,
        "task": teacher.card.task,
        "backbone": teacher.card.backbone["name"],
        "head": teacher.card.head["name"],
        "fingerprint": teacher.fingerprint(),
        "weights": dataclasses.asdict(module.lessons),
        **_held_against(measured, module, stage),
        "teacher": {"metrics": _metrics(measured, stage)},
        "alone": _alone(cfg, folder, measured) if cfg.task.distill.alone else None,
    }


def _alone(cfg: DictConfig, folder: Path, teacher: DenseModule) -> dict[str, Any]:
    log.info("for comparison: the same student without the teacher")
    other = copy.deepcopy(cfg)
    other.distill, other.data.unlabeled, other.logger = None, None, None
    other.resume = "auto"  # from its own checkpoint, if this run was stopped while it trained
    for name in ("pictures", "progress"):
        if name in (other.callbacks or {}):
            other.callbacks[name] = None
    own = folder / "alone"
    own.mkdir(exist_ok=True)
    parts = make_parts(other, check=False)
    stage = measure(train(other, parts, own).trainer, parts)
    shutil.rmtree(own / "checkpoints", ignore_errors=True)
    return {"metrics": _metrics(parts.module, stage), **_held_against(teacher, parts.module, stage)}


def _metrics(module: DenseModule, stage: str) -> dict[str, float]:
    scores = module.results[stage].scores[module.leader()]
    return {f"{stage}/{name}": value for name, value in scores.items()}


def _held_against(teacher: DenseModule, student: DenseModule, stage: str) -> dict[str, float | None]:
    """`retention`: the student's share of the teacher's score; of an error, the teacher's share of the student's."""
    ours, theirs = (_metrics(one, stage)[f"{stage}/{student.primary}"] for one in (student, teacher))
    above, below = (ours, theirs) if student.direction == "max" else (theirs, ours)
    return {"retention": above / below if below > 0 and math.isfinite(above / below) else None}
