"""A run before its trainer: the family's data and module on a frozen backbone."""

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from omegaconf import DictConfig
from torch.utils.data import Dataset

from dense_heads.build import classification, depth, detection, medical, segmentation
from dense_heads.build.cache import resolve_cache, with_features
from dense_heads.build.config import is_random
from dense_heads.build.data import Loaded
from dense_heads.build.heads import backbone, make_candidates, measured_only
from dense_heads.build.support import all_training_free, chosen_support, refuse_unused_support
from dense_heads.build.task_distillation import make_teacher, unlabelled_images, with_unlabelled
from dense_heads.data.datamodule import DataModule
from dense_heads.data.datasets.base import shorten
from dense_heads.data.part import Part
from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.models.dense import FrozenBackbone
from dense_heads.training.base import Candidate, DenseModule

log = logging.getLogger("dense_heads")

# A family is a module with `load`, `module`, `num_outputs`, `classes`, `labels`, `pictures`, `writer`, `conventions`;
# where something can be said without looking at an image, also `blind`; where by grey alone, `threshold`.
FAMILIES: dict[str, ModuleType] = {
    "segmentation": segmentation,
    "depth": depth,
    "medical": medical,
    "detection": detection,
    "classification": classification,
}


@dataclass
class Parts:
    """What a run is made of, before the trainer."""

    module: DenseModule
    data: DataModule
    loaded: Loaded
    conventions: str
    notes: list[str]  # said in the report
    feature_seconds: float = 0.0  # until all cached features were there
    support: Dataset[Any] | None = None  # what heads without training look at


def family_of(cfg: DictConfig) -> ModuleType:
    """The module of this room that builds the task's family."""
    if cfg.task.family not in FAMILIES:
        raise UserError(f"task.family={cfg.task.family} is not there. There are: {', '.join(FAMILIES)}.")
    return FAMILIES[cfg.task.family]


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """What only this family's model needs, for the card; nothing for most."""
    settings = getattr(family_of(cfg), "settings", None)
    return {} if settings is None else dict(settings(cfg))


def make_parts(
    cfg: DictConfig, check: bool = True, heads: Sequence[Head] | None = None, frozen: FrozenBackbone | None = None
) -> Parts:
    """Everything but the trainer; finds a user's mistakes cheaply, the cheapest first.

    `heads`: trained heads to measure, in place of those that the config describes; `frozen`: the config's backbone, if
    it is there already. Features are computed here where `cache` keeps them. Resolves `trainer.max_steps`,
    `trainer.val_check_interval` and the warmup in `cfg` where they follow from the data.
    """
    family = family_of(cfg)
    resolve_cache(cfg)
    loaded: Loaded = family.load(cfg, check)
    teacher = make_teacher(cfg, loaded)
    unlabelled = unlabelled_images(cfg, loaded)
    _resolve_length(cfg, loaded.num_images["train"] + len(unlabelled))
    frozen = backbone(cfg) if frozen is None else frozen
    if heads is None:
        candidates = make_candidates(cfg, frozen, family.num_outputs(cfg))
    else:
        candidates = [measured_only(cfg, head) for head in heads]
    looked: list[str] = []
    if heads is None and all_training_free([candidate.head for candidate in candidates]):
        if frozen.learns or teacher is not None:
            what = "backbone.trainable=true" if frozen.learns else f"distill={cfg.distill}"
            raise UserError(f"{what}: a head without training learns nothing by steps. Choose another head.")
        loaded, note = _with_support(cfg, loaded, candidates)
        looked.append(note)
    elif heads is None:
        refuse_unused_support(cfg)
    before = time.monotonic()
    fed = with_features(cfg, loaded, frozen, [frozen.request(candidate.head) for candidate in candidates])
    feature_seconds = time.monotonic() - before
    data = DataModule(
        train=with_unlabelled(cfg, fed.train, unlabelled) if unlabelled else fed.train,
        val=fed.val,
        test=fed.test,
        batch_size=cfg.data.batch_size,
        eval_batch_size=cfg.data.eval_batch_size,
        num_workers=cfg.data.num_workers if cfg.cache.kind == "off" else 0,  # features are read at once
        seed=cfg.seed,
        collate_train=loaded.collate_train,
        collate_eval=loaded.collate_eval,
        max_steps=cfg.trainer.max_steps,
        groups=loaded.groups,
        shares=loaded.shares,
    )
    notes = [*fed.notes, *looked]
    if frozen.learns:
        start = "random weights" if is_random(cfg.backbone) else cfg.backbone.weights
        notes.append(f"The backbone was trained with the head, from {start}.")
    elif is_random(cfg.backbone):
        notes.append("The backbone's weights are random: it has learnt nothing.")
    if teacher is not None:
        card = teacher.card
        notes.append(f"Taught by {cfg.distill}: {card.head['name']} on {card.backbone['name']}.")
    if unlabelled:
        notes.append(f"{len(unlabelled)} images without labels were among the training images (data.unlabeled).")
    module = family.module(cfg, loaded, frozen, candidates, **({} if teacher is None else {"teacher": teacher}))
    return Parts(module, data, loaded, family.conventions(cfg), notes, feature_seconds, fed.support)


def _with_support(cfg: DictConfig, loaded: Loaded, candidates: Sequence[Candidate]) -> tuple[Loaded, str]:
    """The data with those training images only that the heads look at, none to train on; and a word on it."""
    if loaded.support is None:
        raise UserError(f"head={cfg.head.get('_target_')}: task={cfg.task.name} has no labelled images to look at.")
    whole = loaded.support if isinstance(loaded.support, Part) else Part(loaded.support, range(len(loaded.support)))  # type: ignore[arg-type]
    indices = chosen_support(cfg, whole, [candidate.head for candidate in candidates])
    names = [whole.samples[index].image_id for index in indices]
    note = f"not trained: {len(indices)} labelled images were looked at ({shorten(names, 20)})"
    return dataclasses.replace(loaded, train=None, support=whole.part(indices)), note


def _resolve_length(cfg: DictConfig, num_images: int) -> None:
    """Own data without a stated length: about 50 epochs, at most 10,000 steps; validated ten times."""
    if cfg.trainer.max_steps is None:
        cfg.trainer.max_steps = min(10_000, math.ceil(50 * max(num_images, 1) / cfg.data.batch_size))
        log.info("trainer.max_steps=%d: about 50 epochs, at most 10,000 steps", cfg.trainer.max_steps)
    if cfg.trainer.max_steps < 1:
        raise UserError(f"trainer.max_steps={cfg.trainer.max_steps}; expected at least 1.")
    if cfg.trainer.max_steps <= cfg.task.protocol.warmup_steps:
        cfg.task.protocol.warmup_steps = cfg.trainer.max_steps // 25  # a shortened run keeps the shape of its schedule
        log.info("task.protocol.warmup_steps=%d: the warmup must end within the run", cfg.task.protocol.warmup_steps)
    interval = cfg.trainer.val_check_interval or math.ceil(cfg.trainer.max_steps / 10)
    cfg.trainer.val_check_interval = min(int(interval), cfg.trainer.max_steps)
