"""Fitting an image to the patch grid of a backbone, and a map back to the image."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dense_heads.errors import UserError, unknown_name
from dense_heads.ops.resize import resize, resize_matrix
from dense_heads.structures import NO_PADDING, Padding, Size

POLICIES = ("pad", "pad_exact", "crop", "resize")


def fit_to_patch(images: Tensor, patch_size: int, policy: str) -> tuple[Tensor, Padding]:
    """Bring height and width to multiples of the patch size.

    `pad` and `pad_exact` add zeros (the mean colour of normalised images) up to the next multiple, the smaller half
    at the left and top, as DINOv2's CenterPadding (hub/utils.py). They differ later: under `pad` the head's map of the
    padded image is resized straight to the image, as in the original; under `pad_exact` see `unpad_map`.
    `crop` keeps the centre, `resize` goes bilinearly to the nearest multiple, at least one patch.

    Args:
        images: (B, C, H, W), normalised.
        patch_size: pixels of a patch's side.
        policy: one of `POLICIES`.

    Returns:
        (B, C, H', W') and the padding in pixels, all 0 under `crop` and `resize`. Images that fit already come back
        as they are.

    Raises:
        UserError: unknown policy; an image without pixels; under `crop` an image smaller than a patch.
    """
    assert patch_size >= 1, patch_size
    if policy not in POLICIES:
        raise unknown_name("patch-fit policy", policy, POLICIES)
    height, width = images.shape[-2:]
    if height == 0 or width == 0:
        raise UserError(f"Got an image of {height} x {width} pixels; at least 1 x 1 is expected. Remove or replace it.")
    if height % patch_size == 0 and width % patch_size == 0:
        return images, Padding()
    if policy == "resize":
        return resize(images, (_nearest(height, patch_size), _nearest(width, patch_size))), Padding()
    if policy == "crop":
        if min(height, width) < patch_size:
            raise UserError(
                f"Got an image of {height} x {width} pixels (height x width), smaller than one patch of {patch_size} x "
                f"{patch_size}: nothing would be left of it under the policy 'crop'. Use larger images, or the policy "
                "'pad' or 'resize'."
            )
        cropped_height, cropped_width = height // patch_size * patch_size, width // patch_size * patch_size
        top, left = (height - cropped_height) // 2, (width - cropped_width) // 2
        return images[..., top : top + cropped_height, left : left + cropped_width], Padding()
    extra_height, extra_width = -height % patch_size, -width % patch_size
    left, top = extra_width // 2, extra_height // 2
    padding = Padding(left=left, top=top, right=extra_width - left, bottom=extra_height - top)
    # F.pad wants left, right, top, bottom; Padding is ordered by corner.
    return F.pad(images, (padding.left, padding.right, padding.top, padding.bottom)), padding


def unpad_map(map: Tensor, padding: Padding, padded_size: Size, size: Size) -> Tensor:
    """Take the part of a padded image's map that covers the image itself (policy `pad_exact`).

    The map is resized to the padded image's pixels, then the padding is cut off, so that every pixel keeps its place.

    Args:
        map: (B, K, h, w) at any resolution, covering the padded image.
        padding: what `fit_to_patch` added.
        padded_size: (height, width) of the padded image.
        size: (height, width) of the image before padding.

    Returns:
        (B, K, *size).
    """
    height, width = size
    assert padded_size == (height + padding.top + padding.bottom, width + padding.left + padding.right), (
        f"padded size {padded_size} is not the size {size} plus {padding}"
    )
    full = resize(map, padded_size)
    return full[..., padding.top : padding.top + height, padding.left : padding.left + width]


class Placement(NamedTuple):
    """How a map that covers a fitted image, at any resolution, comes to lie on the image's own pixels."""

    size: Size  # (height, width) of the image
    padding: Padding = NO_PADDING  # cut off after resizing; none where the map is resized straight to the image

    @property
    def padded_size(self) -> Size:
        """What the map is resized to before the padding is cut off."""
        (height, width), padding = self.size, self.padding
        return height + padding.top + padding.bottom, width + padding.left + padding.right

    def enlarge(self, map: Tensor) -> Tensor:
        """(B, K, h, w) -> (B, K, *size)."""
        return unpad_map(map, self.padding, self.padded_size, self.size)

    def matrices(self, resolution: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`enlarge` of a map of (h, w) as products with matrices (H, h) and (W, w); on the CPU."""
        (height, width), padded, padding = self.size, self.padded_size, self.padding
        rows = resize_matrix(resolution[0], padded[0], dtype)[padding.top : padding.top + height]
        columns = resize_matrix(resolution[1], padded[1], dtype)[padding.left : padding.left + width]
        return rows, columns


def _nearest(length: int, patch_size: int) -> int:
    return max(1, int(length / patch_size + 0.5)) * patch_size
