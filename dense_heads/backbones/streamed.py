"""A ViT that does not fit in float32: weights of its blocks in bfloat16, one block at a time widened to compute."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dense_heads.backbones.layers import Block, Linear
from dense_heads.backbones.vit import VisionTransformer


class StreamedBlock(nn.Module):
    """A block whose weights are kept in bfloat16 and are in float32 only while it computes.

    For processors without bfloat16 units, where products in bfloat16 are a hundred times slower than in float32. The
    results are those of a float32 block with rounded weights.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block.to(torch.bfloat16)
        for layer in block.modules():
            if isinstance(layer, Linear):
                layer.lays_out = False  # a layout would be a second copy, in float32, of weights that are gone at once

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), float32."""
        wide = {name: weight.float() for name, weight in self.block.named_parameters()}
        out: Tensor = functional_call(self.block, wide, (x,))
        return out


def stream(vit: VisionTransformer) -> VisionTransformer:
    """Change a ViT into one that is streamed, and give it back; the embeddings and the final norm stay in float32."""
    for index, block in enumerate(vit.blocks):
        if isinstance(block, Block):
            vit.blocks[index] = StreamedBlock(block)
    return vit
