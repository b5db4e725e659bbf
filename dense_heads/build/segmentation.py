"""The segmentation family: its data and its module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL.Image import Image

from dense_heads.build.config import module_arguments, plain
from dense_heads.build.data import Loaded, own_run, read_samples, training_steps
from dense_heads.build.task_distillation import taught_by
from dense_heads.data.checks import check_segmentation
from dense_heads.data.classes import Classes, read_classes
from dense_heads.data.labels import LabelRule
from dense_heads.data.segmentation import SegmentationDataset, collate_eval, collate_train
from dense_heads.data.transforms import EvalTransform, TrainPipeline
from dense_heads.metrics.segmentation import CONVENTIONS
from dense_heads.models.card import Card, read_card
from dense_heads.models.dense import FrozenBackbone
from dense_heads.models.inference import Inference
from dense_heads.report.panel import segmentation_panel
from dense_heads.report.predictions import LabelWriter
from dense_heads.training.base import Candidate
from dense_heads.training.segmentation import SegmentationModule
from dense_heads.training.task_distillation import TaughtSegmentation, Teacher


def load(cfg: DictConfig, check: bool) -> Loaded:
    """Images and masks of the task's splits."""
    names = classes(cfg)
    reader, samples = read_samples(cfg)
    rule = _label_rule(cfg, names)
    if check:
        check_segmentation(samples, rule)
    train = None
    if samples["train"]:
        steps = TrainPipeline(training_steps(cfg), cfg.data.image_size)
        train = SegmentationDataset(samples["train"], rule, steps, seed=cfg.seed)
    transform = EvalTransform(**plain(cfg.task.transforms.eval))
    labelled_test = bool(samples["test"]) and all(sample.mask is not None for sample in samples["test"])
    return Loaded(
        train=train,
        val=SegmentationDataset(samples["val"], rule, transform, seed=cfg.seed) if samples["val"] else None,
        test=SegmentationDataset(samples["test"], rule, transform, seed=cfg.seed) if labelled_test else None,
        collate_train=collate_train,
        collate_eval=collate_eval,
        num_images={split: len(found) for split, found in samples.items()},
        notes=[*reader.notices, *rule.notices],
        made_split=getattr(reader, "made_split", None),
        classes=names,
        labels=rule,
        support=SegmentationDataset(samples["train"], rule, transform, seed=cfg.seed) if samples["train"] else None,
    )


def module(
    cfg: DictConfig,
    loaded: Loaded,
    frozen: FrozenBackbone,
    candidates: Sequence[Candidate],
    teacher: Teacher | None = None,
) -> SegmentationModule:
    """The LightningModule; with a teacher, the one that is taught."""
    kind, taught = (SegmentationModule, {}) if teacher is None else (TaughtSegmentation, taught_by(cfg, teacher))
    return kind(
        frozen,
        candidates,
        **module_arguments(cfg),
        **taught,
        num_classes=cfg.task.num_classes,
        inference=Inference(**plain(cfg.task.inference)),
        class_names=loaded.classes.names,
    )


def num_outputs(cfg: DictConfig) -> int:
    """One channel for each class."""
    return int(cfg.task.num_classes)


def pictures(loaded: Loaded) -> dict[str, Any]:
    """What the picture callback needs: how a prediction is drawn beside its label."""
    names, colours = loaded.classes.names, loaded.classes.colours

    def panel(image: Any, label: Any, prediction: Any, title: str) -> Image:
        return segmentation_panel(image, label, prediction, colours, names, title)

    return {"panel": panel, "label_key": "mask"}


def writer(cfg: DictConfig, output: Path, card: Card) -> LabelWriter:
    """Writes predictions as label maps and overlays."""
    return LabelWriter(output, card, ids=cfg.output_ids)


def conventions(cfg: DictConfig) -> str:
    """How the metrics are counted."""
    return CONVENTIONS


def classes(cfg: DictConfig) -> Classes:
    """Names and colours from the benchmark's folder, else from the data's own `classes.txt`, else numbered."""
    places = [Path(place, "classes.txt") for place in (cfg.task.folder, cfg.data.root) if place]
    return read_classes(next((path for path in places if path.is_file()), None), cfg.task.num_classes)


def labels(cfg: DictConfig) -> dict[str, Any]:
    """How raw mask values become classes, as arguments of LabelRule."""
    return _label_rule(cfg, classes(cfg)).settings()


def _label_rule(cfg: DictConfig, names: Classes) -> LabelRule:
    """How masks are read; what a run decided from its training masks holds when it is measured."""
    run = own_run(cfg)
    if cfg.model and run:
        return LabelRule(**read_card(Path(run)).labels)
    colours = names.colours if names.own_colours else None
    return LabelRule(cfg.task.num_classes, colours=colours, **plain(cfg.task.data.labels))
