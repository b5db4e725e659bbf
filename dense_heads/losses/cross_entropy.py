"""Cross-entropy at label resolution of a map at patch resolution, without its full-size logits."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dense_heads.ops.pad import Placement
from dense_heads.ops.threads import map_in_threads

# Logits of a tile. On a CPU it is to stay in the second-level cache, which makes it five times as fast as whole images
# through memory; elsewhere it only bounds memory.
_TILE_ELEMENTS = {"cpu": 2**18}
_TILE_ELEMENTS_ELSEWHERE = 2**26


class Terms(NamedTuple):
    """What cross-entropy is made of, as in `torch.nn.functional.cross_entropy`."""

    weights: Tensor | None  # (K,), of the classes
    ignore_index: int
    label_smoothing: float


def map_cross_entropy(map: Tensor, target: Tensor, placement: Placement, terms: Terms) -> Tensor:
    """`F.cross_entropy(placement.enlarge(map), target, ..., reduction="sum")`, tile by tile.

    Value and gradient are equal to float32 rounding. Enlarging is two matrix products; of each tile of rows the loss
    and its gradient with respect to the map are computed in one go, so that nothing at label resolution outlives its
    tile: neither time nor memory of a backward pass through full-size logits. Samples do not mix, and sums are in a
    fixed order.

    Args:
        map: (B, K, h, w) logits, float32 or float64.
        target: (B, H, W) int64, `ignore_index` where there is no label.
        placement: how the map lies on the label's pixels, so that its size is (H, W).
        terms: weights, ignored label, smoothing.

    Returns:
        Scalar.
    """
    assert map.shape[:1] + placement.size == target.shape, (tuple(map.shape), placement.size, tuple(target.shape))
    loss: Tensor = _MapCrossEntropy.apply(map, target, placement, terms)
    return loss


class _MapCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, map: Tensor, target: Tensor, placement: Placement, terms: Terms) -> Tensor:
        # Autocast would turn the matrix products, and with them the logits, into half precision.
        with torch.autocast(map.device.type, enabled=False):
            loss, gradient = _loss_and_gradient(map, target, placement, terms)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None


def _loss_and_gradient(map: Tensor, target: Tensor, placement: Placement, terms: Terms) -> tuple[Tensor, Tensor]:
    num_classes, height, width = map.shape[1:]
    rows, columns = placement.matrices((height, width), map.dtype)
    columns = columns.to(map.device)
    limit = _TILE_ELEMENTS.get(map.device.type, _TILE_ELEMENTS_ELSEWHERE)
    num_samples = max(1, limit // (num_classes * target[0].numel()))  # small images share a tile
    num_rows = max(1, limit // (num_samples * num_classes * target.shape[-1]))
    tiles = [(labelled, seen, part.to(map.device)) for labelled, seen, part in _tiles(rows, num_rows)]

    def part(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        maps, labels = part
        # Rows first, then samples, classes and columns: so both resizes are products of two plain matrices.
        wide = (maps.permute(2, 0, 1, 3).reshape(-1, width) @ columns.T).view(height, -1)
        gradient = torch.zeros_like(wide)
        losses = []
        for labelled, seen, weights in tiles:
            logits = (weights @ wide[seen]).view(len(weights), len(maps), num_classes, -1)
            loss, slope = _tile(logits, labels[:, labelled].transpose(0, 1).unsqueeze(2), terms)
            losses.append(loss)
            gradient[seen].addmm_(weights.T, slope.view(len(weights), -1))
        narrow = (gradient.view(-1, len(columns)) @ columns).view(height, len(maps), num_classes, width)
        return torch.stack(losses).sum(), narrow.permute(1, 2, 0, 3)

    parts = zip(torch.split(map, num_samples), torch.split(target, num_samples), strict=True)
    losses, gradients = zip(*map_in_threads(part, parts, map.device), strict=True)
    return torch.stack(losses).sum(), torch.cat(gradients)


def _tiles(rows: Tensor, num_rows: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Label rows, the map's rows that they see, and the weights between them."""
    for start in range(0, len(rows), num_rows):
        part = rows[start : start + num_rows]
        used = part.any(dim=0).nonzero().flatten()
        seen = slice(int(used[0]), int(used[-1]) + 1)
        yield slice(start, start + len(part)), seen, part[:, seen].contiguous()


def _tile(logits: Tensor, labels: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Loss of a tile, and its gradient with respect to the logits.

    With a_k the share of class k in the target times its weight, the loss of a pixel is sum_k a_k (log Z - x_k), and
    its slope p_k sum_k a_k - a_k.

    Args:
        logits: (rows, samples, K, columns).
        labels: (rows, samples, 1, columns).
        terms: see `Terms`.
    """
    valid = labels != terms.ignore_index
    labels = labels.masked_fill(~valid, 0)
    valid = valid.to(logits.dtype)
    own = valid * (1 - terms.label_smoothing)  # a of the pixel's class
    if terms.weights is not None:
        own = own * terms.weights.to(logits.dtype)[labels]
    slope = logits.softmax(dim=2)
    # log Z, from the largest logit and its probability: the softmax has no other use for its sum.
    log_z = logits.amax(dim=2, keepdim=True) - slope.amax(dim=2, keepdim=True).log()
    if terms.label_smoothing == 0:
        loss = (own * (log_z - logits.gather(2, labels))).sum()
        return loss, slope.mul_(own).scatter_add_(2, labels, -own)
    each = logits.new_full((logits.shape[2], 1), terms.label_smoothing / logits.shape[2])  # a of every class
    if terms.weights is not None:
        each = each * terms.weights[:, None]
    total = own + valid * each.sum()
    loss = (total * log_z - own * logits.gather(2, labels) - valid * (each * logits).sum(dim=2, keepdim=True)).sum()
    return loss, slope.mul_(total).sub_(valid * each).scatter_add_(2, labels, -own)
