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

from dense_heads.build.values import refuse_bad_values
from dense_heads.errors import UserError, unknown_name
from dense_heads.modes import MODES, PLANNED_MODES


def run(cfg: DictConfig) -> float | None:
    """Start `cfg.mode`; returns the primary metric where the mode measures one (sweepers read it)."""
    _set_up_logging()
    if cfg.mode in PLANNED_MODES:
        raise UserError(f"mode={cfg.mode} is planned, but not there yet. Modes that work: {', '.join(MODES)}.")
    if cfg.mode not in MODES:
        raise unknown_name("mode", str(cfg.mode), MODES)
    refuse_bad_values(cfg)
    _refuse_ranks_inside_a_sweep(cfg)
    several = cfg.mode == "fit" and cfg.fold == "all"
    measured: float | None = importlib.import_module(f"dense_heads.modes.{'folds' if several else cfg.mode}").main(cfg)
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
        ".*across ranks is zero.*",  # no validation images where no probe is asked for
        ".*sync_dist=True.*",  # what is logged has been summed over the processes already
    ):
        warnings.filterwarnings("ignore", text)


def _refuse_ranks_inside_a_sweep(cfg: DictConfig) -> None:
    devices = OmegaConf.select(cfg, "trainer.devices")
    started = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "LOCAL_RANK"))
    if HydraConfig.get().mode == RunMode.MULTIRUN and isinstance(devices, int) and devices > 1 and not started:
        raise UserError(
            f"trainer.devices={devices} with -m: a job of a sweep cannot start processes of its own. "
            "Use one device for each job, or a launcher that starts the ranks (torchrun, SLURM)."
        )
