"""`fold=all`: cross-validation. The folds run one after the other, over one feature cache, and become one result."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dense_heads.build import medical, otsu
from dense_heads.build.splits import split_by_patient
from dense_heads.data.folds import NNUNET_SPLITS
from dense_heads.errors import UserError
from dense_heads.metrics.cases import summary
from dense_heads.metrics.medical import over_cases
from dense_heads.modes import fit
from dense_heads.modes.cases import read_cases, without_nan, write_cases
from dense_heads.modes.folder import keep_run, run_folder
from dense_heads.modes.outcome import without_cases
from dense_heads.ops.files import write_atomically
from dense_heads.report.html import write_report
from dense_heads.report.tables import print_tables, read_summary

log = logging.getLogger("dense_heads")


def main(cfg: DictConfig) -> float:
    """Train and measure every fold; returns the primary metric over the cases of all of them.

    The run folder holds `fold0`, `fold1`, ..., each a run by itself, `splits_final.json` in nnU-Net's form, and the
    aggregate in the files that a run has. A fold that is finished is not run again (`resume=RUN`).

    Raises:
        UserError: a task without folds, or several devices.
    """
    started = time.monotonic()
    if cfg.task.family != "medical":
        raise UserError(f"fold=all: task={cfg.task.name} has no folds. They are of the family medical.")
    if cfg.trainer.devices not in ("auto", 1) or cfg.trainer.num_nodes != 1:
        raise UserError("fold=all runs on one device. Run the folds as jobs of their own: -m fold=0,1,2,3,4.")
    first = cfg.copy()
    first.fold = 0
    folds = split_by_patient(first).folds
    if folds is None:
        raise UserError(f"fold=all: the split of {cfg.resume or cfg.data.root} is fixed, so there are no folds.")
    folder = run_folder(cfg)
    log.info("run folder %s", folder)
    write_atomically(folder / NNUNET_SPLITS, json.dumps(folds, indent=1))
    for number in range(len(folds)):
        _run_fold(cfg, folder / f"fold{number}", number, len(folds))
    found = _aggregate(cfg, folder, len(folds), time.monotonic() - started)
    write_report(folder)
    print_tables(found)
    log.info("report %s", folder / "report.html")
    score: float = found["metrics"][found["primary"]]
    return score


def _run_fold(cfg: DictConfig, folder: Path, number: int, num: int) -> None:
    if (folder / "report.html").is_file():  # the last file that a run writes
        log.info("fold %d of %d: finished before", number, num)
        return
    log.info("fold %d of %d", number, num)
    own = cfg.copy()
    own.fold, own.task.baseline, own.trainer.devices = number, None, 1
    checkpoints = folder / "checkpoints"
    own.resume = str(folder) if any(checkpoints.glob("step=*.ckpt")) else None
    folder.mkdir(parents=True, exist_ok=True)
    typed = [override for override in HydraConfig.get().overrides.task if not override.startswith("fold=")]
    keep_run(folder, own, [*typed, f"fold={number}"])
    fit.run_in(own, folder)


def _aggregate(cfg: DictConfig, folder: Path, num: int, seconds: float) -> dict[str, Any]:
    """All cases, each measured by the head that had not seen it, as one result."""
    folders = [folder / f"fold{number}" for number in range(num)]
    finished = [dict(read_summary(run / "metrics.json")) for run in folders]
    kept = [read_cases(run) for run in folders]
    cases = {case: measured for one in kept for case, measured in one["cases"].items()}
    protocol = medical.protocol(cfg)
    found = summary(cases, protocol)
    by_grey = {case: measured for one in kept for case, measured in one["threshold"].items()}
    first, stage = finished[0], "val"
    colours = {row["name"]: row.get("colour") for row in first["per_class"]}
    names = kept[0]["classes"]
    primary = f"{stage}/{cfg.task.metrics.primary}"
    each = [{"fold": number, **one["metrics"]} for number, one in enumerate(finished)]
    over_folds = over_cases([row[primary] for row in each if row[primary] is not None])
    aggregate = {
        **first,
        "metrics": {f"{stage}/{name}": value for name, value in found["scores"].items()},
        "spread": {f"{stage}/{name}": row for name, row in found["spread"].items()},
        "per_class": [
            {"name": name, **row, "colour": colours.get(name)}
            for name, row in zip(names, found["per_class"], strict=True)
        ],
        "primary": primary,
        "folds": each,
        "baseline": None,
        "threshold": without_cases(otsu.result(by_grey, protocol, stage, None)) if by_grey else None,
        "notes": [
            *(note for note in first["notes"] if not note.startswith(("fold ", "cases: "))),
            f"{num} folds by patient: each of the {len(cases)} cases is measured by the head that was not trained on "
            f"it; {primary} of the folds: mean {over_folds['mean']:.4f}, standard deviation {over_folds['std']:.4f}",
        ],
        "protocol": {**first["protocol"], "split": f"{num} folds, all cases", "images": {"cases": len(cases)}},
        "seconds": {"total": round(seconds, 1)},
        "candidates": [],
    }
    content: dict[str, Any] = without_nan(aggregate)
    write_atomically(folder / "metrics.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_cases(folder, {"cases": cases, **found}, names, by_grey)
    return content
