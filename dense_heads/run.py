"""From a composed config to the mode that was asked for."""

import importlib
import logging
import math
import os
import sys
import warnings

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.logging import RichHandler

from dense_heads.errors import UserError, unknown_name
from dense_heads.modes import MODES, PLANNED_MODES

# What is often typed, and fails somewhere deep when it is wrong: key -> the least that makes sense.
_WHOLE_NUMBERS = {
    "seed": 0, "task.num_classes": 2, "data.batch_size": 1, "data.eval_batch_size": 1, "data.image_size": 1,
    "data.num_workers": 0,
    "trainer.max_steps": 1, "trainer.val_check_interval": 1, "trainer.accumulate_grad_batches": 1,
    "trainer.log_every_n_steps": 1, "callbacks.checkpoints.every": 1, "callbacks.checkpoints.keep": 1,
}  # fmt: skip
_NUMBERS = ("optim.lr", "optim.weight_decay", "optim.clip_norm", "head.lr", "head.weight_decay")
_CHOICES = {"task.protocol.select": ("last", "best"), "task.metrics.direction": ("max", "min")}


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
    for key in (*_WHOLE_NUMBERS, *_NUMBERS):
        value = OmegaConf.select(cfg, key)
        if value is None and key != "seed":
            continue
        kind, least = (int, _WHOLE_NUMBERS[key]) if key in _WHOLE_NUMBERS else (int | float, 0)
        for number in value if OmegaConf.is_list(value) else [value]:
            if not isinstance(number, kind) or isinstance(number, bool) or not least <= number < math.inf:
                what = "whole number" if kind is int else "number"
                raise UserError(f"{key}={value}: expected a {what}, {least} or above.")
    for key, known in _CHOICES.items():
        if (choice := OmegaConf.select(cfg, key)) not in known:
            raise unknown_name(f"{key}:", str(choice), known)
    for key in ("trainer.limit_val_batches", "trainer.limit_test_batches"):
        if OmegaConf.select(cfg, key) == 0:
            raise UserError(f"{key}=0: a run is measured at its end. Set it to 1 or more, or to 1.0 for all.")


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
