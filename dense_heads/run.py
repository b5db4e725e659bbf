"""From a composed config to the mode that was asked for."""

import importlib
import logging
import os
import sys
import warnings

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.logging import RichHandler

from dense_heads.command import MODES, PLANNED_MODES
from dense_heads.errors import UserError, unknown_name

_WHOLE_NUMBERS = (
    "seed", "task.num_classes", "data.batch_size", "data.image_size", "data.num_workers", "trainer.max_steps",
)  # fmt: skip
_NUMBERS = ("optim.lr", "optim.weight_decay", "optim.clip_norm")
_CHOICES = {
    "task.protocol.select": ("last", "best"),
    "task.metrics.direction": ("max", "min"),
}


def run(cfg: DictConfig) -> float | None:
    """Start `cfg.mode`; returns the primary metric where the mode measures one (sweepers read it)."""
    _set_up_logging()
    if cfg.mode in PLANNED_MODES:
        raise UserError(f"mode={cfg.mode} is planned, but not there yet. Modes that work: {', '.join(MODES)}.")
    if cfg.mode not in MODES:
        raise unknown_name("mode", str(cfg.mode), MODES)
    _refuse_bad_values(cfg)
    _refuse_unused_data_keys(cfg)
    _refuse_ranks_inside_a_sweep(cfg)
    measured: float | None = importlib.import_module(f"dense_heads.modes.{cfg.mode}").main(cfg)
    return measured


def _set_up_logging() -> None:
    log = logging.getLogger("dense_heads")
    if not log.handlers:
        if sys.stderr.isatty():
            handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False)
            handler.setFormatter(logging.Formatter("%(message)s", "%H:%M:%S"))
        else:  # a file or a pipe: whole lines
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO if rank_zero_only.rank == 0 else logging.ERROR)  # type: ignore[attr-defined]
    # Lightning's remarks on devices, on its own loggers and on settings that we chose knowingly.
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*module\\(s\\) in eval mode.*",
        ".*your dataloader is not resumable.*",  # it is: it starts at the checkpoint's step
        ".*treespec, LeafSpec.*",
        ".*sync_dist=True.*",  # what is logged has been summed over the processes already
    ):
        warnings.filterwarnings("ignore", text)


def _refuse_bad_values(cfg: DictConfig) -> None:
    """What is often typed, before it fails somewhere deep; constructors check the rest."""
    for key in _WHOLE_NUMBERS + _NUMBERS:
        value, kind = OmegaConf.select(cfg, key), int if key in _WHOLE_NUMBERS else int | float
        if value is None and key != "seed":
            continue
        values = list(value) if key == "data.image_size" and OmegaConf.is_list(value) else [value]
        if all(isinstance(number, kind) and not isinstance(number, bool) for number in values):
            continue
        raise UserError(f"{key}={value}: expected a {'whole ' if kind is int else ''}number.")
    for key, known in _CHOICES.items():
        if (value := OmegaConf.select(cfg, key)) not in known:
            raise unknown_name(f"{key}:", str(value), known)


def _refuse_unused_data_keys(cfg: DictConfig) -> None:
    for key, value in cfg.data.items():
        if value is not None and key not in cfg.task.data:
            used = ", ".join(f"data.{name}" for name in cfg.data if name in cfg.task.data)
            raise UserError(f"data.{key} is set, but task={cfg.task.name} does not use it. It uses {used}.")


def _refuse_ranks_inside_a_sweep(cfg: DictConfig) -> None:
    devices = OmegaConf.select(cfg, "trainer.devices")
    started = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "LOCAL_RANK"))
    if HydraConfig.get().mode == RunMode.MULTIRUN and isinstance(devices, int) and devices > 1 and not started:
        raise UserError(
            f"trainer.devices={devices} with -m: a job of a sweep cannot start processes of its own. "
            "Use one device for each job, or a launcher that starts the ranks (torchrun, SLURM)."
        )
