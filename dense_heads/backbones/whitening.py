"""A start for backbones that learn from few images in few steps: inputs of equal weight in place of random filters.

With random filters nearly all of a token says how bright its patch is, and positions are a hundredth of it; a short
training sees little else. Here the patch embedding is the whitened principal components of patches (as in Coates and
Ng, 2012, "Learning feature representations with k-means", section 2), and positions are sines and cosines.
"""

import math

import torch
from torch import Tensor, nn

from dense_heads.backbones.vit import VisionTransformer
from dense_heads.ops.seeding import stable_seed

SOFTNESS = 0.3  # of the mean variance of what is kept: components far below are noise, and stay small
POSITION_STD = 0.5  # beside contents of deviation 1


@torch.no_grad()
def start_whitened(backbone: VisionTransformer, patches: Tensor, seed: int) -> None:
    """Set patch embedding, positions and the scale of the linear layers, in place; random numbers from `seed` alone.

    Args:
        backbone: freshly initialised; its width at most the pixels of a patch, and a multiple of 4.
        patches: (N, 3 * P * P), ImageNet-normalised, channel by channel: see `data/unlabelled.py`.
        seed: of the rotations and the linear layers.
    """
    generator = torch.Generator().manual_seed(stable_seed("whitened", seed))
    width = backbone.embed_dim
    mean, filters = _whitening(patches.double(), width)
    filters = _rotation(width, generator) @ filters  # no token channel is a component by itself
    projection = backbone.patch_embed.proj
    projection.weight.copy_(filters.view_as(projection.weight))
    assert projection.bias is not None
    projection.bias.copy_(-(filters @ mean))
    backbone.pos_embed[:, 1:] = _positions(backbone.grid_size, width) @ _rotation(width, generator).float()
    for layer in backbone.blocks.modules():
        if isinstance(layer, nn.Linear):  # the published 0.02 is meant for widths of 1024
            nn.init.trunc_normal_(layer.weight, std=math.sqrt(0.5 / width), generator=generator)


def _whitening(patches: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The mean (C,) and the filters (width, C) that give the leading components about unit variance."""
    variances, axes = torch.linalg.eigh(torch.cov(patches.T))  # ascending
    variances, axes = variances[-width:].clamp(min=0), axes[:, -width:]
    return patches.mean(0), (axes / (variances + SOFTNESS * variances.mean()).sqrt()).T


def _positions(side: int, width: int) -> Tensor:
    """(side * side, width): sines and cosines of rows and columns, of mean 0 and deviation POSITION_STD."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    places = torch.arange(side) * 16 / side  # as on the 16 x 16 grid of a crop of 224 pixels
    down, across = (grid.flatten().unsqueeze(1) * frequencies for grid in torch.meshgrid(places, places, indexing="ij"))
    waves = torch.cat([wave(place) for place in (down, across) for wave in (torch.sin, torch.cos)], dim=1)
    waves = waves - waves.mean(0)
    scaled: Tensor = waves * (POSITION_STD / waves.std())
    return scaled


def _rotation(width: int, generator: torch.Generator) -> Tensor:
    rotation: Tensor = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return rotation
