"""The classification family: its data and its module."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL.Image import Image

from dense_heads.build.config import module_arguments, plain
from dense_heads.build.data import Loaded, read_samples, training_steps
from dense_heads.data.classes import Classes, default_palette, read_classes
from dense_heads.data.classification import ClassificationDataset, check_classification, collate_eval, collate_train
from dense_heads.data.classification_transforms import CentreEvalTransform
from dense_heads.data.transforms import TrainPipeline
from dense_heads.errors import UserError
from dense_heads.metrics.classification import CONVENTIONS
from dense_heads.models.card import Card, read_card
from dense_heads.models.dense import FrozenBackbone
from dense_heads.models.inference import Inference
from dense_heads.report.classification import ClassWriter, classification_panel
from dense_heads.training.base import Candidate
from dense_heads.training.classification import ClassificationModule


@dataclass(frozen=True)
class ClassOrder:
    """The names of the classes in the order of their ids: part of what cached items depend on."""

    names: Sequence[str]

    def settings(self) -> dict[str, Any]:
        """For the card."""
        return {"classes": list(self.names)}


def load(cfg: DictConfig, check: bool) -> Loaded:
    """Images of the task's splits with their classes. Fills in `task.num_classes` and `task.class_names`."""
    reader, samples = read_samples(cfg)
    path = _classes_file(cfg)
    if cfg.model:  # what the head has learnt
        names = read_card(Path(cfg.model)).classes
    else:
        names = list(reader.categories) if path is None else list(read_classes(path, None).names)
    if cfg.task.num_classes not in (None, len(names)):
        raise UserError(
            f"task.num_classes={cfg.task.num_classes}, but there are {len(names)} classes. Leave it out, or correct it."
        )
    cfg.task.num_classes, cfg.task.class_names = len(names), names
    if check:
        check_classification(samples, names)
    train = None
    if samples["train"]:
        steps = TrainPipeline(training_steps(cfg), cfg.data.image_size)
        train = ClassificationDataset(samples["train"], names, steps, cfg.seed)
    seen = {split: _as_tested(cfg, found, names) for split, found in samples.items()}
    return Loaded(
        train=train,
        val=seen["val"],
        test=seen["test"],
        collate_train=collate_train,
        collate_eval=collate_eval,
        num_images={split: len(found) for split, found in samples.items()},
        notes=list(reader.notices),
        made_split=reader.made_split,
        classes=classes(cfg),
        labels=ClassOrder(names),
        support=seen["train"],
    )


def module(
    cfg: DictConfig, loaded: Loaded, frozen: FrozenBackbone, candidates: Sequence[Candidate]
) -> ClassificationModule:
    """The LightningModule."""
    return ClassificationModule(
        frozen,
        candidates,
        **module_arguments(cfg),
        inference=Inference(**plain(cfg.task.inference)),
        class_names=loaded.classes.names,
    )


def num_outputs(cfg: DictConfig) -> int | None:
    """The number of classes; None where only the data can say it."""
    return None if cfg.task.num_classes is None else int(cfg.task.num_classes)


def pictures(loaded: Loaded) -> dict[str, Any]:
    """What the picture callback needs: how a prediction is drawn beside its label."""
    names, colours = loaded.classes.names, loaded.classes.colours

    def panel(image: Any, label: Any, prediction: Any, title: str) -> Image:
        return classification_panel(image, label, prediction, colours, names, title)

    return {"panel": panel, "label_key": "class_id"}


def writer(cfg: DictConfig, output: Path, card: Card) -> ClassWriter:
    """Writes predictions as a table and pictures."""
    return ClassWriter(output, card)


def conventions(cfg: DictConfig) -> str:
    """How the metrics are counted."""
    return CONVENTIONS


def classes(cfg: DictConfig) -> Classes:
    """Names and colours: the benchmark's, else the data's own."""
    path = _classes_file(cfg)
    if path is not None and cfg.task.class_names is None:
        return read_classes(path, num_outputs(cfg))
    names = list(cfg.task.class_names or [])
    return Classes(tuple(names), default_palette(len(names)), False)


def labels(cfg: DictConfig) -> dict[str, Any]:
    """Names stand in the card's classes already."""
    return {}


def _as_tested(cfg: DictConfig, samples: Sequence[Any], names: Sequence[str]) -> ClassificationDataset | None:
    transform = CentreEvalTransform(**plain(cfg.task.transforms.eval))
    return ClassificationDataset(samples, names, transform, cfg.seed) if samples else None


def _classes_file(cfg: DictConfig) -> Path | None:
    places = [Path(place, "classes.txt") for place in (cfg.task.folder, cfg.data.root) if place]
    return next((path for path in places if path.is_file()), None)
