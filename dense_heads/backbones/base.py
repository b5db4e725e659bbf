"""The contract of a backbone, and what all backbones share."""

from collections.abc import Sequence

from torch import Tensor, nn

from dense_heads.errors import UserError, unknown_name
from dense_heads.ops.pad import POLICIES, fit_to_patch
from dense_heads.structures import Padding


class Backbone(nn.Module):
    """Images -> token sequences [cls, registers, patches row by row].

    A subclass fills the attributes, sets `norm` (the final norm) and writes `block_outputs` and `fingerprint`; the
    public calls below are the same for all.
    """

    name: str
    embed_dim: int
    num_blocks: int
    num_heads: int
    patch_size: int
    num_registers: int
    in_channels: int
    patch_fit: str  # a policy of `ops/pad.py`: what happens to sizes that are no multiple of the patch
    norm: nn.Module

    def block_outputs(self, images: Tensor, blocks: Sequence[int], masks: Tensor | None = None) -> dict[int, Tensor]:
        """Raw (not normalised) token sequences (B, 1+R+N, D) after each of `blocks`; nothing deeper is computed.

        `norm` of this module makes the normed form of the same block, without a second pass.

        Args:
            images: (B, C, H, W), normalised.
            blocks: 0-based indices.
            masks: (B, N) bool; patches that are replaced by the mask token.

        Raises:
            UserError: images, blocks or masks of a form that does not fit.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Short hex of architecture and weights: equal where the features are equal."""
        raise NotImplementedError

    def forward(
        self, images: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor | None] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Tokens after the final norm; for a list of batches (multi-crop) a list of the same.

        Args:
            images: (B, C, H, W), ImageNet-normalised, any H and W (see `patch_fit`); or a list of such batches.
            masks: (B, N) bool, patches to replace by the mask token; for a list of batches a list, with None for
                batches without masks.

        Returns:
            `cls_token` (B, D), `register_tokens` (B, R, D), `patch_tokens` (B, N, D), all after the final norm, and
            `prenorm` (B, 1+R+N, D), the whole sequence before it.

        Raises:
            UserError: images or masks of a form that does not fit.
        """
        if isinstance(images, Tensor):
            if masks is not None and not isinstance(masks, Tensor):
                raise UserError("Got a list of masks with one batch of images; expected one (B, N) tensor.")
            return self._forward_batch(images, masks)
        each = [None] * len(images) if masks is None else list(masks)
        if isinstance(masks, Tensor) or len(each) != len(images):
            raise UserError(
                f"Got {len(images)} batches of images with {len(each)} masks; expected a list with one mask for each "
                "batch (None where it has none)."
            )
        # One pass for each resolution: equal to the packed sequences of the original, which needs xFormers.
        return [self._forward_batch(batch, mask) for batch, mask in zip(images, each, strict=True)]

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch tokens of several blocks, in ascending order of the blocks, as in the original (facts sheet 1.6).

        Args:
            images: (B, C, H, W), normalised.
            n: how many of the last blocks, or 0-based indices.
            reshape: maps (B, D, h, w) in place of sequences (B, N, D).
            return_class_token: pairs (patches, cls token (B, D)) in place of patches alone.
            norm: whether the final norm is applied, to every block.

        Raises:
            UserError: images or blocks of a form that does not fit.
        """
        if isinstance(n, int):
            if not 1 <= n <= self.num_blocks:
                raise UserError(f"Got n={n}; {self.name} has {self.num_blocks} blocks, so n is 1 to {self.num_blocks}.")
            n = range(self.num_blocks - n, self.num_blocks)
        images, _ = self.fit(images)
        height, width = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        pairs = []
        for _, tokens in sorted(self.block_outputs(images, n).items()):
            tokens = self.norm(tokens) if norm else tokens
            patches = tokens[:, 1 + self.num_registers :]
            if reshape:
                patches = patches.transpose(1, 2).reshape(len(tokens), -1, height, width).contiguous()
            pairs.append((patches, tokens[:, 0]))
        return tuple(pairs) if return_class_token else tuple(patches for patches, _ in pairs)

    def fit(self, images: Tensor) -> tuple[Tensor, Padding]:
        """`images` at multiples of the patch size by the policy `patch_fit`, and the padding that was added.

        Raises:
            UserError: not (B, C, H, W) floating point with this backbone's C, or too small to crop.
        """
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise UserError(
                f"Got images of {got}; expected a tensor (B, {self.in_channels}, H, W). One image: image.unsqueeze(0)."
            )
        if not images.is_floating_point():
            raise UserError(
                f"Got images of {images.dtype}; expected floating point, ImageNet-normalised "
                "((pixels - mean) / std; `dense_heads.structures` has both)."
            )
        if images.shape[1] != self.in_channels:
            raise UserError(
                f"Got images of {images.shape[1]} channels; {self.name} expects {self.in_channels}. Other channel "
                "counts: load_backbone(..., in_channels=...)."
            )
        return fit_to_patch(images, self.patch_size, self.patch_fit)

    def check_blocks(self, blocks: Sequence[int]) -> list[int]:
        """`blocks` in ascending order.

        Raises:
            UserError: none, one twice, or one that does not exist.
        """
        ordered = sorted(blocks)
        if not ordered or len(set(ordered)) != len(ordered) or ordered[0] < 0 or ordered[-1] >= self.num_blocks:
            raise UserError(
                f"Got blocks {list(blocks)}; expected one or more different 0-based indices below {self.num_blocks}, "
                f"the number of blocks of {self.name}."
            )
        return ordered

    def _forward_batch(self, images: Tensor, masks: Tensor | None) -> dict[str, Tensor]:
        last = self.num_blocks - 1
        prenorm = self.block_outputs(images, [last], masks)[last]
        tokens = self.norm(prenorm)
        first_patch = 1 + self.num_registers
        return {
            "cls_token": tokens[:, 0],
            "register_tokens": tokens[:, 1:first_patch],
            "patch_tokens": tokens[:, first_patch:],
            "prenorm": prenorm,
        }


def check_patch_fit(policy: str) -> str:
    """`policy`, if `ops/pad.py` knows it.

    Raises:
        UserError: it is not.
    """
    if policy not in POLICIES:
        raise unknown_name("patch_fit", str(policy), POLICIES)
    return policy
