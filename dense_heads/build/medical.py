"""The medical family: volumes and images, split by patient, measured case by case."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dense_heads.build import otsu
from dense_heads.build.config import module_arguments, plain
from dense_heads.build.data import Loaded
from dense_heads.build.medical_data import classes, cut, has_volumes, label_rule, load, objects
from dense_heads.errors import UserError
from dense_heads.heads.training_free import TrainingFreeHead
from dense_heads.metrics.cases import Protocol
from dense_heads.metrics.medical import conventions as counted
from dense_heads.models.card import Card
from dense_heads.models.dense import FrozenBackbone
from dense_heads.models.inference import Inference
from dense_heads.models.medical import Refine
from dense_heads.report.case_pictures import CasePictures
from dense_heads.report.medical_predictions import ContourWriter, VolumeWriter
from dense_heads.report.predictions import Writer
from dense_heads.training.base import Candidate
from dense_heads.training.medical import MedicalModule

__all__ = ["classes", "load"]  # of the family's functions these two stand in `medical_data`


def module(cfg: DictConfig, loaded: Loaded, frozen: FrozenBackbone, candidates: Sequence[Candidate]) -> MedicalModule:
    """The LightningModule.

    Raises:
        UserError: heads without training and a watershed, whose borders no label on disk shows them.
    """
    separate = objects(cfg)
    free = any(isinstance(candidate.head, TrainingFreeHead) for candidate in candidates)
    if free and separate is not None and separate.num_outputs == 3:
        raise UserError(
            "A head without training learns no borders, which task.instances.method=watershed needs. Set "
            "task.instances.method=components."
        )
    return MedicalModule(
        frozen,
        candidates,
        **module_arguments(cfg),
        inference=Inference(**plain(cfg.task.inference)),
        class_names=loaded.classes.names,
        protocol=protocol(cfg),
        refine=_refine(cfg),
    )


def num_outputs(cfg: DictConfig) -> int:
    """One channel for each class; with objects one more for their borders."""
    separate = objects(cfg)
    return int(cfg.task.num_classes) if separate is None else separate.num_outputs


def pictures(loaded: Loaded) -> dict[str, Any]:
    """What the picture callback needs: the worst, the median and the best case, when the training ends."""
    datasets = {"val": loaded.val, "test": loaded.test}
    multilabel = bool(loaded.settings["multilabel"])
    return {"cases": CasePictures(datasets, loaded.collate_eval, loaded.classes, multilabel)}


def writer(cfg: DictConfig, output: Path, card: Card) -> Writer:
    """Writes predictions as label maps: NIfTI of volumes, PNG of images; and pictures with outlines."""
    images = ContourWriter(output, card, ids=cfg.output_ids)  # refuses ids that there are not
    return VolumeWriter(output, card, cut(cfg), ids=cfg.output_ids) if has_volumes(cfg) else images


def conventions(cfg: DictConfig) -> str:
    """How the metrics are counted."""
    how = protocol(cfg)
    return counted(how.unit, how.tolerance, how.objects is not None) + (otsu.RULE if otsu.applies(how) else "")


def threshold(cfg: DictConfig, loaded: Loaded, stage: str) -> dict[str, Any] | None:
    """What Otsu's thresholds score on the cases that were measured."""
    return otsu.measured(cfg, loaded, stage, protocol(cfg))


def labels(cfg: DictConfig) -> dict[str, Any]:
    """How raw label values become classes, as arguments of LabelRule."""
    return label_rule(cfg).settings()


def settings(cfg: DictConfig) -> dict[str, Any]:
    """What MedicalSegmentor needs beyond what all models do."""
    separate = objects(cfg)
    return {
        "multilabel": bool(cfg.task.multilabel),
        "cut": dataclasses.asdict(cut(cfg)) if has_volumes(cfg) else None,
        "refine": dataclasses.asdict(_refine(cfg)),
        "objects": None if separate is None else dataclasses.asdict(separate),
    }


def protocol(cfg: DictConfig) -> Protocol:
    """How cases are measured."""
    in_mm = has_volumes(cfg) or cfg.task.data.pixel_mm is not None
    return Protocol(
        num_classes=cfg.task.num_classes,
        multilabel=bool(cfg.task.multilabel),
        tolerance=cfg.task.evaluation.tolerance,
        unit="mm" if in_mm else "px",
        objects=objects(cfg),
        finish=functools.partial(_refine(cfg).labels, num_classes=num_outputs(cfg)),
    )


def _refine(cfg: DictConfig) -> Refine:
    return Refine(**plain(cfg.task.refine))
