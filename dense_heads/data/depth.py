"""Images and depth maps as training and evaluation samples, and as batches."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dense_heads.data import segmentation
from dense_heads.data.datasets.base import Sample
from dense_heads.data.depth_maps import DepthRule
from dense_heads.data.depth_transforms import DepthEvalTransform, DepthTrainPipeline, Window, cut
from dense_heads.data.images import open_image, orientation, read_image
from dense_heads.errors import UserError
from dense_heads.ops.seeding import stable_seed
from dense_heads.structures import Batch, Size


class DepthItem(segmentation.SegmentationItem, total=False):
    """One sample; the keys mean what they mean in `Batch`, without its first dimension."""

    depth_m: Tensor  # (H, W) float32 metres, 0 = no measurement; in evaluation at the label's own size
    intrinsics: Tensor  # (3, 3) for the pixels of `depth_m`; in evaluation, where the focal length is known


class DepthDataset(Dataset[DepthItem]):
    """Samples on disk as tensors.

    With a `DepthTrainPipeline`, items are asked for by (epoch, index), and every random choice is a function of (seed,
    epoch, index): not of the worker, nor of what was asked for before. With a `DepthEvalTransform` the index alone
    does, and depth stays at its own size, after the evaluation's crop where there is one.

    Raises:
        UserError: from `[...]`: a file that cannot be read, image and depth of different sizes; always with the path.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        rule: DepthRule,
        transform: DepthTrainPipeline | DepthEvalTransform,
        seed: int = 0,
    ) -> None:
        self.samples = list(samples)
        self.rule = rule
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: segmentation.Key) -> DepthItem:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        sample = self.samples[index]
        image = read_image(sample.image)
        depth_m = None if sample.depth is None else self.rule.read(sample.depth)
        size: Size = (image.shape[0], image.shape[1])
        if depth_m is not None and depth_m.shape != size:
            raise size_mismatch(sample, size, depth_m.shape)
        item: DepthItem = {"image_id": sample.image_id, "path": str(sample.image), "original_size": size}
        target: Tensor | None
        try:
            if isinstance(self.transform, DepthTrainPipeline):
                self.transform.set_random_seed(stable_seed("augment", self.seed, epoch, index))
                item["image"], target = self.transform(image, depth_m)
            else:
                window = self.transform.window(size)
                views = self.transform(cut(image, window))
                if len(views) == 1:
                    item["image"] = views[0]
                else:
                    item["views"] = views
                target = None if depth_m is None else torch.from_numpy(cut(depth_m, window).copy())
                if sample.focal is not None:
                    item["intrinsics"] = _intrinsics(sample.focal, size, window)
        except UserError as error:
            raise UserError(f"{sample.image}: {error}") from error
        first = item["image"] if "image" in item else views[0]
        item["size"] = (first.shape[1], first.shape[2])
        if target is not None:
            item["depth_m"] = target
        return item


def size_mismatch(sample: Sample, image_size: Sequence[int], depth_size: Sequence[int]) -> UserError:
    """The error for an image and a depth map of different sizes, with both."""
    with open_image(sample.image) as image:
        turned = " The image carries an EXIF rotation, which is applied." if orientation(image) >= 5 else ""
    return UserError(
        f"{sample.image} is {image_size[0]} x {image_size[1]} (H x W) and its depth {sample.depth} is {depth_size[0]} "
        f"x {depth_size[1]}; expected equal sizes.{turned} Bring the depth into the image's view and size, or remove "
        "the pair."
    )


def collate_train(items: Sequence[DepthItem]) -> Batch:
    """Samples of one size -> `Batch` with stacked tensors."""
    batch = segmentation.collate_train(items)
    if "depth_m" in items[0]:
        batch["depth_m"] = torch.stack([item["depth_m"] for item in items])
    return batch


def collate_eval(items: Sequence[DepthItem]) -> Batch:
    """Samples of any sizes -> `Batch` with lists; `intrinsics` are stacked where all images have them."""
    batch = segmentation.collate_eval(items)
    if "depth_m" in items[0]:
        batch["depth_m"] = [item["depth_m"] for item in items]
    if all("intrinsics" in item for item in items):
        batch["intrinsics"] = torch.stack([item["intrinsics"] for item in items])
    return batch


def _intrinsics(focal: float, size: Size, window: Window) -> Tensor:
    """(3, 3) of a camera whose axis goes through the middle of the image on disk, for the pixels of a window of it."""
    top, left, _, _ = window
    centre_x, centre_y = (size[1] - 1) / 2 - left, (size[0] - 1) / 2 - top
    return torch.tensor([[focal, 0, centre_x], [0, focal, centre_y], [0, 0, 1]], dtype=torch.float32)
