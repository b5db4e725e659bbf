"""The baselines without a network: raw pixels, the place in the image, or both, in the place of features."""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense_heads.backbones.base import Backbone, check_patch_fit
from dense_heads.backbones.zoo import BackboneSpec
from dense_heads.errors import UserError

WITHOUT_NETWORK = ("pixels", "position", "pixels_position")
POSITION_DIM = 64
# Waves over a side, as powers of 2 of half a wave: from a quarter to two. Faster ones are alike in all patches of some
# grid (16 waves on 16 patches), and a batch normalisation that learned there blows them up on any other.
OCTAVES = (-1, 2)


def sine_position(rows: int, columns: int) -> Tensor:
    """(1, rows * columns, POSITION_DIM): sines and cosines of the place of each patch, 0..1 over the image's sides."""
    frequencies = torch.pi * 2.0 ** torch.linspace(*OCTAVES, POSITION_DIM // 4)
    vertical = (torch.arange(rows) + 0.5)[:, None] / rows * frequencies  # rows, D/4
    horizontal = (torch.arange(columns) + 0.5)[:, None] / columns * frequencies
    grid = torch.cat((vertical[:, None].expand(-1, columns, -1), horizontal[None].expand(rows, -1, -1)), dim=2)
    return torch.cat((grid.sin(), grid.cos()), dim=2).reshape(1, rows * columns, POSITION_DIM)


class Pixels(Backbone):
    """Patches as tokens and their mean as cls token; no parameters.

    `pixels`: the unfolded patch (C * 14 * 14). `position`: sines and cosines of the patch's place. What a head scores
    on them is what one patch's pixels, or its place alone, tell without any backbone. Each of its blocks gives the same
    sequence, so heads on several blocks run on it too.
    """

    def __init__(self, spec: BackboneSpec, in_channels: int = 3, patch_fit: str = "crop") -> None:
        super().__init__()
        self.name, self.num_blocks, self.num_heads, self.num_registers = spec.name, spec.num_blocks, spec.num_heads, 0
        self.patch_size, self.in_channels, self.patch_fit = spec.patch_size, in_channels, check_patch_fit(patch_fit)
        self.parts = spec.name.split("_")  # pixels | position | pixels_position
        self.embed_dim = in_channels * spec.patch_size**2 * ("pixels" in self.parts) + POSITION_DIM * (
            "position" in self.parts
        )
        self.norm = nn.Identity()

    def block_outputs(self, images: Tensor, blocks: Sequence[int], masks: Tensor | None = None) -> dict[int, Tensor]:
        """See `Backbone.block_outputs`; there is no mask token."""
        if masks is not None:
            raise UserError("Got masks; the pixels baseline has no mask token. Use a ViT where patches are masked.")
        images, _ = self.fit(images)
        features = []
        if "pixels" in self.parts:
            features.append(F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2))
        if "position" in self.parts:
            rows, columns = (side // self.patch_size for side in images.shape[-2:])
            features.append(sine_position(rows, columns).to(images).expand(len(images), -1, -1))
        patches = torch.cat(features, dim=2)
        tokens = torch.cat((patches.mean(dim=1, keepdim=True), patches), dim=1)
        return {block: tokens for block in self.check_blocks(blocks)}

    def fingerprint(self) -> str:
        """A constant: there is nothing to learn."""
        return hashlib.sha256(f"{self.name} {self.in_channels} {self.patch_size} {OCTAVES}".encode()).hexdigest()[:16]
