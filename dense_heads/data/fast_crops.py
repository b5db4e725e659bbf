"""The same draws as `crops.py`, applied to a whole batch at once: for small models on few cores.

Resizing goes through OpenCV; colour becomes one linear map for each crop (hue as a rotation in YIQ), so the pixels
are close to, but not those of, the published recipe.
"""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dense_heads.data.crops import BLUR_KERNEL, SOLARIZE_THRESHOLD, CropDraw
from dense_heads.data.images import UInt8
from dense_heads.structures import IMAGENET_MEAN, IMAGENET_STD

_GREY = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_GREY, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)


def cut_batch(images: Sequence[UInt8], draws: Sequence[CropDraw], size: int) -> Tensor:
    """Images (H, W, 3) with one draw each -> (B, 3, size, size), ImageNet-normalised."""
    crops = np.empty((len(images), size, size, 3), np.uint8)
    maps = np.empty((len(images), 3, 4), np.float32)
    for place, (image, draw) in enumerate(zip(images, draws, strict=True)):
        top, left, height, width = draw.box
        part = image[top : top + height, left : left + width]
        shrinks = max(height, width) > size
        part = cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        crops[place] = part[:, ::-1] if draw.flip else part
        maps[place] = _colour_map(draw, part.reshape(-1, 3).mean(0))
    pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float().flatten(2)
    matrix = torch.from_numpy(maps)
    mapped = torch.baddbmm(matrix[:, :, 3:].expand(-1, -1, size * size), matrix[:, :, :3], pixels).clamp_(0, 255)
    mapped = mapped.view(-1, 3, size, size)
    for place, draw in enumerate(draws):
        if draw.blur_sigma is not None:
            mapped[place] = _blurred(mapped[place], draw.blur_sigma)
        if draw.solarize:
            mapped[place] = torch.where(mapped[place] >= SOLARIZE_THRESHOLD, 255 - mapped[place], mapped[place])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mapped.sub_(mean).div_(std)


def _colour_map(draw: CropDraw, mean: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(3, 4): the draw's colour steps as one matrix and an offset, clipped once at the end rather than at each."""
    total, offset = np.eye(3), np.zeros(3)
    steps = [*draw.jitter, *([("saturation", 0.0)] if draw.grey else [])]
    for name, factor in steps:
        step, shift = np.eye(3), np.zeros(3)
        if name == "brightness":
            step = factor * step
        elif name == "contrast":
            step, shift = factor * step, np.full(3, (1 - factor) * (_GREY @ (total @ mean + offset)))
        elif name == "saturation":
            step = factor * step + (1 - factor) * np.tile(_GREY, (3, 1))
        else:
            turn = -2 * math.pi * factor  # hue grows from red to yellow
            rotation = np.eye(3)
            rotation[1:, 1:] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
            step = _RGB @ rotation @ _YIQ
        total, offset = step @ total, step @ offset + shift
    return np.concatenate((total, offset[:, None]), axis=1)


def _blurred(pixels: Tensor, sigma: float) -> Tensor:
    taps = torch.arange(BLUR_KERNEL).sub(BLUR_KERNEL // 2).div(sigma).square().mul(-0.5).exp()
    taps = (taps / taps.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    reach = BLUR_KERNEL // 2
    rows = F.conv2d(F.pad(pixels[None], (reach, reach, 0, 0), mode="reflect"), taps, groups=3)
    columns = F.conv2d(F.pad(rows, (0, 0, reach, reach), mode="reflect"), taps.transpose(2, 3), groups=3)
    return columns[0]
