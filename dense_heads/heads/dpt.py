"""DPT: four blocks of a ViT, reassembled into a pyramid and fused from coarse to fine."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.base import Head
from dense_heads.heads.depth_range import check_range
from dense_heads.ops.batch_norm import BatchNorm2d
from dense_heads.ops.resize import resize
from dense_heads.structures import Features

READOUTS = ("project", "ignore", "add")
_NUM_LEVELS = 4


class DPTHead(Head):
    """Dense prediction transformer head, for depth in metres or for any number of output channels.

    "Vision Transformers for Dense Prediction" (arXiv 2103.13413) as DINOv2 has it (eval/depth/models/decode_heads/
    dpt_head.py): un-normed blocks with their cls tokens, no normalisation layers. The parameters bear the official
    names. Any grid of patches will do, odd ones too.

    With a range the output is one channel of metres: relu + min_m, in evaluation also cut at max_m. In training it is
    not cut, as in the original: a pixel that is too far would have no gradient to come back by. For the same reason a
    new head starts at a quarter of the range; with the original's own initialisation about half of all seeds start
    with the last relu shut everywhere, and never learn.

    Args:
        in_channels: width of each of the four chosen blocks' maps.
        num_outputs: channels of the prediction; 1 with a range.
        blocks: which blocks, by a name that `backbones/zoo.py` resolves to four.
        norm: whether the backbone's final norm is applied; officially not.
        min_m: nearest depth in metres; None, like `max_m`: raw outputs, such as logits.
        max_m: farthest depth in metres.
        channels: width of the fusion.
        post_channels: width of each level after reassembling; None: D/8, D/4, D/2, D.
        head_channels: width before the last convolution.
        batch_norm: batch normalisation behind each convolution of the residual units; officially none.
        readout: what becomes of the cls token: `project` (concatenated to each patch, linear layer, GELU; official),
            `add`, or `ignore`.
        deep_supervision: in training the maps before the last fusion predict too, each through a 1x1 convolution of its
            own; their losses count with this weight, halved at each coarser level. 0: none, as officially.

    Raises:
        UserError: not four blocks; a range, number or name that makes no sense; a range with several outputs.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_outputs: int = 1,
        blocks: str = "even4",
        norm: bool = False,
        min_m: float | None = None,
        max_m: float | None = None,
        channels: int = 256,
        post_channels: Sequence[int] | None = None,
        head_channels: int = 32,
        batch_norm: bool = False,
        readout: str = "project",
        deep_supervision: float = 0.0,
    ) -> None:
        super().__init__(in_channels, num_outputs, blocks, norm)
        if len(self.in_channels) != _NUM_LEVELS:
            raise UserError(
                f"head.blocks={blocks} gives {len(self.in_channels)} block(s); DPT needs {_NUM_LEVELS}: even4 or last4."
            )
        if readout not in READOUTS:
            raise unknown_name("head.readout", str(readout), READOUTS)
        self.range_m = _checked_range(min_m, max_m, num_outputs)
        if post_channels is None:
            post_channels = [width // divisor for width, divisor in zip(self.in_channels, (8, 4, 2, 1), strict=True)]
        widths = tuple(post_channels)
        if len(widths) != _NUM_LEVELS or not all(_whole(width) for width in widths):
            raise UserError(f"head.post_channels={list(widths)}: expected {_NUM_LEVELS} whole numbers, at least 1.")
        if not (_whole(channels) and channels >= 2 and _whole(head_channels)):
            raise UserError(
                f"head.channels={channels!r}, head.head_channels={head_channels!r}: expected whole numbers, at least "
                "2 and 1 (officially 256 and 32)."
            )
        if not (_is_weight(deep_supervision) and (deep_supervision == 0 or self.range_m is None)):
            raise UserError(
                f"head.deep_supervision={deep_supervision!r}: expected a number from 0 on, and 0 where the head "
                "predicts depth."
            )
        self.deep_supervision = float(deep_supervision)
        if self.deep_supervision > 0:  # officially there are none: no such keys in released files
            self.deep = nn.ModuleList(nn.Conv2d(channels, num_outputs, 1) for _ in range(_NUM_LEVELS - 1))
        self.reassemble_blocks = _Reassemble(self.in_channels, widths, readout)
        self.convs = nn.ModuleList(_Conv(width, channels, 3, bias=False) for width in widths)
        self.fusion_blocks = nn.ModuleList(_Fusion(channels, level > 0, batch_norm) for level in range(_NUM_LEVELS))
        self.project = _Conv(channels, channels, 3)
        self.conv_depth = _Output(channels, head_channels, num_outputs)
        if self.range_m is not None:
            low, high = self.range_m
            nn.init.constant_(self.conv_depth.last.bias, (high - low) / 4)  # type: ignore[arg-type]

    def forward(self, features: Features) -> Tensor:
        """(B, num_outputs, H', W'), H' = 32 x ceil(h / 2): metres, float32, with a range; else raw outputs."""
        widths = tuple(map.shape[1] for map in features.patch_maps)
        assert widths == self.in_channels, f"maps of width {widths} for a head made for {self.in_channels}"
        levels = self.reassemble_blocks(features.patch_maps, features.cls_tokens)
        levels = [conv(level) for conv, level in zip(self.convs, levels, strict=True)]
        fused: Tensor | None = None
        coarser: list[Tensor] = []  # what the fusions before the last one gave
        for fusion, level in zip(self.fusion_blocks, reversed(levels), strict=True):  # the deepest block first
            if fused is not None:
                coarser.append(fused)
            fused = fusion(level, fused)
        self.auxiliary = self._deep_maps(coarser) if self.training else ()
        output: Tensor = self.conv_depth(self.project(fused).relu())
        if self.range_m is None:
            return output
        low, high = self.range_m
        depth = output.relu() + low
        return depth if self.training else depth.clamp(max=high)

    def _deep_maps(self, coarser: Sequence[Tensor]) -> list[tuple[float, Tensor]]:
        """The predictions of the coarser maps with their weights, the finest first."""
        if self.deep_supervision == 0:
            return []
        maps = [conv(map) for conv, map in zip(self.deep, coarser, strict=True)]
        return [(self.deep_supervision / 2**step, map) for step, map in enumerate(reversed(maps))]


class _Conv(nn.Module):
    """A convolution that keeps the size, under the name that the official files give it: `conv`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.bn = BatchNorm2d(out_channels) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


class _Reassemble(nn.Module):
    """Tokens of four blocks -> maps at 4, 2, 1 and 1/2 times the patch grid."""

    def __init__(self, in_channels: Sequence[int], widths: Sequence[int], readout: str) -> None:
        super().__init__()
        self.readout = readout
        self.projects = nn.ModuleList(_Conv(*sizes, kernel_size=1) for sizes in zip(in_channels, widths, strict=True))
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], kernel_size=4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], kernel_size=3, stride=2, padding=1),
            ]
        )
        if readout == "project":
            self.readout_projects = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) for width in in_channels
            )

    def forward(self, maps: Sequence[Tensor], cls_tokens: Sequence[Tensor]) -> list[Tensor]:
        levels = []
        for index, (map, cls) in enumerate(zip(maps, cls_tokens, strict=True)):
            x = self._read_out(index, map, cls)
            levels.append(self.resize_layers[index](self.projects[index](x)))
        return levels

    def _read_out(self, index: int, map: Tensor, cls: Tensor) -> Tensor:
        """(B, D, h, w) with the cls token (B, D) worked into every patch."""
        if self.readout == "ignore":
            return map
        if self.readout == "add":
            return map + cls[:, :, None, None]
        tokens = map.permute(0, 2, 3, 1)
        both = torch.cat([tokens, cls[:, None, None].expand_as(tokens)], dim=-1)
        x: Tensor = self.readout_projects[index](both)
        return x.permute(0, 3, 1, 2)


class _Residual(nn.Module):
    """relu, 3x3, relu, 3x3, added to the input."""

    def __init__(self, channels: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv1 = _Conv(channels, channels, 3, bias=False, batch_norm=batch_norm)
        self.conv2 = _Conv(channels, channels, 3, bias=False, batch_norm=batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(self.conv1(x.relu()).relu())
        return out


class _Fusion(nn.Module):
    """Adds a level to what came from below, refines the sum, and doubles its size."""

    def __init__(self, channels: int, takes_two: bool, batch_norm: bool) -> None:
        super().__init__()
        if takes_two:  # the deepest level has nothing below it
            self.res_conv_unit1 = _Residual(channels, batch_norm)
        self.res_conv_unit2 = _Residual(channels, batch_norm)
        self.project = _Conv(channels, channels, 1)

    def forward(self, level: Tensor, below: Tensor | None) -> Tensor:
        x = level
        if below is not None:
            height, width = below.shape[-2:]
            x = below + self.res_conv_unit1(resize(level, (height, width)))
        # Officially up-sampled, then projected; the two commute, and so the projection costs a quarter.
        return _doubled(self.project(self.res_conv_unit2(x)))


class _Output(nn.Module):
    """3x3 to half the width, doubled size, 3x3, relu, 1x1."""

    def __init__(self, channels: int, head_channels: int, num_outputs: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels // 2, kernel_size=3, padding=1),
            _Doubling(),
            nn.Conv2d(channels // 2, head_channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(head_channels, num_outputs, kernel_size=1),
        )

    @property
    def last(self) -> nn.Conv2d:
        last = self.head[-1]
        assert isinstance(last, nn.Conv2d)
        return last

    def forward(self, x: Tensor) -> Tensor:
        x = self.head[:-1](x)
        # Also under autocast: bfloat16 would tell 5.00 m from 5.03 m and nothing between.
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.last(x.to(self.last.weight.dtype))
        return out


class _Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _doubled(x)


def _doubled(x: Tensor) -> Tensor:
    """Twice the size. Corners aligned, unlike everywhere else in DINOv2: so the heads were trained."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def _checked_range(min_m: float | None, max_m: float | None, num_outputs: int) -> tuple[float, float] | None:
    if min_m is None and max_m is None:
        return None
    if min_m is None or max_m is None:
        raise UserError(f"head.min_m={min_m}, head.max_m={max_m}: expected both in metres, or both null (no depth).")
    if num_outputs != 1:
        raise UserError(
            f"A depth range ({min_m} to {max_m} m) was given to a head with {num_outputs} outputs; expected 1. Set "
            "head.min_m=null head.max_m=null for a task that is not depth."
        )
    return check_range(min_m, max_m)


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
