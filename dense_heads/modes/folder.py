"""The run folder: made once, uniquely, by the first process; all others are told."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from dense_heads.errors import UserError
from dense_heads.ops.files import write_atomically
from dense_heads.recompose import OVERRIDES_FILE, keep_overrides, own_overrides, read_overrides

STUDY_FILE = "study.log"  # of a sweep: its trials, in the form of Optuna's journal
_TOLD = "DENSE_HEADS_RUN_FOLDER"  # environment variable: rank 0's folder, for the ranks that it starts
# A resumed run may differ from itself in these only; anything else would be another run.
_FREE_ON_RESUME = (
    "trainer.max_steps",
    "trainer.devices",
    "trainer.strategy",
    "trainer.accelerator",
    "logger",
    "data.root",
    "cache.dir",
    "cache.check",
    "sweep.trials",
    "sweep.timeout",
    "sweep.workers",
)


def time_stamp() -> str:
    """Local time as a folder name that sorts."""
    return time.strftime("%Y-%m-%d_%H-%M-%S")


def make_unique(parent: Path, name: str) -> Path:
    """A folder `parent/name` that did not exist before, `name-2` and so on where it did."""
    parent.mkdir(parents=True, exist_ok=True)
    for count in range(1, 1000):
        folder = parent / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder.resolve()
    raise UserError(f"{parent}: a thousand runs of the same second. Set run_dir=PATH.")


def run_folder(cfg: DictConfig) -> Path:
    """This run's folder, holding `config.yaml` and `overrides.yaml`; the same one in every process."""
    if not _is_first_process():
        # Ranks that a cluster started were told nothing: all derive the same name.
        return Path(os.environ[_TOLD]) if _TOLD in os.environ else _named_folder(cfg)
    folder = _chosen_folder(cfg)
    os.environ[_TOLD] = str(folder)
    keep_run(folder, cfg)
    return folder


def keep_run(folder: Path, cfg: DictConfig, overrides: Sequence[str] | None = None) -> None:
    """Write `config.yaml` and `overrides.yaml`: what was composed, and what was typed for it (the command's own)."""
    write_atomically(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    keep_overrides(folder, HydraConfig.get().overrides.task if overrides is None else overrides)


def evaluation_folder(cfg: DictConfig) -> Path:
    """`RUN/evaluate/<time>` for a measurement of `model=RUN`, the same one in every process."""
    if not _is_first_process():
        return Path(os.environ[_TOLD]) if _TOLD in os.environ else Path(cfg.model, "evaluate", str(_job_id())).resolve()
    parent = Path(cfg.model, "evaluate")
    folder = make_unique(parent, _job_id() or time_stamp())
    os.environ[_TOLD] = str(folder)
    write_atomically(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    return folder


def _is_first_process() -> bool:
    return rank_zero_only.rank == 0 and os.environ.get("LOCAL_RANK", "0") == "0"  # type: ignore[attr-defined]


def _chosen_folder(cfg: DictConfig) -> Path:
    if cfg.resume not in (None, "auto"):
        folder = Path(cfg.resume).resolve()
        _refuse_another_kind(folder, cfg)
        _refuse_changes(folder)
        return folder
    if HydraConfig.get().mode == RunMode.MULTIRUN or cfg.run_dir is not None or cfg.resume == "auto" or _job_id():
        folder = _named_folder(cfg)
    else:
        return make_unique(Path(cfg.output_dir, cfg.task.name, _name(cfg)), time_stamp())
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.resume != "auto" and any((folder / file).exists() for file in ("metrics.csv", STUDY_FILE)):
        raise UserError(f"{folder} holds a run already. Go on with resume={folder}, or choose another run_dir.")
    if (folder / OVERRIDES_FILE).is_file():
        _refuse_another_kind(folder, cfg)
        _refuse_changes(folder)
    return folder.resolve()


def _name(cfg: DictConfig) -> str:
    """What the runs of a task are sorted by."""
    choices = HydraConfig.get().runtime.choices
    if "teacher" in cfg:
        return f"{'+'.join(cfg.students or [cfg.backbone.name])}-from-{cfg.teacher.name}"
    return f"sweep-{choices['sweep']}" if cfg.mode == "sweep" else f"{cfg.backbone.name}-{choices['head']}"


def _refuse_another_kind(folder: Path, cfg: DictConfig) -> None:
    holds = "sweep" if (folder / STUDY_FILE).exists() else "fit" if (folder / "metrics.csv").exists() else None
    if holds not in (None, cfg.mode):
        what = "a sweep" if holds == "sweep" else "a single run"
        raise UserError(f"{folder} holds {what}. Go on with mode={holds} resume={folder}.")


def _job_id() -> str | None:
    """What all ranks of a job, and its restart, know of it; None outside a cluster's job.

    Raises:
        UserError: torchrun on several nodes without an id.
    """
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"{job}.{os.environ.get('SLURM_STEP_ID', '0')}"  # several commands of one allocation are several runs
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job != "none":
        return job
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        raise UserError("torchrun on several nodes gives no name to the run: say run_dir=PATH, or --rdzv-id.")
    return f"{time_stamp()[:10]}-{os.getppid()}"  # ranks on one node are children of one torchrun


def _named_folder(cfg: DictConfig) -> Path:
    """A folder that every process, and a restart of the same job, finds by itself."""
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return Path(hydra.sweep.dir, hydra.sweep.subdir).resolve()
    if cfg.run_dir is not None:
        return Path(cfg.run_dir).resolve()
    if job := _job_id():
        return Path(cfg.output_dir, cfg.task.name, _name(cfg), f"job-{job}").resolve()
    raise UserError("resume=auto needs run_dir=PATH outside a cluster job (no SLURM_JOB_ID or TORCHELASTIC_RUN_ID).")


def _refuse_changes(folder: Path) -> None:
    """A resumed run must be the run that it was.

    Raises:
        UserError: names the overrides that differ.
    """

    def settings(overrides: list[str]) -> dict[str, str]:
        pairs = (override.partition("=")[::2] for override in overrides)
        return {key: value for key, value in pairs if not key.startswith(_FREE_ON_RESUME)}

    kept = read_overrides(folder)
    typed = [o for o in own_overrides(HydraConfig.get().overrides.task) if not o.startswith("debug=")]
    before, now = settings(kept), settings(typed)
    changed = [
        f"{key} (was {before.get(key, 'the default')}, now {value})"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if changed:
        raise UserError(
            f"resume={folder}: a resumed run cannot change {', '.join(changed)}. "
            "Only trainer.max_steps, devices, logger and paths may differ; start a new run for the rest."
        )
