"""The backbones there are: their sizes, block sets and official files.

Imports no torch: `--help` and the configuration read it. Source of the numbers: DINOv2 hub/backbones.py and
configs/eval/*.yaml (facts sheet 1.1, 1.2, 1.7).
"""

from dataclasses import dataclass
from typing import Literal

from dense_heads.errors import unknown_name

OFFICIAL_URL = "https://dl.fbaipublicfiles.com/dinov2"
OFFICIAL_PREFIX = "dinov2_"  # torch.hub calls the same models dinov2_vits14, ...
PATCH_SIZE = 14
BLOCK_SETS = ("last", "last4", "even4", "quarters")


@dataclass(frozen=True)
class BackboneSpec:
    """One backbone: everything that its weights do not say by themselves."""

    name: str
    embed_dim: int
    num_blocks: int
    num_heads: int
    num_registers: int = 0
    ffn: Literal["mlp", "swiglu"] = "mlp"
    even4: tuple[int, ...] = ()  # empty: the ends of the four quarters
    official: bool = False
    grid_size: int = 37  # of the stored positional embedding: 518 / 14
    patch_size: int = PATCH_SIZE

    @property
    def interpolate_antialias(self) -> bool:
        """How the positional embedding is resized: with registers antialiased, without them not."""
        return self.num_registers > 0

    @property
    def interpolate_offset(self) -> float:
        """Without registers the resize goes by scale factors that are this much too large; see `vit.py`."""
        return 0.0 if self.num_registers else 0.1

    @property
    def official_file(self) -> str:
        """Name of the official weights file; only where `official`."""
        stem = self.name.removesuffix("_reg")
        return f"{OFFICIAL_PREFIX}{stem}{'_reg4' if self.num_registers else ''}_pretrain.pth"

    @property
    def official_url(self) -> str:
        """Address of the official weights; the folder has no register suffix."""
        return f"{OFFICIAL_URL}/{OFFICIAL_PREFIX}{self.name.removesuffix('_reg')}/{self.official_file}"


_EVEN_L = (4, 11, 17, 23)  # irregular, but what the official depth heads were trained on
_EVEN_G = (9, 19, 29, 39)

_SPECS = (
    BackboneSpec("vits14", 384, 12, 6, official=True),
    BackboneSpec("vits14_reg", 384, 12, 6, 4, official=True),
    BackboneSpec("vitb14", 768, 12, 12, official=True),
    BackboneSpec("vitb14_reg", 768, 12, 12, 4, official=True),
    BackboneSpec("vitl14", 1024, 24, 16, even4=_EVEN_L, official=True),
    BackboneSpec("vitl14_reg", 1024, 24, 16, 4, even4=_EVEN_L, official=True),
    BackboneSpec("vitg14", 1536, 40, 24, ffn="swiglu", even4=_EVEN_G, official=True),
    BackboneSpec("vitg14_reg", 1536, 40, 24, 4, ffn="swiglu", even4=_EVEN_G, official=True),
    BackboneSpec("vitn14_reg", 192, 8, 3, 4),
    BackboneSpec("vitt14_reg", 192, 12, 3, 4),
    BackboneSpec("vitp14_reg", 128, 6, 2, 4),
    # The baseline without a network. Four equal blocks, so that heads on four levels run on it unchanged.
    # Baselines without a network; widths for three channels.
    BackboneSpec("pixels", 3 * PATCH_SIZE**2, 4, 1),
    BackboneSpec("position", 64, 4, 1),
    BackboneSpec("pixels_position", 3 * PATCH_SIZE**2 + 64, 4, 1),
)
BACKBONES: dict[str, BackboneSpec] = {spec.name: spec for spec in _SPECS}


def get_spec(name: str) -> BackboneSpec:
    """The entry called `name`, with or without the official prefix `dinov2_`.

    Raises:
        UserError: no backbone has that name; lists those there are.
    """
    spec = BACKBONES.get(str(name).removeprefix(OFFICIAL_PREFIX))
    if spec is None:
        raise unknown_name("backbone", str(name), BACKBONES)
    return spec


def resolve_blocks(backbone: str | BackboneSpec, blocks: str) -> tuple[int, ...]:
    """A named choice of blocks as 0-based indices, ascending: the only place where block sets are written down.

    `last`: the last block; `last4`: the last four; `even4`: four spread over the depth, as the official depth heads
    have them (facts sheet 2.2); `quarters`: those that end each quarter of the depth (7.5).

    Raises:
        UserError: no such backbone or block set.
    """
    spec = get_spec(backbone) if isinstance(backbone, str) else backbone
    if blocks == "last":
        return (spec.num_blocks - 1,)
    if blocks == "last4":
        return tuple(range(spec.num_blocks - 4, spec.num_blocks))
    quarters = tuple(k * spec.num_blocks // 4 - 1 for k in range(1, 5))
    if blocks == "even4":
        return spec.even4 or quarters
    if blocks == "quarters":
        return quarters
    raise unknown_name("block set", str(blocks), BLOCK_SETS)
