"""The detection family: its data and its module."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL.Image import Image

from dense_heads.build.config import module_arguments, plain
from dense_heads.build.data import Loaded, read_samples, training_steps
from dense_heads.data.classes import Classes, default_palette, read_classes
from dense_heads.data.datasets.base import shorten
from dense_heads.data.detection import DetectionDataset, collate_eval, collate_train
from dense_heads.data.detection_checks import check_detection
from dense_heads.data.detection_transforms import DetectionEvalTransform, DetectionTrainPipeline
from dense_heads.data.objects import DetectionSample, relabelled
from dense_heads.errors import UserError
from dense_heads.metrics import detection as metrics
from dense_heads.models.card import Card
from dense_heads.models.dense import FrozenBackbone
from dense_heads.models.detector import DetectionInference
from dense_heads.report.detection_panel import detection_panel
from dense_heads.report.detections import DetectionWriter
from dense_heads.training.base import Candidate
from dense_heads.training.detection import DetectionModule


@dataclass(frozen=True)
class CategoryIds:
    """The ids of the classes in the data set's own files."""

    ids: list[int]

    def settings(self) -> dict[str, Any]:
        """For the card."""
        return {"category_ids": self.ids}


def load(cfg: DictConfig, check: bool) -> Loaded:
    """Images and objects of the task's splits. Fills in `task.num_classes` and `task.class_names` from the data."""
    reader, samples = read_samples(cfg)
    names = _class_names(cfg, reader.categories)
    cfg.task.num_classes, cfg.task.class_names = len(names), names
    place = {label: names.index(name) for label, name in enumerate(reader.categories)}
    samples = {split: [relabelled(sample, place) for sample in found] for split, found in samples.items()}
    with_masks = bool(cfg.task.masks)
    if check:
        check_detection(samples, with_masks)
    train = None
    if samples["train"]:
        steps = DetectionTrainPipeline(training_steps(cfg), _size(cfg), with_masks)
        train = DetectionDataset(samples["train"], steps, with_masks, seed=cfg.seed)
    transform = DetectionEvalTransform(**plain(cfg.task.transforms.eval))
    labelled_test = bool(samples["test"]) and all(sample.objects is not None for sample in samples["test"])
    ids_of = dict(zip(reader.categories, reader.category_ids, strict=True))
    return Loaded(
        train=train,
        val=DetectionDataset(samples["val"], transform, with_masks, cfg.seed) if samples["val"] else None,
        test=DetectionDataset(samples["test"], transform, with_masks, cfg.seed) if labelled_test else None,
        collate_train=collate_train,
        collate_eval=collate_eval,
        num_images={split: len(found) for split, found in samples.items()},
        notes=list(reader.notices),
        made_split=getattr(reader, "made_split", None),
        classes=classes(cfg),
        labels=CategoryIds([ids_of[name] if name in ids_of else -1 for name in names]),
        groups=_groups(samples["train"]) if cfg.data.class_aware else None,
    )


def module(cfg: DictConfig, loaded: Loaded, frozen: FrozenBackbone, candidates: Sequence[Candidate]) -> DetectionModule:
    """The LightningModule."""
    return DetectionModule(
        frozen,
        candidates,
        **module_arguments(cfg),
        inference=DetectionInference(**plain(cfg.task.inference)),
        class_names=loaded.classes.names,
        evaluation={"with_masks": bool(cfg.task.masks), **plain(cfg.task.evaluation)},
    )


def num_outputs(cfg: DictConfig) -> int | None:
    """The number of classes; None where only the data can say it."""
    return None if cfg.task.num_classes is None else int(cfg.task.num_classes)


def pictures(loaded: Loaded) -> dict[str, Any]:
    """What the picture callback needs: how a prediction is drawn beside its label."""
    names, colours = loaded.classes.names, loaded.classes.colours

    def panel(image: Any, label: Any, prediction: Any, title: str) -> Image:
        return detection_panel(image, label, prediction, colours, names, title)

    return {"panel": panel, "label_key": ("boxes", "labels", "iscrowd", "mask_codes")}


def writer(cfg: DictConfig, output: Path, card: Card) -> DetectionWriter:
    """Writes predictions as COCO JSON and drawings."""
    return DetectionWriter(output, card, ids=cfg.output_ids)


def conventions(cfg: DictConfig) -> str:
    """How the metrics are counted."""
    return metrics.conventions(bool(cfg.task.masks), bool(cfg.task.evaluation.voc))


def classes(cfg: DictConfig) -> Classes:
    """Names and colours: the benchmark's, else the data's own."""
    path = _classes_file(cfg)
    if path is not None:
        return read_classes(path, num_outputs(cfg))
    names = list(cfg.task.class_names or [])
    return Classes(tuple(names), default_palette(len(names)), False)


def labels(cfg: DictConfig) -> dict[str, Any]:
    """Without data their ids are not known."""
    return {}


def _class_names(cfg: DictConfig, found: Sequence[str]) -> list[str]:
    """The classes in the order of the labels; the data's own where no file gives another order.

    Raises:
        UserError: the data have a class that the file has not, or another number than was typed.
    """
    path = _classes_file(cfg)
    names = list(found) if path is None else list(read_classes(path, None).names)
    unknown = [name for name in found if name not in names]
    if unknown:
        raise UserError(
            f"The data have the classes {shorten(unknown)}, which are not in {path}. Expected {shorten(names, 10)}. "
            "Correct the list of classes, or use task=detection for data of your own."
        )
    if cfg.task.num_classes not in (None, len(names)):
        raise UserError(
            f"task.num_classes={cfg.task.num_classes}, but there are {len(names)} classes: {shorten(names, 10)}. "
            "Leave task.num_classes out, or correct it."
        )
    return names


def _classes_file(cfg: DictConfig) -> Path | None:
    places = [Path(place, "classes.txt") for place in (cfg.task.folder, cfg.data.root) if place]
    return next((path for path in places if path.is_file()), None)


def _size(cfg: DictConfig) -> int | list[int]:
    size = cfg.data.image_size
    return size if isinstance(size, int) else list(size)


def _groups(samples: Sequence[DetectionSample]) -> list[list[int]]:
    """The classes of each image, for class-aware sampling."""
    return [[] if s.objects is None else sorted(set(s.objects.labels.tolist())) for s in samples]
