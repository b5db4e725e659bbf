"""Hand-made descriptions of image patches: what masked feature prediction learns to predict.

Gradient histograms as in MaskFeat (arXiv 2112.09133) after HOG (Dalal and Triggs 2005), with colour, contrast and
position, each over the patch and over windows around it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 9  # unsigned directions
GREY = (0.299, 0.587, 0.114)
WINDOWS = (1, 3, 5)  # patches
GIST_SIDE = 4
PATCH_DIM = (4 * BINS + 12) + len(WINDOWS) * (BINS + 3) + (len(WINDOWS) - 1) * (BINS + 3) + 12
IMAGE_DIM = GIST_SIDE**2 * (BINS + 4)


def gradient_histograms(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, BINS, H, W): each pixel's gradient magnitude, shared by its two nearest directions."""
    grey = (images * images.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    magnitude = (across**2 + down**2).sqrt()
    direction = torch.atan2(down, across).remainder(math.pi) / math.pi * BINS
    # A triangle around each bin's centre: sums of scattered shares would be slow where they must be deterministic.
    bins = torch.arange(BINS, device=images.device, dtype=images.dtype).view(1, -1, 1, 1)
    distance = (direction - bins).abs()
    return magnitude * (1 - torch.minimum(distance, BINS - distance)).clamp(min=0)


@torch.no_grad()
def describe(images: Tensor, patch_size: int = 14) -> tuple[Tensor, Tensor]:
    """Descriptions of each patch (B, N, PATCH_DIM) and of each whole image (B, IMAGE_DIM).

    Args:
        images: (B, 3, H, W), ImageNet-normalised, H and W multiples of an even patch size.
        patch_size: pixels.

    The patch part holds histograms and colours of its four quarters; contrast and log histograms in windows of 1, 3
    and 5 patches; normed histograms and colours in windows of 3 and 5; sines and cosines of its place. The image part
    holds log histograms, colours and edge strength on a 4 x 4 grid. None is scaled yet: see `standardised`.
    """
    images = images.float()
    pixels = images * 0.226  # about the 0..1 scale, where the small constants below are meant
    gradients = gradient_histograms(pixels)
    each, colours, squares = (F.avg_pool2d(x, patch_size) for x in (gradients, images, images**2))
    half = patch_size // 2
    parts = [
        _normed(F.pixel_unshuffle(F.avg_pool2d(gradients, half), 2)),
        F.pixel_unshuffle(F.avg_pool2d(images, half), 2),
    ]
    for window in WINDOWS:
        parts.append((_around(each, window) + 0.01).log())
        parts.append((_around(squares, window) - _around(colours, window) ** 2).clamp(min=0).sqrt())
    for window in WINDOWS[1:]:
        parts += [_normed(_around(each, window)), _around(colours, window)]
    parts.append(_places(each.shape[2], each.shape[3], images).expand(len(images), -1, -1, -1))
    patches = torch.cat(parts, dim=1).flatten(2).transpose(1, 2)
    grid = [(each + 0.0, True), (colours, False), (each.mean(1, keepdim=True), False)]
    image = [F.adaptive_avg_pool2d(x, GIST_SIDE) for x, _ in grid]
    image[0] = (image[0] + 0.01).log()
    return patches, torch.cat(image, dim=1).flatten(1)


def standardised(values: Tensor, sums: Tensor) -> Tensor:
    """(..., D) less its mean and divided by its deviation, from the `moments` of all processes together."""
    mean, squares = (sums[1:] / sums[0]).view(2, -1)
    deviation = (squares - mean**2).clamp(min=0).sqrt() + 1e-3
    standard: Tensor = (values - mean.to(values.dtype)) / deviation.to(values.dtype)
    return standard


def moments(values: Tensor) -> Tensor:
    """Count, sums and sums of squares over all but the last dimension, (1 + 2 D), to be added up over processes.

    In float64: a variance is a small difference of large sums, and must not depend on how the batch was shared out.
    """
    flat = values.flatten(0, -2).double()
    return torch.cat((flat.new_tensor([len(flat)]), flat.sum(0), (flat**2).sum(0)))


def _around(values: Tensor, window: int) -> Tensor:
    """The mean over `window` x `window` patches around each."""
    if window == 1:
        return values
    return F.avg_pool2d(F.pad(values, (window // 2,) * 4, mode="replicate"), window, stride=1)


def _normed(histograms: Tensor) -> Tensor:
    normed: Tensor = histograms / (histograms.norm(dim=1, keepdim=True) + 0.05)
    return normed


def _places(rows: int, columns: int, like: Tensor) -> Tensor:
    """Sines and cosines of the patches' places, (1, 12, rows, columns)."""
    down, across = torch.meshgrid(
        *(torch.linspace(-1, 1, n, device=like.device) for n in (rows, columns)), indexing="ij"
    )
    waves = [
        wave(math.pi / 2 * k * place) for place in (down, across) for k in (1, 2, 4) for wave in (torch.sin, torch.cos)
    ]
    return torch.stack(waves).unsqueeze(0)
