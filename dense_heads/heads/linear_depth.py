"""The linear depth heads: a 1x1 convolution to depth bins, on one block or four."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.base import Head
from dense_heads.heads.depth_range import check_range
from dense_heads.ops.resize import resize
from dense_heads.structures import Features

BINS = ("uniform", "log")
NORMALISATIONS = ("linear", "softmax", "sigmoid")
_UPSAMPLING = 4


class LinearDepthHead(Head):
    """Patch maps and cls tokens -> logits of depth bins -> their mean, in metres.

    DINOv2's depth `BNHead` (eval/depth/models/decode_heads/linear_head.py), which despite its name has no batch norm:
    of each block the un-normed patch map with the cls token behind it in every place, up-sampled 4 times, all blocks
    concatenated, one 1x1 convolution. Depth = sum of share x bin. The parameters bear the official names,
    `conv_depth.*`; bins are not among them.

    Args:
        in_channels: width of each chosen block's map.
        num_outputs: 1; bins are an argument of their own.
        blocks: which blocks, by a name that `backbones/zoo.py` resolves; officially `last` and `even4`.
        norm: whether the backbone's final norm is applied; officially not.
        min_m: the nearest bin, in metres.
        max_m: the farthest bin, in metres.
        num_bins: how many bins, both ends included.
        bins: `uniform` or `log` (equal ratios from bin to bin).
        normalisation: how logits become shares: `linear` ((relu + 0.1) / sum, as published), `softmax` or `sigmoid`
            (divided by its sum).

    Raises:
        UserError: a range, number or name that makes no sense; `num_outputs` other than 1; `log` from 0 m on.
    """

    bin_depths: Tensor

    def __init__(
        self,
        in_channels: Sequence[int],
        num_outputs: int = 1,
        blocks: str = "last",
        norm: bool = False,
        min_m: float = 0.001,
        max_m: float = 10.0,
        num_bins: int = 256,
        bins: str = "uniform",
        normalisation: str = "linear",
    ) -> None:
        super().__init__(in_channels, num_outputs, blocks, norm)
        if num_outputs != 1:
            raise UserError(
                f"A linear depth head predicts one depth for each pixel; {num_outputs} outputs were asked of it. Use "
                "head=linear or head=dpt for this task."
            )
        if not isinstance(num_bins, int) or num_bins < 2:
            raise UserError(f"head.num_bins={num_bins!r}: expected a whole number, at least 2 (officially 256).")
        if bins not in BINS:
            raise unknown_name("head.bins", str(bins), BINS)
        if normalisation not in NORMALISATIONS:
            raise unknown_name("head.normalisation", str(normalisation), NORMALISATIONS)
        self.min_m, self.max_m = check_range(min_m, max_m)
        if bins == "log" and self.min_m == 0:
            raise UserError("head.bins=log has no bin at head.min_m=0: expected above 0, such as 0.001.")
        self.normalisation = normalisation
        self.conv_depth = nn.Conv2d(2 * sum(self.in_channels), num_bins, kernel_size=1)
        # Not persistent: the official files hold no bins, and the range is an argument, not a weight.
        self.register_buffer("bin_depths", self._bin_depths(bins, num_bins), persistent=False)

    def _bin_depths(self, bins: str, num_bins: int) -> Tensor:
        if bins == "uniform":
            return torch.linspace(self.min_m, self.max_m, num_bins)
        return torch.logspace(0, 1, num_bins, base=self.max_m / self.min_m) * self.min_m

    def forward(self, features: Features) -> Tensor:
        """(B, 1, 4h, 4w) metres within [min_m, max_m], float32; h x w is the grid of the first chosen block's map."""
        maps, cls_tokens = features.patch_maps, features.cls_tokens
        widths = tuple(map.shape[1] for map in maps)
        assert widths == self.in_channels, f"maps of width {widths} for a head made for {self.in_channels}"
        height, width = maps[0].shape[-2:]
        # The original concatenates, up-samples, then convolves. A 1x1 convolution commutes with a bilinear resize, and
        # a cls token adds the same in every place: at patch resolution it is 16 times less work and memory.
        weights = torch.split(self.conv_depth.weight, [2 * width for width in widths], dim=1)
        logits = self.conv_depth.bias[:, None, None]  # type: ignore[index]
        for map, cls, weight in zip(maps, cls_tokens, weights, strict=True):
            of_map, of_cls = weight.chunk(2, dim=1)
            logits = logits + F.conv2d(resize(map, (height, width)), of_map)
            logits = logits + F.linear(cls, of_cls.flatten(1))[:, :, None, None]
        logits = resize(logits.float(), (_UPSAMPLING * height, _UPSAMPLING * width))
        shares = self._shares(logits)
        # Divided after the sum, and no matrix product: autocast would turn that into half precision.
        bins = self.bin_depths.float()[:, None, None]
        depth = (shares * bins).sum(dim=1, keepdim=True) / shares.sum(dim=1, keepdim=True)
        return depth.clamp(self.min_m, self.max_m)

    def _shares(self, logits: Tensor) -> Tensor:
        """(B, bins, H, W) not negative; only their proportions count."""
        if self.normalisation == "linear":
            return logits.relu() + 0.1
        return logits.softmax(dim=1) if self.normalisation == "softmax" else logits.sigmoid()
