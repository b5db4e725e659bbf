"""Configs: other compositions of the same run, and nodes as plain values."""

from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dense_heads.backbones.pixels import WITHOUT_NETWORK


def plain(node: Any) -> dict[str, Any]:
    """A config node as a resolved dict of plain values."""
    container = OmegaConf.to_container(node, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def composed(overrides: list[str]) -> DictConfig:
    """Another composition of the same config, inside a running command."""
    return compose(config_name="config", overrides=overrides)


def recomposed(group: str, option: str) -> DictConfig:
    """This run's own composition with another option of one group, and nothing that was typed for the former one."""
    kept = [o for o in HydraConfig.get().overrides.task if o.lstrip("+~").partition(".")[0].partition("=")[0] != group]
    return composed([*kept, f"{group}={option}"])


def is_random(backbone_cfg: DictConfig) -> bool:
    """Whether the weights are random; baselines without a network have none."""
    return backbone_cfg.weights is None and backbone_cfg.name not in WITHOUT_NETWORK
