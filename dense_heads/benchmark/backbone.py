"""The backbone's forward pass against transformers, timm and, where installed, the original code: the same weights."""

import copy
import importlib
import importlib.util
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dense_heads.backbones.vit import VisionTransformer
from dense_heads.backbones.weights import load_backbone, save_backbone
from dense_heads.benchmark.protocol import Case, Contender, timed
from dense_heads.errors import UserError
from dense_heads.ops.precision import cpu_multiplies_bfloat16

log = logging.getLogger("dense_heads")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GOALS = {"float32": 1.0, "bfloat16": 1.3}  # times as fast as the fastest other one
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # relative distance of the outputs below which it is the same model
MATRIX = 4096  # side of the matrix product that stands for the machine's peak

Forward = Callable[[Tensor], Tensor]  # images -> all tokens after the final norm
Make = Callable[[VisionTransformer, torch.dtype, Path], dict[str, Forward]]


def add_arguments(parser: ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--backbones", nargs="+", default=["vits14", "vitb14"], metavar="NAME")
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--batch", type=int, default=2, help="images in one pass (default %(default)s)")
    parser.add_argument(
        "--size", type=int, default=518, help="pixels; timm and transformers interpolate positions otherwise elsewhere"
    )


def cases(arguments: Namespace, scratch: Path) -> Iterator[Case]:
    """One for each backbone and precision; made one after the other, so that not all are in memory at once."""
    missing = [package for package in _OTHERS if importlib.util.find_spec(package) is None]
    if missing:
        log.info("not installed, so not compared with: %s", ", ".join(missing))
    others = [make for package, make in _OTHERS.items() if package not in missing]
    for name in arguments.backbones:
        for precision in arguments.precisions:
            yield _case(name, precision, arguments.batch, arguments.size, others, scratch)


def operations(backbone: VisionTransformer, batch: int, size: int) -> float:
    """Floating-point operations of the matrix products of one pass, a multiplication and an addition each."""
    patches = (size // backbone.patch_size) ** 2
    tokens, width = 1 + backbone.num_registers + patches, backbone.embed_dim
    weights = sum(p.numel() for block in backbone.blocks for p in block.parameters() if p.ndim == 2)
    attention = backbone.num_blocks * 2 * tokens**2 * width
    embedding = patches * backbone.patch_embed.proj.weight.numel()
    return 2.0 * batch * (tokens * weights + attention + embedding)


def _case(name: str, precision: str, batch: int, size: int, others: Sequence[Make], scratch: Path) -> Case:
    dtype = DTYPES[precision]
    backbone = load_backbone(name, weights=None)
    if not isinstance(backbone, VisionTransformer):
        raise UserError(f"{name} is no ViT; there is nothing to compare it with.")
    images = torch.randn(batch, backbone.in_channels, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    emulated = dtype == torch.bfloat16 and not cpu_multiplies_bfloat16()
    forwards = {"dense_heads": _ours(backbone, dtype)}
    for make in others:
        made = make(backbone, dtype, scratch)
        forwards |= {title: forward for title, forward in made.items() if not (emulated and "eager" in title)}
    expected = _call(forwards["dense_heads"], images).float()
    for title, forward in forwards.items():
        distance = ((_call(forward, images).float() - expected).norm() / expected.norm()).item()
        if not distance < TOLERANCE[precision]:
            raise UserError(f"{title} does not compute the same as dense_heads: relative distance {distance:.2g}.")
    work = operations(backbone, batch, size)
    contenders = [Contender(title, timed(_bound(forward, images)), work) for title, forward in forwards.items()]
    if emulated:
        log.info("no units for bfloat16: eager attention and the matrix product, of minutes each, are left out")
    else:
        contenders.append(Contender("matrix product", timed(_matrix_product(dtype)), 2.0 * MATRIX**3, reference=True))
    title = f"{name}, {precision}, {batch} images of {size} x {size}, {torch.get_num_threads()} threads"
    return Case(title, contenders, GOALS[precision])


def _matrix_product(dtype: torch.dtype) -> Callable[[], Tensor]:
    left, right = torch.randn(2, MATRIX, MATRIX, generator=torch.Generator().manual_seed(0)).to(dtype)
    return lambda: torch.mm(left, right)


@torch.inference_mode()
def _call(forward: Forward, images: Tensor) -> Tensor:
    return forward(images)


def _bound(forward: Forward, images: Tensor) -> Callable[[], Tensor]:
    return lambda: _call(forward, images)


def _ours(backbone: VisionTransformer, dtype: torch.dtype) -> Forward:
    model = copy.deepcopy(backbone).to(dtype).requires_grad_(False)
    last = model.num_blocks - 1
    return lambda images: model.norm(model.block_outputs(images, [last])[last])


# The others, each with both of its ways to compute attention: the fused one is not the fastest everywhere.


def _transformers(backbone: VisionTransformer, dtype: torch.dtype, scratch: Path) -> dict[str, Forward]:
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    folder = save_backbone(backbone, scratch / backbone.name, "huggingface").parent
    kind = getattr(transformers, "Dinov2WithRegistersModel" if backbone.num_registers else "Dinov2Model")

    def forward(attention: str) -> Forward:
        model = kind.from_pretrained(folder, attn_implementation=attention).to(dtype).eval()
        return lambda images: model(images).last_hidden_state

    return {"transformers": forward("sdpa"), "transformers, eager": forward("eager")}


def _timm(backbone: VisionTransformer, dtype: torch.dtype, scratch: Path) -> dict[str, Forward]:
    timm = importlib.import_module("timm")
    size = {384: "small", 768: "base", 1024: "large", 1536: "giant"}[backbone.embed_dim]
    name = f"vit_{size}_patch14{'_reg4' if backbone.num_registers else ''}_dinov2"
    file = save_backbone(backbone, scratch / f"{backbone.name}.safetensors", "timm")

    def forward(fused: bool) -> Forward:
        model = timm.create_model(name, num_classes=0, dynamic_img_size=True)
        timm.models.load_checkpoint(model, str(file), strict=True)
        for block in model.blocks:
            block.attn.fused_attn = fused
        forward_features: Forward = model.to(dtype).eval().forward_features
        return forward_features

    return {"timm": forward(True), "timm, eager": forward(False)}


def _original(backbone: VisionTransformer, dtype: torch.dtype, scratch: Path) -> dict[str, Forward]:
    model: Any = getattr(importlib.import_module("dinov2.hub.backbones"), f"dinov2_{backbone.name}")(pretrained=False)
    model.load_state_dict(backbone.state_dict())
    model.to(dtype).eval()

    def forward(images: Tensor) -> Tensor:
        out = model.forward_features(images)
        return torch.cat((out["x_norm_clstoken"][:, None], out["x_norm_regtokens"], out["x_norm_patchtokens"]), dim=1)

    return {"original": forward}


_OTHERS: dict[str, Make] = {"transformers": _transformers, "timm": _timm, "dinov2": _original}  # by package
