"""The parts of a plain transformer detector: attention that knows where boxes are, and boxes as corrections of boxes.

Plain DETR (Lin et al., ICCV 2023): one map of one resolution, global attention, and in the decoder a bias from where
each cell lies relative to the query's box, computed for the two axes apart (box relative position bias).
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LARGEST_GROWTH = math.log(1000 / 16)  # of a box in one correction, as torchvision limits it


class Perceptron(nn.Sequential):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        layers: list[nn.Module] = []
        for entering, leaving in itertools.pairwise(widths):
            layers += [nn.Linear(entering, leaving), nn.ReLU()]
        super().__init__(*layers[:-1])


class Attention(nn.Module):
    """Multi-head attention, with what is added to queries and keys alone and a bias on the logits."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, Q, C), (B, N, C), (B, N, C), bias (B, heads, Q, N) -> (B, Q, C)."""
        parts = (self.query(queries), self.key(keys), self.value(values))
        query, key, value = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        mixed: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """Self-attention over all cells and a perceptron, each after its norm."""

    def __init__(self, channels: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = Attention(channels, num_heads)
        self.perceptron = Perceptron(channels, hidden, channels)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """(B, N, C) and the position of each cell -> the same shape."""
        y = self.norm1(x)
        x = x + self.attention(y + position, y + position, y)
        return x + self.perceptron(self.norm2(x))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Queries look at one another, then at all cells, with a bias from where the cells lie relative to their boxes."""

    def __init__(self, channels: int, num_heads: int, hidden: int, bias_hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.among = Attention(channels, num_heads)
        self.across = Attention(channels, num_heads)
        self.bias = BoxBias(num_heads, bias_hidden)
        self.perceptron = Perceptron(channels, hidden, channels)

    def forward(
        self, x: Tensor, place: Tensor, boxes: Tensor, memory: Tensor, position: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Queries (B, Q, C) with their places and boxes (B, Q, 4) in shares, cells (B, N, C) -> (B, Q, C)."""
        y = self.norm1(x)
        x = x + self.among(y + place, y + place, y)
        x = x + self.across(self.norm2(x) + place, memory + position, memory, self.bias(boxes, grid))
        return x + self.perceptron(self.norm3(x))  # type: ignore[no-any-return]


class BoxBias(nn.Module):
    """Attention logits from where each cell's centre lies relative to a box's sides, for each axis, summed.

    Distances are in cells, on a scale that grows with the logarithm: near a side a cell more or less matters.
    """

    def __init__(self, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.across, self.down = Perceptron(2, hidden, num_heads), Perceptron(2, hidden, num_heads)

    def forward(self, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, Q, 4) xyxy in shares of the grid of (rows, columns) -> (B, heads, Q, rows x columns)."""
        rows, columns = grid
        down = self.down(_distances(boxes[..., 1::2], rows)).permute(0, 3, 1, 2)
        across = self.across(_distances(boxes[..., 0::2], columns)).permute(0, 3, 1, 2)
        return (down[..., :, None] + across[..., None, :]).flatten(3)  # type: ignore[no-any-return]


def _distances(sides: Tensor, num: int) -> Tensor:
    """(B, Q, 2) in shares -> (B, Q, num, 2): the centres of `num` cells minus each side, in cells, compressed."""
    centres = torch.arange(num, device=sides.device, dtype=sides.dtype) + 0.5
    distance = centres[:, None] - sides[..., None, :] * num
    return distance.sign() * torch.log2(1 + 4 * distance.abs()) / 4


def corrected(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy moved and scaled by (..., 4): the centre in their own sides, the sides by their logarithm."""
    centres, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    centres = centres + deltas[..., :2] * sides
    sides = sides * deltas[..., 2:].clamp(max=_LARGEST_GROWTH).exp()
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)


def usable(boxes: Tensor) -> Tensor:
    """Boxes as the next layer may start from: inside the image, and not without area."""
    inside = boxes.clamp(0, 1)
    return torch.cat([inside[..., :2], torch.maximum(inside[..., 2:], inside[..., :2] + 1e-3)], dim=-1)


def sine_of_cells(grid: tuple[int, int], channels: int, like: Tensor) -> Tensor:
    """(rows x columns, channels): sines and cosines of each cell's centre, half the channels for each axis."""
    rows, columns = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in grid)
    down = _sines(rows, channels // 2)[:, None].expand(-1, grid[1], -1)
    across = _sines(columns, channels // 2)[None].expand(grid[0], -1, -1)
    return torch.cat([down, across], dim=-1).flatten(0, 1)


def sine_of_boxes(boxes: Tensor, channels: int) -> Tensor:
    """(..., 4) in shares -> (..., 2 x channels): of centre and sides, half the channels each."""
    centres, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    return _sines(torch.cat([centres, sides], dim=-1), channels // 2).flatten(-2)


def _sines(values: Tensor, channels: int) -> Tensor:
    """(...) in 0..1 -> (..., channels)."""
    powers = torch.arange(channels // 2, device=values.device, dtype=values.dtype) / (channels // 2)
    angles = 2 * math.pi * values[..., None] / 10_000**powers
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
