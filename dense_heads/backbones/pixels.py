"""The baseline without a network: raw pixels in the place of features."""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense_heads.backbones.base import Backbone, check_patch_fit
from dense_heads.backbones.zoo import BackboneSpec
from dense_heads.errors import UserError


class Pixels(Backbone):
    """Unfolded patches as tokens (D = C * 14 * 14) and their mean as cls token; no parameters.

    What a head scores on it is what the pixels of one patch tell without any backbone. Each of its blocks gives the
    same sequence, so heads on several blocks run on it too.
    """

    def __init__(self, spec: BackboneSpec, in_channels: int = 3, patch_fit: str = "crop") -> None:
        super().__init__()
        self.name, self.num_blocks, self.num_heads, self.num_registers = spec.name, spec.num_blocks, spec.num_heads, 0
        self.patch_size, self.in_channels, self.patch_fit = spec.patch_size, in_channels, check_patch_fit(patch_fit)
        self.embed_dim = in_channels * spec.patch_size**2
        self.norm = nn.Identity()

    def block_outputs(self, images: Tensor, blocks: Sequence[int], masks: Tensor | None = None) -> dict[int, Tensor]:
        """See `Backbone.block_outputs`; there is no mask token."""
        if masks is not None:
            raise UserError("Got masks; the pixels baseline has no mask token. Use a ViT where patches are masked.")
        images, _ = self.fit(images)
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        tokens = torch.cat((patches.mean(dim=1, keepdim=True), patches), dim=1)
        return {block: tokens for block in self.check_blocks(blocks)}

    def fingerprint(self) -> str:
        """A constant: there is nothing to learn."""
        return hashlib.sha256(f"pixels {self.in_channels} {self.patch_size}".encode()).hexdigest()[:16]
