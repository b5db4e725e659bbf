"""Images without labels, as test views."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset

from dense_heads.data.images import read_image
from dense_heads.errors import UserError


@dataclass(frozen=True)
class ImageFile:
    """An image on disk and what it is called."""

    image_id: str
    image: Path


class UnlabelledImages(Dataset[dict[str, Any]]):
    """Items with `image_id`, `path`, `original_size` and `views`; of a file that cannot be read no views but `error`.

    Args:
        samples: the files.
        transform: (H, W, 3) uint8 -> normalised views, each (3, h, w).
    """

    def __init__(
        self, samples: Sequence[ImageFile], transform: Callable[[npt.NDArray[np.uint8]], list[Tensor]]
    ) -> None:
        self.samples, self.transform = list(samples), transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        item: dict[str, Any] = {"image_id": sample.image_id, "path": str(sample.image)}
        try:
            pixels = read_image(sample.image)
            return {**item, "original_size": pixels.shape[:2], "views": self.transform(pixels)}
        except UserError as error:
            return {**item, "error": str(error), "views": []}
