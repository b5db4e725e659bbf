"""The published number beside a run's own, and what keeps the two from being compared."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dense_heads.build.config import composed, plain
from dense_heads.build.parts import Parts
from dense_heads.models.card import read_card
from dense_heads.paths import CONF_DIR
from dense_heads.report.tables import read_summary

# What must equal the published row's own config; the rest (logger, workers, devices, folders) does not change a number.
_MEASURING = (
    "task.transforms.eval", "task.inference", "task.evaluation", "task.depth_range", "task.data.labels",
    "task.data.depth", "data.depth_scale", "task.num_classes", "head", "trainer.precision", "trainer.limit_val_batches",
    "trainer.limit_test_batches", "backbone.patch_fit", "backbone.weights", "backbone.precision", "backbone.trainable",
    "cache.kind", "cache.views", "cache.dtype",
)  # fmt: skip
_TRAINING = (
    "task.protocol", "task.transforms.train", "task.loss", "optim", "data.image_size", "data.batch_size",
    "data.augment", "trainer.max_steps", "trainer.accumulate_grad_batches", "distill",
)  # fmt: skip


def published_row(cfg: DictConfig, head: str, made: Parts) -> dict[str, Any] | None:
    """The published number of exactly this backbone and head, or the nearest one, and why it is not comparable."""
    published = plain(cfg.task.published)
    name = str(cfg.backbone.name)
    without_registers = name.removesuffix("_reg")
    value = published.get(head, {}).get(without_registers)
    if value is None:
        return None
    row = f"{cfg.task.name} {without_registers} {head}"
    reasons = [] if cfg.task.comparable else ["how the published number was reached is not known in full"]
    if without_registers != name:
        reasons.append(f"the number is of {without_registers}, without registers: none is published for {name}")
    trained = _trained_elsewhere(cfg)
    reasons += trained or []
    keys = _MEASURING if trained is not None else _MEASURING + _TRAINING
    reasons += _differences(cfg, f"{cfg.task.name}_{without_registers}_{head}", keys)
    expected, have = published["images"], made.loaded.num_images
    counted = expected if cfg.mode == "fit" else {s: n for s, n in expected.items() if s != "train"}
    reasons += [
        f"{have[split]:,} {split} images, published with {n:,}" for split, n in counted.items() if have[split] != n
    ]
    reasons += [note for note in made.notes if "not comparable" in note]
    return {
        "value": value,
        "unit": published["unit"],
        "metric": published.get("metric", cfg.task.metrics.primary),
        "source": published["source"],
        "row": row,
        "comparable": not reasons,
        "not_comparable": reasons,
    }


def _trained_elsewhere(cfg: DictConfig) -> list[str] | None:
    """Of a head that was not trained on this task: how its training differs from the published row's; else None.

    `published.trained_on` names the task of rows that were measured without training, such as those of SUN RGB-D.
    """
    where = OmegaConf.select(cfg, "task.published.trained_on") or cfg.task.name
    if cfg.model is None:  # a head with its own weights: nothing is known of its training
        return [] if cfg.mode == "evaluate" and where != cfg.task.name else None
    own = read_card(Path(cfg.model)).task
    if own != where:
        return [f"the head was trained on task={own}, published with {where}"]
    if own == cfg.task.name:
        return None  # this config is that of its training too
    row = read_summary(Path(cfg.model, "metrics.json")).get("published") or {}
    return [f"in training {reason}" for reason in row.get("not_comparable") or ()]


def _differences(cfg: DictConfig, experiment: str, keys: Sequence[str]) -> list[str]:
    """What in this run's config differs from the experiment that stands for the published row."""
    if not (CONF_DIR / "experiment" / f"{experiment}.yaml").is_file():
        return ["there is no experiment file for this row"]
    theirs = composed([f"experiment={experiment}"])
    found = []
    for key in keys:
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
