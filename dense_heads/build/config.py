"""Configs: other compositions of the same run, and nodes as plain values."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from dense_heads.backbones.pixels import WITHOUT_NETWORK
from dense_heads.paths import CONF_DIR
from dense_heads.registry import register_tasks


def plain(node: Any) -> dict[str, Any]:
    """A config node as a resolved dict of plain values."""
    container = OmegaConf.to_container(node, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def composed(overrides: list[str]) -> DictConfig:
    """Another composition of the same config, inside a running command."""
    return compose(config_name="config", overrides=overrides)


def module_arguments(cfg: DictConfig) -> dict[str, Any]:
    """What the modules of all dense families are given alike: optimiser, the metric that ranks candidates, seed."""
    metrics = cfg.task.metrics
    optimizer = instantiate(cfg.optim.optimizer)
    return {"optimizer": optimizer, "primary": metrics.primary, "direction": metrics.direction, "seed": cfg.seed}


@contextmanager
def composing() -> Iterator[None]:
    """Lets `composed` work outside a command, also in a program that runs Hydra for itself."""
    register_tasks()
    hydra = GlobalHydra.instance()
    before, hydra.hydra = hydra.hydra, None
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            yield
    finally:
        hydra.hydra = before


@contextmanager
def as_command(overrides: list[str]) -> Iterator[DictConfig]:
    """Another composition that stands, inside the block, for the one that the command was started with."""
    cfg = compose(config_name="config", overrides=overrides, return_hydra_config=True)
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(cfg)
    own = copy.deepcopy(cfg)
    with read_write(own), open_dict(own):
        del own["hydra"]
    try:
        yield own
    finally:
        hydra.cfg = before


def recomposed(group: str, option: str) -> DictConfig:
    """This run's own composition with another option of one group, and nothing that was typed for the former one."""
    kept = [o for o in HydraConfig.get().overrides.task if o.lstrip("+~").partition(".")[0].partition("=")[0] != group]
    return composed([*kept, f"{group}={option}"])


def is_random(backbone_cfg: DictConfig) -> bool:
    """Whether the weights are random; baselines without a network have none."""
    return backbone_cfg.weights is None and backbone_cfg.name not in WITHOUT_NETWORK
