"""The linear heads: what DINOv2 measures frozen features with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.ops.batch_norm import BatchNorm2d
from dense_heads.ops.resize import resize
from dense_heads.structures import Features


class LinearHead(Head):
    """Batch norm and a 1x1 convolution on the concatenated patch maps.

    DINOv2's segmentation `BNHead` (eval/segmentation/models/decode_heads/linear_head.py): `linear` on the last block,
    `ms` on the last four. The parameters bear the official names, `bn.*` and `conv_seg.*`. cls tokens are not used.

    Args:
        in_channels: width of each chosen block's map.
        num_outputs: channels of the prediction.
        blocks: which blocks, by a name that `backbones/zoo.py` resolves.
        norm: whether the backbone's final norm is applied.
        dropout: share of channels dropped in training, between norm and convolution; officially 0.
        init_std: standard deviation of the convolution's initial weights; its bias starts at 0.

    Raises:
        UserError: `dropout` outside [0, 1), `init_std` below 0.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_outputs: int,
        blocks: str = "last",
        norm: bool = True,
        dropout: float = 0.0,
        init_std: float = 0.01,
    ) -> None:
        super().__init__(in_channels, num_outputs, blocks, norm)
        if not 0 <= dropout < 1:
            raise UserError(f"head.dropout={dropout!r}: expected a share from 0 to below 1.")
        if not init_std >= 0:
            raise UserError(f"head.init_std={init_std!r}: expected a number, 0 or above (officially 0.01).")
        channels = sum(self.in_channels)
        self.bn = BatchNorm2d(channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_outputs, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=init_std)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def forward(self, features: Features) -> Tensor:
        """(B, num_outputs, h, w) at the resolution of the first chosen block's map."""
        maps = features.patch_maps
        widths = tuple(map.shape[1] for map in maps)
        assert widths == self.in_channels, f"maps of width {widths} for a head made for {self.in_channels}"
        height, width = maps[0].shape[-2:]
        # One ViT's blocks share one grid; a backbone with a pyramid would not.
        levels = [resize(map, (height, width)) for map in maps]
        x: Tensor = self.dropout(self.bn(torch.cat(levels, dim=1)))
        logits: Tensor = self.conv_seg(x)
        return logits
