"""Batches of several resolutions through one pass of a ViT, exactly.

All tokens stand in one row for everything that treats tokens one by one (norms, linear layers, feed-forward), which
is most of the work; attention runs for each resolution by itself, so no token sees another image and none is padded.
The original reaches the same through xFormers' block-diagonal attention.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dense_heads.backbones import layers
from dense_heads.backbones.layers import Attention, Block
from dense_heads.backbones.vit import VisionTransformer


def packed_forward(
    vit: VisionTransformer, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
) -> list[dict[str, Tensor]]:
    """As `vit(list of batches, list of masks)`, in one pass."""
    each = [None] * len(images) if masks is None else list(masks)
    groups = [vit._embed(batch, mask) for batch, mask in zip(images, each, strict=True)]
    for block in vit.blocks:
        assert isinstance(block, Block)
        if vit.checkpointing and torch.is_grad_enabled():
            groups = checkpoint(_block, block, groups, use_reentrant=False)
        else:
            groups = _block(block, groups)
    first = 1 + vit.num_registers
    return [
        {"cls_token": t[:, 0], "register_tokens": t[:, 1:first], "patch_tokens": t[:, first:], "prenorm": raw}
        for t, raw in zip(_each_token(vit.norm, groups), groups, strict=True)
    ]


def _block(block: Block, groups: list[Tensor]) -> list[Tensor]:
    groups = _residual(
        block, groups, lambda x: _each_token(block.ls1, _attend(block.attn, _each_token(block.norm1, x)))
    )
    return _residual(block, groups, lambda x: _each_token(lambda t: block.ls2(block.mlp(block.norm2(t))), x))


def _each_token(function: Callable[[Tensor], Tensor], groups: Sequence[Tensor]) -> list[Tensor]:
    """A function of single tokens, over the tokens of all groups at once."""
    row = function(torch.cat([group.flatten(0, 1) for group in groups]))
    parts = torch.split(row, [group.shape[0] * group.shape[1] for group in groups])
    return [part.view(*group.shape[:2], -1) for part, group in zip(parts, groups, strict=True)]


def _attend(attention: Attention, groups: Sequence[Tensor]) -> list[Tensor]:
    mixed = []
    for qkv in _each_token(attention.qkv, groups):
        query, key, value = qkv.view(*qkv.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed.append(layers.attention(query, key, value).transpose(1, 2).flatten(2))
    return _each_token(attention.proj, mixed)


def _residual(block: Block, groups: list[Tensor], branch: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
    """Stochastic depth as in `Block`, each resolution with its own draw."""
    if not block.training or block.drop_rate == 0.0:
        return [x + y for x, y in zip(groups, branch(groups), strict=True)]
    if block.drop_rate <= layers.SUBSET_ABOVE:
        return [x + layers.drop_path(y, block.drop_rate) for x, y in zip(groups, branch(groups), strict=True)]
    kept = [max(int(len(x) * (1 - block.drop_rate)), 1) for x in groups]
    chosen = [torch.randperm(len(x), device=x.device)[:k] for x, k in zip(groups, kept, strict=True)]
    outputs = branch([x[index] for x, index in zip(groups, chosen, strict=True)])
    return [
        torch.index_add(x, 0, index, y.to(x.dtype), alpha=len(x) / k)
        for x, index, y, k in zip(groups, chosen, outputs, kept, strict=True)
    ]
