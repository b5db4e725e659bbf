"""The depth family: its data and its module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from dense_heads.build.config import module_arguments, plain
from dense_heads.build.data import Loaded, num_measured, read_samples, training_steps
from dense_heads.build.task_distillation import taught_by
from dense_heads.data.blind_depth import blind_depths, read_label
from dense_heads.data.classes import Classes
from dense_heads.data.depth import DepthDataset, collate_eval, collate_train
from dense_heads.data.depth_checks import check_depth
from dense_heads.data.depth_maps import DepthRule
from dense_heads.data.depth_transforms import DepthEvalTransform, DepthTrainPipeline
from dense_heads.errors import unknown_name
from dense_heads.metrics import depth as metrics
from dense_heads.models.card import Card
from dense_heads.models.dense import FrozenBackbone
from dense_heads.models.inference import Inference
from dense_heads.report.depth_panel import depth_panel
from dense_heads.report.predictions import DepthWriter
from dense_heads.training.base import Candidate
from dense_heads.training.depth import DepthModule
from dense_heads.training.task_distillation import TaughtDepth, Teacher


def load(cfg: DictConfig, check: bool) -> Loaded:
    """Images and depth maps of the task's splits."""
    reader, samples = read_samples(cfg)
    rule = DepthRule(cfg.data.depth_scale, **plain(cfg.task.data.depth))
    if check:
        check_depth(samples, rule, **plain(cfg.task.depth_range))
    train = None
    if samples["train"]:
        steps = DepthTrainPipeline(training_steps(cfg), list(cfg.data.image_size))
        train = DepthDataset(samples["train"], rule, steps, seed=cfg.seed)
    transform = DepthEvalTransform(**plain(cfg.task.transforms.eval))
    labelled_test = bool(samples["test"]) and all(sample.depth is not None for sample in samples["test"])
    return Loaded(
        train=train,
        val=DepthDataset(samples["val"], rule, transform, seed=cfg.seed) if samples["val"] else None,
        test=DepthDataset(samples["test"], rule, transform, seed=cfg.seed) if labelled_test else None,
        collate_train=collate_train,
        collate_eval=collate_eval,
        num_images={split: len(found) for split, found in samples.items()},
        notes=list(reader.notices),
        made_split=getattr(reader, "made_split", None),
        classes=classes(cfg),
    )


def module(
    cfg: DictConfig,
    loaded: Loaded,
    frozen: FrozenBackbone,
    candidates: Sequence[Candidate],
    teacher: Teacher | None = None,
) -> DepthModule:
    """The LightningModule; with a teacher, the one that is taught."""
    kind, taught = (DepthModule, {}) if teacher is None else (TaughtDepth, taught_by(cfg, teacher))
    return kind(
        frozen,
        candidates,
        **module_arguments(cfg),
        **taught,
        inference=Inference(**plain(cfg.task.inference)),
        evaluation=_evaluation(cfg),
    )


def num_outputs(cfg: DictConfig) -> int:
    """Depth alone; bins are an argument of the head."""
    return 1


def classes(cfg: DictConfig) -> Classes:
    """None."""
    return Classes((), np.zeros((0, 3), dtype=np.uint8), False)


def labels(cfg: DictConfig) -> dict[str, Any]:
    """There are no classes to number."""
    return {}


def pictures(loaded: Loaded) -> dict[str, Any]:
    """What the picture callback needs: how a prediction is drawn beside its label."""
    return {"panel": depth_panel, "label_key": "depth_m"}


def writer(cfg: DictConfig, output: Path, card: Card) -> DepthWriter:
    """Writes predictions as millimetres and coloured pictures; `output_also` asks for more.

    Raises:
        UserError: a form that there is not.
    """
    also = list(cfg.output_also)
    for form in also:
        if form not in ("npy", "ply"):
            raise unknown_name("form in output_also:", str(form), ["npy", "ply"])
    return DepthWriter(output, npy="npy" in also, ply="ply" in also, focal_px=cfg.focal_px)


def conventions(cfg: DictConfig) -> str:
    """How the metrics are counted."""
    return metrics.conventions(**_evaluation(cfg))


def blind(cfg: DictConfig, loaded: Loaded, stage: str) -> list[dict[str, Any]]:
    """Names and scores of depths that are predicted without looking at the image, on the images that were measured."""
    train, data = loaded.train, loaded.test if stage == "test" else loaded.val
    if train is None or data is None:
        return []
    assert isinstance(train, DepthDataset) and isinstance(data, DepthDataset)
    predictions = blind_depths(train, data, **plain(cfg.task.depth_range))
    # One process measures all images.
    measures = [metrics.DepthMetrics(**_evaluation(cfg), over_processes=False) for _ in predictions]
    for index in range(num_measured(cfg, stage, len(data))):
        label = read_label(data, index)
        for measure, prediction in zip(measures, predictions, strict=True):
            depth_m = prediction.at((label.shape[0], label.shape[1]))
            measure.update(torch.from_numpy(depth_m.copy()), torch.from_numpy(label.copy()))
    return [
        {"name": prediction.name, "metrics": {f"{stage}/{name}": value for name, value in scores.items()}}
        for prediction, scores in zip(predictions, (metrics.scores(m.compute()) for m in measures), strict=True)
    ]


def _evaluation(cfg: DictConfig) -> dict[str, Any]:
    return {**plain(cfg.task.depth_range), **plain(cfg.task.evaluation)}
