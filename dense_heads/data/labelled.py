"""Images with one class each, as torchvision's ImageFolder lays them out: SPLIT/CLASS/image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dense_heads.data.images import UInt8, list_images, read_image
from dense_heads.errors import UserError
from dense_heads.structures import IMAGENET_MEAN, IMAGENET_STD, Batch


def class_names(folder: Path) -> list[str]:
    """The names of a split's class folders, sorted.

    Raises:
        UserError: no such folder, or no folders in it.
    """
    names = (
        sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []
    )
    if not names:
        raise UserError(f"{folder}: no folders of classes. Expected {folder}/CLASS/image.jpg for each class.")
    return names


def labelled_images(folder: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """(path, class) of every image below a split's folder.

    Raises:
        UserError: a class that `names` does not have, or no images.
    """
    unknown = [name for name in class_names(folder) if name not in names]
    if unknown:
        raise UserError(f"{folder} has classes that the training split does not have: {', '.join(unknown[:5])}.")
    found = [
        (path, index)
        for index, name in enumerate(names)
        if (folder / name).is_dir()
        for path in list_images(folder / name, recursive=True)
    ]
    if not found:
        raise UserError(f"{folder}: no images in its classes' folders.")
    return found


class LabelledImages(Dataset[dict[str, Any]]):
    """Asked by index: the image resized (bicubic, short side), cut at the centre, normalised; and its class."""

    def __init__(self, samples: Sequence[tuple[Path, int]], resize: int = 256, crop: int = 224) -> None:
        self.samples, self.resize, self.crop = list(samples), resize, crop

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, class_id = self.samples[index]
        return {"image": center_view(read_image(path), self.resize, self.crop), "class_id": class_id, "path": str(path)}


def collate_labelled(items: Sequence[dict[str, Any]]) -> Batch:
    """`image` (B, 3, H, W), `class_id` (B,), `path`."""
    return {
        "image": torch.stack([item["image"] for item in items]),
        "class_id": torch.tensor([item["class_id"] for item in items]),
        "path": [item["path"] for item in items],
    }


def center_view(image: UInt8, resize: int, crop: int) -> Tensor:
    """(H, W, 3) -> (3, crop, crop), as image-level protocols look at a picture (facts sheet 3.3)."""
    return normalised(center_picture(image, resize, crop))


def center_picture(image: UInt8, resize: int, crop: int) -> Any:
    """The same as a PIL image, before it is normalised."""
    picture = TF.resize(Image.fromarray(image), [resize], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(picture, [crop, crop])


def normalised(picture: Any) -> Tensor:
    """A PIL image -> (3, H, W), ImageNet-normalised."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    return (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
