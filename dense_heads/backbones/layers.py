"""The parts of a ViT block. Attribute names are those of the official state dict (facts sheet 1.3)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
SUBSET_ABOVE = 0.1  # drop rates above it leave samples out of the computation; below it only their result is dropped


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention over all tokens, (B, heads, T, head_dim) each: the one place that chooses the route."""
    return F.scaled_dot_product_attention(query, key, value)


class PatchEmbed(nn.Module):
    """Image (B, C, H, W), H and W multiples of the patch size -> patch embeddings (B, N, D), row by row."""

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        patches: Tensor = self.proj(images.to(self.proj.weight.dtype))
        return patches.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; the rows of `qkv` are laid out (3, heads, head_dim)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attention(query, key, value).transpose(1, 2).reshape(batch, tokens, dim)
        out: Tensor = self.proj(mixed)
        return out


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGLU(nn.Module):
    """Gated feed-forward: SiLU of the first half of `w12` times the second half, then `w3`."""

    def __init__(self, dim: int, mlp_hidden: int) -> None:
        super().__init__()
        hidden = (int(mlp_hidden * 2 / 3) + 7) // 8 * 8  # two thirds keep the parameter count of an MLP
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return x * self.gamma


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """Stochastic depth: zeroes whole samples of a residual branch, scales the others to keep the mean."""
    keep = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(1 - rate)
    return branch * keep / (1 - rate)


def subset_residual(x: Tensor, branch: Callable[[Tensor], Tensor], rate: float) -> Tensor:
    """Stochastic depth that computes the branch for a random part of the batch only (DINOv2 layers/block.py)."""
    batch = x.shape[0]
    kept = max(int(batch * (1 - rate)), 1)
    chosen = torch.randperm(batch, device=x.device)[:kept]
    residual = branch(x[chosen])
    return torch.index_add(x, 0, chosen, residual.to(x.dtype), alpha=batch / kept)


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and stochastic depth (in training only)."""

    def __init__(self, dim: int, num_heads: int, ffn: str, mlp_ratio: float = 4.0, drop_rate: float = 0.0) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = SwiGLU(dim, hidden) if ffn == "swiglu" else Mlp(dim, hidden)
        self.ls2 = LayerScale(dim)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = self._add(x, lambda tokens: self.ls1(self.attn(self.norm1(tokens))))
        return self._add(x, lambda tokens: self.ls2(self.mlp(self.norm2(tokens))))

    def _add(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.training or self.drop_rate == 0.0:
            return x + branch(x)
        if self.drop_rate > SUBSET_ABOVE:
            return subset_residual(x, branch, self.drop_rate)
        return x + drop_path(branch(x), self.drop_rate)
