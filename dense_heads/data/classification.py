"""Whole images with one class, as training and evaluation samples, and as batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from dense_heads.data.checks import refuse, sample_problems, spread
from dense_heads.data.datasets.base import shorten
from dense_heads.data.datasets.class_folders import ClassSample
from dense_heads.data.images import image_size, read_image
from dense_heads.data.transforms import EvalTransform, TrainPipeline
from dense_heads.errors import UserError
from dense_heads.ops.seeding import stable_seed
from dense_heads.structures import Batch, Levels

MAX_HEADERS = 2000  # files of a split that are looked at before training


class ClassificationDataset(Dataset[dict[str, Any]]):
    """Samples on disk as tensors: `image` or, of several test views, `views`; and `class_id`.

    With a `TrainPipeline`, items are asked for by (epoch, index), and every random choice is a function of (seed,
    epoch, index); with an `EvalTransform` by index.
    """

    def __init__(
        self,
        samples: Sequence[ClassSample],
        names: Sequence[str],
        transform: TrainPipeline | EvalTransform,
        seed: int = 0,
    ) -> None:
        """`names`: of the classes, in the order of their ids."""
        self.samples, self.transform, self.seed = list(samples), transform, seed
        self.place = {name: index for index, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        sample = self.samples[index]
        pixels = read_image(sample.image)
        if isinstance(self.transform, TrainPipeline):
            self.transform.set_random_seed(stable_seed("augment", self.seed, epoch, index))
            image, _ = self.transform(pixels)
        else:
            (image,) = self.transform(pixels)
        return {
            "image": image,
            "class_id": torch.tensor(self.place[sample.label]),
            "image_id": sample.image_id,
            "path": str(sample.image),
            "original_size": (int(pixels.shape[0]), int(pixels.shape[1])),
        }


def check_classification(splits: Mapping[str, Sequence[ClassSample]], names: Sequence[str]) -> None:
    """Refuse a data set in which something is wrong; all that is found goes into one message.

    Raises:
        UserError: classes that `names` does not have, one class only, images that cannot be read, a file in two splits.
    """
    problems = list(sample_problems(splits))  # type: ignore[arg-type]
    if len(names) < 2:
        problems.append(
            f"one class only ({shorten(names)}); expected at least two, else there is nothing to tell apart"
        )
    for split, samples in splits.items():
        if unknown := sorted({sample.label for sample in samples} - set(names)):
            problems.append(f"{split} has unknown classes: {shorten(unknown)}; expected {shorten(names, 8)}")
        for sample in spread(samples, MAX_HEADERS):
            try:
                image_size(sample.image)
            except UserError as error:
                problems.append(str(error))
    refuse(problems)


def collate_train(items: Sequence[dict[str, Any]]) -> Batch:
    """Samples of one size -> `Batch` with stacked tensors, of cached features or images."""
    batch = _common(items)
    if "features" in items[0]:
        batch["features"] = Levels.cat([item["features"] for item in items])
    else:
        batch["image"] = torch.stack([item["image"] for item in items])
    return batch


def collate_eval(items: Sequence[dict[str, Any]]) -> Batch:
    """Samples -> `Batch` with a list of views for each image."""
    batch = _common(items)
    batch["views"] = [list(item["views"]) if "views" in item else [item["image"]] for item in items]
    return batch


def _common(items: Sequence[dict[str, Any]]) -> Batch:
    return {
        "class_id": torch.stack([item["class_id"] for item in items]),
        "image_id": [item["image_id"] for item in items],
        "path": [item["path"] for item in items],
        "original_size": torch.tensor([item["original_size"] for item in items]),
    }
