"""Where a resumed run goes on."""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dense_heads.training.checkpoints import newest_checkpoint
from dense_heads.training.loggers import MetricsCsv

log = logging.getLogger("dense_heads")


def checkpoint_to_resume(cfg: DictConfig, folder: Path, metrics_csv: Any) -> Path | None:
    """The newest whole checkpoint of `resume=RUN`, the curves cut back to it; None where nothing is resumed."""
    if cfg.resume is None:
        return None
    checkpoints = folder / "checkpoints"
    if cfg.resume == "auto" and not any(checkpoints.glob("step=*.ckpt")):
        return None
    path = newest_checkpoint(checkpoints)
    step = int(path.stem.partition("=")[2])
    log.info("going on from step %d of %s", step, folder)
    if isinstance(metrics_csv, MetricsCsv):
        metrics_csv.cut_back(step)
    return path
