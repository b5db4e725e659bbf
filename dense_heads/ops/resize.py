"""The one way maps and images are resized."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dense_heads.structures import Size


def resize(x: Tensor, size: Size) -> Tensor:
    """Bilinear resize with half-pixel centres (`align_corners=False`) and no antialiasing.

    This is what DINOv2's dense evaluations use everywhere: between feature levels, from the head's map to the image,
    from the image to the label. Antialiasing or aligned corners would give another model.

    Args:
        x: (B, C, H, W), float32, float64, float16 or bfloat16.
        size: (height, width) wanted.

    Returns:
        (B, C, *size); `x` itself where it has that size already.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False, antialias=False)


def resize_matrix(length: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(size, length): `resize` of one dimension as a matrix, at most two weights in a row; on the CPU.

    Bilinear resizing is separable: of both dimensions it is `rows @ x @ columns.T` for each channel.
    """
    return resize(torch.eye(length, dtype=dtype)[None, None], (size, length))[0, 0]
