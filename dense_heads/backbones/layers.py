"""The parts of a ViT block. Attribute names are those of the official state dict (facts sheet 1.3)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense_heads.ops.precision import cpu_has_avx512, cpu_multiplies_bfloat16

NORM_EPS = 1e-6
CHUNK = 460  # queries at a time where attention is computed in chunks: 460 x 1370 scores in bfloat16 are 1.3 MB
SUBSET_ABOVE = 0.1  # drop rates above it leave samples out of the computation; below it only their result is dropped


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention over all tokens, (B, heads, T, head_dim) each: the one place that chooses the route.

    PyTorch's fused attention is the fastest but in one place: in bfloat16 on a processor without a graph for gradients,
    where it runs at half the speed of plain matrix products (`scripts/benchmark.py backbone`).
    """
    if _is_emulated(query):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float()).to(query.dtype)
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not (needs_gradient or _is_traced()):
        return _chunked_attention(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def _chunked_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same, head by head, in chunks of queries whose scores stay in the processor's cache; nothing is left out."""
    tokens, head_dim = query.shape[-2:]
    query = (query * head_dim**-0.5).contiguous()
    out = torch.empty_like(query)
    rows = -(-tokens // -(-tokens // CHUNK))  # chunks of nearly equal size
    scores = query.new_empty(min(rows, tokens), key.shape[-2])
    heads = [tensor.flatten(0, 1) for tensor in (query, key.contiguous(), value.contiguous(), out)]
    for of_query, of_key, of_value, result in zip(*heads, strict=True):
        for chunk, target in zip(of_query.split(rows), result.split(rows), strict=True):
            part = scores[: len(chunk)]
            torch.mm(chunk, of_key.T, out=part)
            torch.softmax(part, dim=-1, out=part)
            torch.mm(part, of_value, out=target)
    return out


class Linear(nn.Linear):
    """`nn.Linear` that keeps its weight in the processor's own layout where it pays: frozen, on a CPU with AVX-512.

    PyTorch otherwise lays it out anew in each call. Costs a second copy of the weight, made again when it changes.
    Without AVX-512 the plain product is the faster one (by a sixth on an AMD EPYC with AVX2).
    In bfloat16 on a processor that has no units for it, products are those of float32, and their results rounded.
    """

    _ROWS = 1370  # tokens that the layout is made for (an image of 518 x 518): one layout, and so one rounding, for all

    lays_out = True
    _laid_out: tuple[object, Tensor] | None = None

    def forward(self, input: Tensor, gelu: bool = False) -> Tensor:
        """(..., in) -> (..., out); with `gelu` through an exact GELU, while the result is still in the cache."""
        emulated = _is_emulated(input) and self.weight.dtype == input.dtype
        if not self._pays(input):
            out = self._float32(input) if emulated else super().forward(input)
            return _gelu(out) if gelu else out
        version = version_of(self.weight)
        if self._laid_out is None or self._laid_out[0] != version:
            weight = self.weight.detach().float() if emulated else self.weight.detach()
            self._laid_out = version, torch.ops.mkldnn._reorder_linear_weight(weight, self._ROWS)
        name, algorithm = ("gelu", "none") if gelu else ("none", "")
        bias = self.bias.float() if emulated and self.bias is not None else self.bias
        operand = input.float() if emulated else input
        done: Tensor = torch.ops.mkldnn._linear_pointwise(operand, self._laid_out[1], bias, name, [], algorithm)
        return done.to(input.dtype)

    def _float32(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias).to(input.dtype)

    def _pays(self, input: Tensor) -> bool:
        if not self.lays_out or input.device.type != "cpu" or input.dtype != self.weight.dtype:
            return False
        if input.dtype not in (torch.float32, torch.bfloat16) or torch.is_autocast_enabled("cpu"):
            return False
        needs_gradient = torch.is_grad_enabled() and (self.weight.requires_grad or input.requires_grad)
        if needs_gradient or _is_traced():
            return False
        return cpu_has_avx512() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_laid_out"}  # it cannot be copied


def _gelu(x: Tensor) -> Tensor:
    """An exact GELU, in place where no gradient needs what was there: a large result costs a page fault each 4 KB."""
    if _is_traced() or (torch.is_grad_enabled() and x.requires_grad):
        return F.gelu(x)
    done: Tensor = torch.ops.aten.gelu_(x)
    return done


def version_of(tensor: Tensor) -> tuple[int, int]:
    """Changes when `tensor` is written to or replaced: an EMA update does so without `load_state_dict`."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _is_emulated(tensor: Tensor) -> bool:
    """Whether PyTorch would multiply it element by element."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and not cpu_multiplies_bfloat16()


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


class PatchEmbed(nn.Module):
    """Image (B, C, H, W), H and W multiples of the patch size -> patch embeddings (B, N, D), row by row."""

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        patches: Tensor = self._projected(images.to(self.proj.weight.dtype))
        return patches.flatten(2).transpose(1, 2)

    def _projected(self, images: Tensor) -> Tensor:
        if not _is_emulated(images):
            projected: Tensor = self.proj(images)
            return projected
        bias = None if self.proj.bias is None else self.proj.bias.float()
        projected = F.conv2d(images.float(), self.proj.weight.float(), bias, self.proj.stride)
        return projected.to(images.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; the rows of `qkv` are laid out (3, heads, head_dim)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

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
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out: Tensor = self.fc2(self.fc1(x, gelu=True))
        return out


class SwiGLU(nn.Module):
    """Gated feed-forward: SiLU of the first half of `w12` times the second half, then `w3`."""

    def __init__(self, dim: int, mlp_hidden: int) -> None:
        super().__init__()
        hidden = (int(mlp_hidden * 2 / 3) + 7) // 8 * 8  # two thirds keep the parameter count of an MLP
        self.w12 = Linear(dim, 2 * hidden)
        self.w3 = Linear(hidden, dim)

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
        x = self._add(x, lambda tokens: self.attn(self.norm1(tokens)), self.ls1)
        return self._add(x, lambda tokens: self.mlp(self.norm2(tokens)), self.ls2)

    def _add(self, x: Tensor, branch: Callable[[Tensor], Tensor], scale: LayerScale) -> Tensor:
        if not self.training or self.drop_rate == 0.0:
            return torch.addcmul(x, branch(x), scale.gamma)  # in one go through memory
        if self.drop_rate > SUBSET_ABOVE:
            return subset_residual(x, lambda tokens: scale(branch(tokens)), self.drop_rate)
        return x + drop_path(scale(branch(x)), self.drop_rate)
