"""The pretraining family: its module."""

from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from dense_heads.backbones.vit import VisionTransformer
from dense_heads.build.config import plain
from dense_heads.metrics.neighbours import NeighbourProbe
from dense_heads.training.backbone import BackboneTraining, Collapse, Recipe
from dense_heads.training.pretraining import Objective, PretrainingModule


def crops(cfg: DictConfig) -> dict[str, Any]:
    """What differs from `task.crops`: nothing."""
    return {}


def module(
    cfg: DictConfig,
    students: Mapping[str, VisionTransformer],
    recipe: Recipe,
    collapse: Collapse,
    probe: NeighbourProbe | None,
) -> PretrainingModule:
    """The LightningModule."""
    optimizer = instantiate(cfg.optim.optimizer)
    return PretrainingModule(students, objective(cfg), optimizer, recipe, collapse, probe, cfg.seed)


def objective(cfg: DictConfig, **more: Any) -> Objective:
    """`task.objective`, with `more` on top."""
    options: dict[str, Any] = {**plain(cfg.task.objective), **more}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    options["heads"] = {name: head for name, head in (options["heads"] or {}).items() if head is not None}
    return Objective(**options)


def facts(cfg: DictConfig, made: BackboneTraining) -> dict[str, Any]:
    """What the card says of the objective."""
    return {"objective": plain(cfg.task.objective)}
