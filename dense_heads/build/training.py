"""The trainer with its loggers and callbacks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

from dense_heads.build.config import plain
from dense_heads.build.parts import Parts, family_of
from dense_heads.errors import UserError
from dense_heads.training.checkpoints import AtomicCheckpointIO
from dense_heads.training.loggers import MetricsCsv


def make_loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """`metrics.csv` first, then those that were chosen; each knows the folder, W&B the config too."""
    made: list[Logger] = [MetricsCsv(folder / "metrics.csv")]
    for name, node in (cfg.logger or {}).items():
        partial = instantiate(node)
        if name == "wandb":
            made.append(partial(folder=folder, config=OmegaConf.to_container(cfg, resolve=True)))
        else:
            made.append(partial(save_dir=str(folder)))
    return made


def make_trainer(
    cfg: DictConfig,
    folder: Path | None,
    made: Parts | None,
    run_loggers: list[Logger],
    more: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """The trainer, with `more` callbacks beside the config's; without a folder (a baseline) nothing is left behind."""
    callbacks = [*more, *_callbacks(cfg, folder, made)] if folder is not None else list(more)
    options = dict(plain(cfg.trainer))
    options.pop("_target_")
    options["val_check_interval"] *= options["accumulate_grad_batches"]  # ours in steps, Lightning's in batches
    if options["strategy"] == "ddp" or (options["strategy"] == "auto" and _several_devices(options)):
        # Batch norm keeps its own statistics equal; DDP's broadcast of buffers would hang on uneven validation shares.
        options["strategy"] = DDPStrategy(broadcast_buffers=False)
    if options["strategy"] == "auto" and torch.cuda.device_count() <= 1 and options["devices"] == "auto":
        options["devices"] = 1
    try:
        return pl.Trainer(
            **options,
            logger=run_loggers,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=folder is not None,
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            default_root_dir=str(folder) if folder else None,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"The trainer cannot be made: {text} Look at what was set under `trainer`.") from error


def _several_devices(options: Mapping[str, Any]) -> bool:
    devices = options["devices"]
    if devices == "auto":
        return options["accelerator"] != "cpu" and torch.cuda.device_count() > 1
    return (isinstance(devices, int) and devices > 1) or (isinstance(devices, list) and len(devices) > 1)


def _callbacks(cfg: DictConfig, folder: Path, made: Parts | None) -> list[pl.Callback]:
    completed: dict[str, dict[str, Any]] = {
        "checkpoints": {"folder": folder / "checkpoints"},
        "pictures": {"folder": folder, **family_of(cfg).pictures(made.loaded)} if made else {},
    }
    made_callbacks = []
    for name, node in (cfg.callbacks or {}).items():
        if node is not None and (made or name != "pictures"):
            callback = instantiate(node)
            made_callbacks.append(callback(**completed[name]) if name in completed else callback)
    return made_callbacks
