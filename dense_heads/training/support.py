"""Training-free heads look at their support: labelled images, as they are looked at in evaluation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dense_heads.errors import UserError
from dense_heads.heads.training_free import TrainingFreeHead
from dense_heads.models.inference import Inference, crop, view_size
from dense_heads.structures import Levels, SeenView, View
from dense_heads.training.base import DenseModule


@torch.no_grad()
def observe(module: DenseModule, support: Dataset[Any], how: Inference) -> None:
    """Show each labelled image to every head, window by window, and conclude.

    Args:
        module: whose candidates are all training-free.
        support: items as evaluation has them, with `mask` at its own size.
        how: the windows; mirror images are left out.

    Raises:
        UserError: an image without a label of one class for each pixel, or what the heads say of their support.
    """
    for index in range(len(support)):  # type: ignore[arg-type]
        item = support[index]
        view: View = item["image"] if "image" in item else item["views"][0]
        if "class_id" in item:
            _show_whole(module, view, item["class_id"])
            continue
        mask = item.get("mask")
        if mask is None:
            raise UserError(f"{item['path']}: no label of one class for each pixel, which training-free heads need.")
        height, width = view_size(view)
        labels = F.interpolate(mask[None, None].float(), (height, width), mode="nearest-exact").long()[0]
        source = {"image_id": [item["image_id"]], "case_id": [item.get("case_id", item["image_id"])]}
        for number, (box, flip) in enumerate(how.windows((height, width))):
            if flip:
                continue
            levels = _levels(module, view, number, box)
            top, left, bottom, right = box
            seen = {"mask": labels[:, top:bottom, left:right].to(module.device), **source}
            for head, request in zip(module.heads, module.requests, strict=True):
                assert isinstance(head, TrainingFreeHead)
                head.observe(levels.features(request), seen)  # type: ignore[arg-type]
    for head in module.heads:
        assert isinstance(head, TrainingFreeHead)
        head.conclude()


def _show_whole(module: DenseModule, view: View, class_id: Tensor) -> None:
    """A whole image with one class."""
    levels = _levels(module, view, 0, (0, 0, *view_size(view)))
    for head, request in zip(module.heads, module.requests, strict=True):
        assert isinstance(head, TrainingFreeHead)
        head.observe(levels.features(request), {"class_id": class_id[None].to(module.device)})


def _levels(module: DenseModule, view: View, number: int, box: tuple[int, int, int, int]) -> Levels:
    if isinstance(view, SeenView):
        return view.windows[number].to(module.device).float()
    pixels: Tensor = crop(view, box, False)[None].to(module.device)
    levels: Levels = module.backbone(pixels, module.requests)
    return levels.float()
