"""Task distillation: the teacher of `distill=RUN`, and the images that it alone labels."""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dense_heads.build.config import plain
from dense_heads.build.data import Loaded
from dense_heads.data.datasets.base import shorten
from dense_heads.data.unlabelled import ImageFiles, find_images
from dense_heads.data.with_unlabelled import WithUnlabelled
from dense_heads.errors import UserError
from dense_heads.models.artefact import load_model
from dense_heads.models.card import read_card
from dense_heads.structures import IGNORE_INDEX
from dense_heads.training.task_distillation import Lessons, Teacher

log = logging.getLogger("dense_heads")

LABELS: dict[str, tuple[str, int | float]] = {"segmentation": ("mask", IGNORE_INDEX), "depth": ("depth_m", 0.0)}


def make_teacher(cfg: DictConfig, loaded: Loaded) -> Teacher | None:
    """The model of `distill=RUN`; None where nobody teaches.

    Raises:
        UserError: no such run, one of another kind or of other classes, or what does not go together with a teacher.
    """
    if cfg.distill is None or cfg.mode not in ("fit", "sweep"):
        return None
    if cfg.cache.kind != "off":
        raise UserError(f"distill with cache={cfg.cache.kind}: the teacher looks at the images. Use cache=off.")
    run = Path(cfg.distill)
    if not run.exists():
        raise UserError(f"distill={run}: there is no such run. Expected the folder of a finished run of this command.")
    card = read_card(run)
    if card.family != cfg.task.family:
        raise UserError(
            f"distill={run} is a model of {card.family} ({card.task}); task={cfg.task.name} is {cfg.task.family}. "
            "A teacher must predict what the student learns."
        )
    ours = list(loaded.classes.names)
    if card.classes != ours:
        raise UserError(
            f"distill={run} ({card.task}) predicts {len(card.classes)} classes ({shorten(card.classes)}); "
            f"task={cfg.task.name} has {len(ours)} ({shorten(ours)}). Expected the same classes in the same order."
        )
    channels = card.backbone.get("in_channels", 3)
    if channels != cfg.backbone.in_channels:
        raise UserError(
            f"distill={run} sees images of {channels} channels, the student of {cfg.backbone.in_channels}; expected "
            "equal ones."
        )
    return Teacher(load_model(run), str(run))


def taught_by(cfg: DictConfig, teacher: Teacher) -> dict[str, Any]:
    """What a taught module is given beside the arguments of its family's."""
    lessons = Lessons(**{key: value for key, value in plain(cfg.task.distill).items() if key != "alone"})
    return {"teacher": teacher, "lessons": lessons}


def unlabelled_images(cfg: DictConfig, loaded: Loaded) -> list[Path]:
    """The images of `data.unlabeled` that are none of the task's own: what is measured must not be looked at before.

    Raises:
        UserError: nobody is there to label them, or there are none.
    """
    if cfg.data.get("unlabeled") is None or cfg.mode not in ("fit", "sweep"):
        return []
    if cfg.distill is None:
        raise UserError("data.unlabeled is set, but nobody labels these images. Set distill=RUN.")
    found = find_images(cfg.data.unlabeled)
    if not isinstance(found, ImageFiles):
        raise UserError(f"data.unlabeled={cfg.data.unlabeled}: expected a folder or a list, not tar shards.")
    splits = (loaded.train, loaded.val, loaded.test)
    own = {sample.image.resolve() for split in splits if split is not None for sample in split.samples}  # type: ignore[attr-defined]
    kept = [path for path in found.paths if path.resolve() not in own]
    if not kept:
        raise UserError(f"data.unlabeled={cfg.data.unlabeled}: all {len(found)} images belong to task={cfg.task.name}.")
    if len(kept) < len(found):
        log.info("data.unlabeled: %d of %d images are the task's own and left out", len(found) - len(kept), len(found))
    return kept


def with_unlabelled(cfg: DictConfig, train: object, images: list[Path]) -> WithUnlabelled:
    """The training set with these images behind the labelled ones."""
    return WithUnlabelled(train, images, *LABELS[cfg.task.family])
