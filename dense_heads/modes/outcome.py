"""What a run found: `metrics.json`, with the published number beside it and what keeps the two from being compared."""

import csv
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dense_heads.build.config import plain
from dense_heads.build.parts import Parts, family_of
from dense_heads.modes.cases import without_nan, write_cases
from dense_heads.modes.published import published_row
from dense_heads.ops.files import write_atomically
from dense_heads.paths import CONF_DIR
from dense_heads.report.tables import read_summary
from dense_heads.training.base import DenseModule


@dataclass(frozen=True)
class Measured:
    """A measurement and what it was made with."""

    cfg: DictConfig
    parts: Parts
    stage: str  # val | test
    step: int
    seconds: Mapping[str, float]
    choices: Mapping[str, str]  # Hydra's: group -> option
    baseline: dict[str, Any] | None = None
    blind: list[dict[str, Any]] = field(default_factory=list)  # what knows nothing of the images scores
    threshold: dict[str, Any] | None = None  # what grey alone scores
    distillation: dict[str, Any] | None = None  # the teacher's score, and the same student's without it
    trials: int = 1  # of a sweep, of which this is the best on validation


def untrained(cfg: DictConfig, parts: Parts, stage: str) -> dict[str, Any]:
    """Arguments of Measured: `blind`, predictions that do not look at the image, and `threshold`, by grey alone.

    Each of them a family measures or not.
    """
    family = family_of(cfg)
    measures = {name: getattr(family, name) for name in ("blind", "threshold") if hasattr(family, name)}
    return {name: measure(cfg, parts.loaded, stage) for name, measure in measures.items()}


def write_outcome(folder: Path, measured: Measured) -> dict[str, Any]:
    """Write `metrics.json`, and `grid.csv` where there are several candidates; returns what `metrics.json` holds."""
    found: dict[str, Any] = without_nan(_outcome(measured))
    write_atomically(folder / "metrics.json", (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
    if details := _details(measured):
        by_grey = measured.threshold["cases"] if measured.threshold else {}
        write_cases(folder, details, [row["name"] for row in found["per_class"]], by_grey)
    rows = found["candidates"]
    if len(rows) > 1:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (folder / "grid.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    return found


def without_cases(threshold: Mapping[str, Any]) -> dict[str, Any]:
    """What a threshold scores, for `metrics.json`; the cases stand in a file of their own."""
    return {key: value for key, value in threshold.items() if key != "cases"}


def trained_steps(run: Path) -> int:
    """How long a finished run was trained."""
    return int(read_summary(run / "metrics.json").get("steps", 0))


def _outcome(measured: Measured) -> dict[str, Any]:
    cfg, parts, stage = measured.cfg, measured.parts, measured.stage
    module, backbone = parts.module, parts.module.backbone.backbone
    leader = module.leader()
    result = module.results[stage]
    colours = {
        name: list(colour)
        for name, colour in zip(parts.loaded.classes.names, parts.loaded.classes.colours.tolist(), strict=True)
    }
    head = module.candidates[leader].head
    published = published_row(cfg, measured.choices.get("head", ""), parts)
    return {
        "task": cfg.task.name,
        "title": cfg.task.title,
        "version": cfg.task.version,
        "family": cfg.task.family,
        "backbone": {
            "name": cfg.backbone.name,
            "weights": cfg.backbone.weights,  # null: random, from the seed
            "seed": cfg.backbone.seed,
            "fingerprint": module.backbone.fingerprint(),
            "precision": module.backbone.precision,
            "trained": module.backbone.learns,  # with the head; else frozen
            "parameters": sum(p.numel() for p in backbone.parameters()),
        },
        "head": {
            "name": measured.choices.get("head", cfg.head.get("_target_", "")),
            "candidate": module.candidates[leader].name,
            "parameters": sum(p.numel() for p in head.parameters()),
        },
        "metrics": {f"{stage}/{name}": value for name, value in result.scores[leader].items()},
        "spread": _spread(measured),
        "per_class": [{**row, "colour": colours.get(row["name"])} for row in result.per_class[leader]],
        "primary": f"{stage}/{module.primary}",
        "direction": module.direction,
        "protocol": {
            "split": "test" if stage == "test" else "validation (the task has no labelled test split)",
            "images": {split: num for split, num in parts.loaded.num_images.items() if split in ("train", stage)},
            "steps": measured.step,
            "batch_size": plain(cfg.data)["batch_size"],
            "image_size": plain(cfg.data)["image_size"],
            "inference": plain(cfg.task.inference),
            "eval": plain(cfg.task.transforms.eval),
            "precision": cfg.trainer.precision,
            "augment": cfg.data.augment,
            "cache": {key: cfg.cache[key] for key in ("kind", "views", "dtype")},
            "select": cfg.task.protocol.select,
        },
        "conventions": parts.conventions,
        "selected_on": _selected_on(cfg, module, measured.trials, stage),
        "published": published,
        "baseline": measured.baseline,
        "distillation": measured.distillation,
        "blind": measured.blind,
        "threshold": None if measured.threshold is None else without_cases(measured.threshold),
        "notes": list(parts.notes),
        "seed": cfg.seed,
        "steps": measured.step,
        "commit": commit(),
        "hardware": hardware(),
        "seconds": {name: round(value, 1) for name, value in measured.seconds.items()},
        "versions": {name: version(name) for name in ("dense-heads", "torch", "lightning")},
        "candidates": list(_candidates(measured)),
    }


def _details(measured: Measured) -> dict[str, Any] | None:
    """The leader's cases, in families that measure by case."""
    module = measured.parts.module
    return module.details[module.leader()] if module.details else None


def _spread(measured: Measured) -> dict[str, Any] | None:
    """Over the cases: mean, standard deviation, interval and number, for each score."""
    details = _details(measured)
    return None if details is None else {f"{measured.stage}/{name}": row for name, row in details["spread"].items()}


def _selected_on(cfg: DictConfig, module: DenseModule, num_trials: int, stage: str) -> str:
    num_candidates = len(module.candidates)
    if module.training_free and num_candidates == 1:
        return "nothing is trained, so there is nothing to select"
    chosen = (
        "the last checkpoint" if cfg.task.protocol.select == "last" else "the checkpoint that was best on validation"
    )
    if module.training_free:
        chosen = "nothing is trained"
    if num_candidates > 1:
        chosen += f"; the best of {num_candidates} candidates on validation"
    if num_trials > 1:
        chosen += f"; the best of {num_trials} trials on validation"
    if stage == "val" and (max(num_candidates, num_trials) > 1 or cfg.task.protocol.select != "last"):
        chosen += ", which is also the split measured here: the number is optimistic"
    return chosen


def _candidates(measured: Measured) -> Iterator[dict[str, Any]]:
    module = measured.parts.module
    result = module.results[measured.stage]
    for rank, index in enumerate(module.ranking(measured.stage), start=1):
        candidate = module.candidates[index]
        yield {
            "rank": rank,
            "name": candidate.name,
            **candidate.settings,
            **{f"{measured.stage}/{name}": value for name, value in result.scores[index].items()},
            "retired_at_step": module.retired.get(candidate.name),
        }


def commit() -> str | None:
    """The commit of this checkout; None for an installed package."""
    command = ["git", "-C", str(CONF_DIR), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> str:
    """Processor and accelerators in one line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{name}, {torch.get_num_threads()} threads" + (f", {', '.join(gpus)}" if gpus else "")
