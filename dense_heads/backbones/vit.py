"""DINOv2's vision transformer; state-dict keys exactly as in the official files.

Source: DINOv2 models/vision_transformer.py (arXiv 2304.07193), registers after arXiv 2309.16588.
"""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dense_heads.backbones.base import Backbone, check_patch_fit
from dense_heads.backbones.layers import NORM_EPS, Block, PatchEmbed, version_of
from dense_heads.errors import UserError, unknown_name

CACHED_SIZES = 16  # positional maps kept at once: a folder of images of all sizes must not fill the memory
FFNS = ("mlp", "swiglu")


class VisionTransformer(Backbone):
    """A ViT with a cls token, registers, LayerScale and a learned positional embedding of one square grid.

    Random numbers of the initialisation come from a generator of its own (`seed`), never from the global one.
    """

    register_tokens: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_blocks: int,
        num_heads: int,
        num_registers: int = 0,
        ffn: str = "mlp",
        name: str = "vit",
        patch_size: int = 14,
        grid_size: int = 37,
        in_channels: int = 3,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        layer_scale: float = 1.0,
        drop_path: float = 0.0,
        drop_path_uniform: bool = True,
        checkpointing: bool = False,
        patch_fit: str = "crop",
        seed: int | None = 0,
        block_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Builds it with random weights, in training mode as any module.

        Args:
            embed_dim: D.
            num_blocks: number of blocks.
            num_heads: heads of each attention.
            num_registers: R.
            ffn: `mlp` or `swiglu`.
            name: what messages call it.
            patch_size: side of a patch, pixels.
            grid_size: side of the stored positional embedding, patches.
            in_channels: C.
            interpolate_antialias: see `position`.
            interpolate_offset: see `position`.
            layer_scale: initial LayerScale.
            drop_path: rate of stochastic depth, in training.
            drop_path_uniform: the same rate at each block, else from 0 at the first to `drop_path` at the last.
            checkpointing: compute activations again in the backward pass rather than keep them.
            patch_fit: policy of `ops/pad.py` for sizes that are no multiple of the patch.
            block_dtype: of the blocks' weights, which are then never there in another type; see `streamed.py`.
            seed: of the random weights; None leaves the memory uninitialised, for a caller that loads weights.

        Raises:
            UserError: a value that no ViT can have.
        """
        super().__init__()
        if ffn not in FFNS:
            raise unknown_name("ffn", str(ffn), FFNS)
        if min(embed_dim, num_blocks, num_heads, patch_size, grid_size, in_channels) < 1 or num_registers < 0:
            raise UserError("Sizes of a ViT must be 1 or more, registers 0 or more.")
        if embed_dim % num_heads:
            raise UserError(f"Got embed_dim {embed_dim} with {num_heads} heads; expected a multiple of the heads.")
        if not 0.0 <= drop_path < 1.0:
            raise UserError(f"Got drop_path {drop_path}; expected a rate of at least 0 and below 1.")
        self.name, self.embed_dim, self.num_blocks, self.num_heads = name, embed_dim, num_blocks, num_heads
        self.num_registers, self.ffn, self.patch_size, self.grid_size = num_registers, ffn, patch_size, grid_size
        self.in_channels, self.patch_fit, self.checkpointing = in_channels, check_patch_fit(patch_fit), checkpointing
        self.interpolate_antialias, self.interpolate_offset = interpolate_antialias, interpolate_offset
        self._positions: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._fingerprint: tuple[object, str] | None = None

        rates = [drop_path * (1.0 if drop_path_uniform else i / max(num_blocks - 1, 1)) for i in range(num_blocks)]
        device = torch.get_default_device()
        with torch.device("meta"):  # torch's own initialisation would cost time and draw from the global generator
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid_size**2, embed_dim))
            registers = nn.Parameter(torch.empty(1, num_registers, embed_dim)) if num_registers else None
            self.register_parameter("register_tokens", registers)
            self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
            self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size)
            self.blocks = nn.ModuleList(Block(embed_dim, num_heads, ffn, drop_rate=rate) for rate in rates)
            self.blocks.to(block_dtype)
            self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.register_load_state_dict_post_hook(_forget_derived)  # type: ignore[no-untyped-call]
        if device.type != "meta":
            self.to_empty(device=device)
            if seed is not None:
                self.init_weights(seed, layer_scale)

    @torch.no_grad()
    def init_weights(self, seed: int, layer_scale: float = 1.0) -> None:
        """Random weights as the original's (facts sheet 1.6), a function of `seed` alone."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            value = torch.zeros(parameter.shape)  # on the CPU: the same numbers whatever the device
            owner, _, kind = name.rpartition(".")
            if name in ("cls_token", "register_tokens"):
                value.normal_(std=1e-6, generator=generator)
            elif owner == "patch_embed.proj":  # the original leaves the convolution as torch makes it
                bound = 1 / math.sqrt(self.in_channels * self.patch_size**2)
                value.uniform_(-bound, bound, generator=generator)
            elif name == "pos_embed" or (kind == "weight" and value.ndim == 2):
                nn.init.trunc_normal_(value, std=0.02, generator=generator)
            elif kind == "gamma":
                value.fill_(layer_scale)
            elif kind == "weight":  # of a norm
                value.fill_(1.0)
            parameter.copy_(value)
        _forget_derived(self)

    def block_outputs(self, images: Tensor, blocks: Sequence[int], masks: Tensor | None = None) -> dict[int, Tensor]:
        """See `Backbone.block_outputs`."""
        wanted = self.check_blocks(blocks)
        tokens = self._embed(images, masks)
        outputs = {}
        for index in range(wanted[-1] + 1):
            block = self.blocks[index]
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            if index in wanted:
                outputs[index] = tokens
        return outputs

    def _embed(self, images: Tensor, masks: Tensor | None) -> Tensor:
        """Images -> the sequence that enters the first block, (B, 1+R+N, D)."""
        images, _ = self.fit(images)
        height, width = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        patches: Tensor = self.patch_embed(images)
        if masks is not None:
            if masks.shape != patches.shape[:2] or masks.dtype != torch.bool:
                raise UserError(
                    f"Got masks of shape {tuple(masks.shape)} and {masks.dtype}; expected bool of shape "
                    f"{tuple(patches.shape[:2])}: one value for each of the {height} x {width} patches."
                )
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype).unsqueeze(0), patches)
        tokens = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        tokens = tokens + self.position(height, width, tokens.dtype)
        if self.register_tokens is None:
            return tokens
        # Registers enter after the positions were added: they have none.
        registers = self.register_tokens.expand(len(tokens), -1, -1)
        return torch.cat((tokens[:, :1], registers, tokens[:, 1:]), dim=1)

    def position(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """The positional embedding of a grid of `height` x `width` patches, (1, 1+N, D).

        Kept for each size while nothing in the module learns; see `_keeps_positions`.
        """
        if height == width == self.grid_size:
            return self.pos_embed  # as stored, not cast: so does the original
        if not self._keeps_positions():
            return self._interpolate(height, width).to(dtype)
        key = (height, width, dtype, version_of(self.pos_embed))
        if key not in self._positions:
            # A normal tensor even if the first call runs in inference mode: a later one may not.
            with torch.inference_mode(False), torch.no_grad():
                self._positions[key] = self._interpolate(height, width).to(dtype)
            if len(self._positions) > CACHED_SIZES:
                self._positions.popitem(last=False)
        self._positions.move_to_end(key)
        return self._positions[key]

    def _keeps_positions(self) -> bool:
        # While something learns, the embedding changes or takes part in the gradient; a tracer must see the real graph.
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        return not (self.training or tracing or any(parameter.requires_grad for parameter in self.parameters()))

    def _interpolate(self, height: int, width: int) -> Tensor:
        """Bicubic resize of the patch part; the cls row stays (facts sheet 1.5).

        The two official ways differ by up to 1.5 on unit-normal maps and must not be unified: with an offset the
        sampling grid follows the scale factors themselves, not the size that they lead to.
        """
        table = self.pos_embed.float()
        grid = table[:, 1:].reshape(1, self.grid_size, self.grid_size, -1).permute(0, 3, 1, 2)
        target: dict[str, Any] = {"size": (height, width)}
        if self.interpolate_offset:
            factors = tuple((side + self.interpolate_offset) / self.grid_size for side in (height, width))
            target = {"scale_factor": factors}
        resized = F.interpolate(grid, mode="bicubic", antialias=self.interpolate_antialias, **target)
        assert resized.shape[-2:] == (height, width)
        return torch.cat((table[:, :1], resized.flatten(2).transpose(1, 2)), dim=1)

    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over architecture and weights; remembered until the weights change.

        Changes made behind autograd's back (`parameter.data.mul_()`) are not noticed.
        """
        version = self._versions()
        if self._fingerprint is None or self._fingerprint[0] != version:
            self.remember_fingerprint_of(self.state_dict())
        assert self._fingerprint is not None
        return self._fingerprint[1]

    def remember_fingerprint_of(self, state: Mapping[str, Tensor]) -> None:
        """Take the fingerprint of these weights: those that were loaded, where the blocks hold them rounded."""
        architecture = [
            *(self.embed_dim, self.num_blocks, self.num_heads, self.num_registers, self.ffn, self.patch_size),
            *(self.grid_size, self.in_channels, self.interpolate_antialias, self.interpolate_offset),
        ]
        digest = hashlib.sha256(json.dumps(architecture).encode())
        for key, tensor in sorted(state.items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._fingerprint = (self._versions(), digest.hexdigest()[:16])

    def _versions(self) -> tuple[object, ...]:
        return tuple(version_of(parameter) for parameter in self.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every move (.to, .half, .cuda) passes here.
        _forget_derived(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _forget_derived(module: nn.Module, incompatible_keys: object = None) -> None:
    """Drops what was computed from the weights; also a hook of `load_state_dict`, which gives the second argument."""
    assert isinstance(module, VisionTransformer)
    module._positions.clear()
    module._fingerprint = None
