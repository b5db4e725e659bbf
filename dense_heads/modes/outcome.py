"""What a run found: `metrics.json`, with the published number beside it and what keeps the two from being compared."""

import csv
import json
import math
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dense_heads import build
from dense_heads.paths import CONF_DIR
from dense_heads.training.checkpoints import write_atomically

# What must equal the published row's own config; the rest (logger, workers, devices, folders) does not change a number.
_DECIDING = (
    "task.protocol", "task.transforms", "task.inference", "task.loss", "task.data.labels", "task.num_classes",
    "head", "optim", "data.image_size", "data.batch_size", "trainer.max_steps", "trainer.precision",
    "trainer.limit_val_batches", "trainer.accumulate_grad_batches", "backbone.patch_fit", "backbone.weights",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A measurement and what it was made with."""

    cfg: DictConfig
    parts: build.Parts
    stage: str  # val | test
    step: int
    seconds: Mapping[str, float]
    choices: Mapping[str, str]  # Hydra's: group -> option
    baseline: dict[str, Any] | None = None


def write_outcome(folder: Path, measured: Measured) -> dict[str, Any]:
    """Write `metrics.json`, and `grid.csv` where there are several candidates; returns what `metrics.json` holds."""
    found: dict[str, Any] = _plain(_outcome(measured))
    write_atomically(folder / "metrics.json", (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
    rows = found["candidates"]
    if len(rows) > 1:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (folder / "grid.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    return found


def _outcome(measured: Measured) -> dict[str, Any]:
    cfg, parts, stage = measured.cfg, measured.parts, measured.stage
    module, backbone = parts.module, parts.module.backbone.backbone
    leader = module.leader()
    result = module.results[stage]
    colours = {
        name: list(colour) for name, colour in zip(parts.classes.names, parts.classes.colours.tolist(), strict=True)
    }
    head = module.candidates[leader].head
    published = published_row(measured)
    return {
        "task": cfg.task.name,
        "title": cfg.task.title,
        "version": cfg.task.version,
        "family": cfg.task.family,
        "backbone": {
            "name": cfg.backbone.name,
            "weights": cfg.backbone.weights,  # null: random, from the seed
            "seed": cfg.backbone.seed,
            "fingerprint": backbone.fingerprint(),
            "parameters": sum(p.numel() for p in backbone.parameters()),
        },
        "head": {
            "name": measured.choices.get("head", cfg.head.get("_target_", "")),
            "candidate": module.candidates[leader].name,
            "parameters": sum(p.numel() for p in head.parameters()),
        },
        "metrics": {f"{stage}/{name}": value for name, value in result.scores[leader].items()},
        "per_class": [{**row, "colour": colours.get(row["name"])} for row in result.per_class[leader]],
        "primary": f"{stage}/{module.primary}",
        "direction": module.direction,
        "protocol": {
            "split": "test" if stage == "test" else "validation (the task has no labelled test split)",
            "images": {split: num for split, num in _num_images(parts).items() if split in ("train", stage)},
            "steps": cfg.trainer.max_steps,
            "batch_size": cfg.data.batch_size,
            "image_size": cfg.data.image_size,
            "inference": OmegaConf.to_container(cfg.task.inference, resolve=True),
            "scales": list(cfg.task.transforms.eval.scales),
            "precision": cfg.trainer.precision,
            "select": cfg.task.protocol.select,
        },
        "conventions": parts.conventions,
        "selected_on": _selected_on(cfg, len(module.candidates), stage),
        "published": published,
        "baseline": measured.baseline,
        "notes": list(parts.notes),
        "seed": cfg.seed,
        "steps": measured.step,
        "commit": _commit(),
        "hardware": hardware(),
        "seconds": {name: round(value, 1) for name, value in measured.seconds.items()},
        "versions": {name: version(name) for name in ("dense-heads", "torch", "lightning")},
        "candidates": list(_candidates(measured)),
    }


def _selected_on(cfg: DictConfig, num_candidates: int, stage: str) -> str:
    chosen = (
        "the last checkpoint" if cfg.task.protocol.select == "last" else "the checkpoint that was best on validation"
    )
    if num_candidates > 1:
        chosen += f"; the best of {num_candidates} candidates on validation"
    if stage == "val" and (num_candidates > 1 or cfg.task.protocol.select != "last"):
        chosen += ", which is also the split measured here: the number is optimistic"
    return chosen


def published_row(measured: Measured) -> dict[str, Any] | None:
    """The published number of exactly this backbone and head, or the nearest one, and why it is not comparable."""
    cfg = measured.cfg
    published = OmegaConf.to_container(cfg.task.published)
    assert isinstance(published, dict)
    head, name = measured.choices.get("head", ""), str(cfg.backbone.name)
    plain = name.removesuffix("_reg")
    value = published.get(head, {}).get(plain)
    if value is None:
        return None
    row = f"{cfg.task.name} {plain} {head}"
    reasons = [] if cfg.task.comparable else ["how the published number was reached is not known in full"]
    if plain != name:
        reasons.append(f"the number is of {plain}, without registers: none is published for {name}")
    reasons += _differences(measured, f"{cfg.task.name}_{plain}_{head}")
    expected = build.plain(cfg.task.published.images)
    have = _num_images(measured.parts)
    reasons += [
        f"{have[split]:,} {split} images, published with {n:,}" for split, n in expected.items() if have[split] != n
    ]
    reasons += [note for note in measured.parts.notes if "not comparable" in note]
    return {
        "value": value,
        "unit": published["unit"],
        "source": published["source"],
        "row": row,
        "comparable": not reasons,
        "not_comparable": reasons,
    }


def _num_images(parts: build.Parts) -> dict[str, int]:
    splits = {"train": parts.data.train, "val": parts.data.val, "test": parts.data.test}
    return {name: len(split) if isinstance(split, Sized) else 0 for name, split in splits.items()}


def _differences(measured: Measured, experiment: str) -> list[str]:
    """What in this run's config differs from the experiment that stands for the published row."""
    cfg = measured.cfg
    if not (CONF_DIR / "experiment" / f"{experiment}.yaml").is_file():
        return ["there is no experiment file for this row"]
    theirs = build.composed([f"experiment={experiment}", f"data.root={cfg.data.root}"])
    found = []
    for key in _DECIDING:
        ours_flat = dict(_leaves(key, OmegaConf.select(cfg, key)))
        theirs_flat = dict(_leaves(key, OmegaConf.select(theirs, key)))
        for leaf in sorted(ours_flat.keys() | theirs_flat.keys()):
            ours, published = ours_flat.get(leaf), theirs_flat.get(leaf)
            if ours != published and leaf != "head.weights":
                found.append(f"{leaf} is {ours!r}, published with {published!r}")
    return found


def _leaves(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, DictConfig):
        for key in node:
            yield from _leaves(f"{prefix}.{key!s}", OmegaConf.select(node, str(key)))
    else:
        yield prefix, OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


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


def _plain(value: Any) -> Any:
    """JSON has no nan: null stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _commit() -> str | None:
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
