"""The pretraining family: its module."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from dense_heads.backbones.vit import VisionTransformer
from dense_heads.build.config import plain
from dense_heads.metrics.neighbours import NeighbourProbe
from dense_heads.training.backbone import Collapse, Recipe
from dense_heads.training.pretraining import Objective, PretrainingModule


def module(
    cfg: DictConfig, student: VisionTransformer, recipe: Recipe, collapse: Collapse, probe: NeighbourProbe | None
) -> PretrainingModule:
    """The LightningModule."""
    options: dict[str, Any] = plain(cfg.task.objective)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    objective = Objective(**options)
    return PretrainingModule(student, objective, instantiate(cfg.optim.optimizer), recipe, collapse, probe, cfg.seed)
