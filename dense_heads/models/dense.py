"""A frozen backbone and the heads that stand on it, as plain PyTorch modules.

Freezing happens here and nowhere else: no gradient, `eval()` kept through `.train()`, nothing in a state dict.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense_heads.backbones.base import Backbone
from dense_heads.backbones.streamed import stream
from dense_heads.backbones.vit import VisionTransformer
from dense_heads.backbones.zoo import resolve_blocks
from dense_heads.data.images import read_image, to_uint8
from dense_heads.data.inputs import Inputs, Pictures
from dense_heads.data.transforms import EvalTransform
from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.models.card import Card
from dense_heads.models.inference import Inference
from dense_heads.ops.pad import Placement, fit_to_patch
from dense_heads.ops.precision import resolve_precision
from dense_heads.ops.resize import resize
from dense_heads.structures import NO_PADDING, FeatureRequest, Features, Level, Levels, Size, View

OF_BACKBONE = ("patch_fit", "precision")  # of a card's preprocessing: what FrozenBackbone takes


class FrozenBackbone(nn.Module):
    """A backbone that never changes: its features are data.

    It is invisible to state dicts, so neither a checkpoint nor an artefact carries its weights; a state dict without
    them still loads strictly.
    """

    learns = False  # the one of `models/trained.py` does

    def __init__(
        self,
        backbone: Backbone,
        patch_fit: str = "pad",
        precision: str = "float32",
        pass_size: int | None = None,
        compile: bool = False,
    ) -> None:
        """How the backbone is run.

        Args:
            backbone: taken as it is in float32, copied in bfloat16, taken and changed where it is streamed.
            patch_fit: how an image meets the patch size: pad | pad_exact | crop | resize (`ops/pad.py`).
            precision: auto | float32 | bfloat16 (`ops/precision.py`); features are in this type, and heads get float32.
                streamed: weights in bfloat16 and features in float32 (`backbones/streamed.py`), but where the processor
                has bfloat16 the same as bfloat16.
            pass_size: at most so many images in one pass. With 1 the features of an image do not depend on its batch:
                matrix products of another size may round otherwise.
            compile: run it through `torch.compile`.

        Raises:
            UserError: an unknown precision, or a pass of no images.
        """
        super().__init__()
        if pass_size is not None and (not isinstance(pass_size, int) or isinstance(pass_size, bool) or pass_size < 1):
            raise UserError(f"backbone.pass_size={pass_size}: expected a whole number of images, 1 or above, or null.")
        self.dtype = resolve_precision(precision) if any(True for _ in backbone.parameters()) else torch.float32
        in_float32 = self.dtype == torch.float32
        self.streams = precision == "streamed" and in_float32 and isinstance(backbone, VisionTransformer)
        self._fingerprint = None if in_float32 and not self.streams else backbone.fingerprint()
        if self.streams:
            assert isinstance(backbone, VisionTransformer)
            stream(backbone)
        if self.dtype != torch.float32:
            backbone = copy.deepcopy(backbone).to(self.dtype)
        self.backbone = backbone
        self.patch_fit, self.pass_size = patch_fit, pass_size
        self._block_outputs = torch.compile(backbone.block_outputs) if compile else backbone.block_outputs
        self._settle()
        self.train(False)

    def _settle(self) -> None:
        """No gradient, nothing in a state dict."""
        self.backbone.requires_grad_(False)
        leave_out_of_state_dicts(self)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever is asked: normalisation and stochastic depth must not wake up."""
        return super().train(False)

    @property
    def precision(self) -> str:
        """The type that it computes in, by name, or `streamed`."""
        return "streamed" if self.streams else str(self.dtype).removeprefix("torch.")

    def fingerprint(self) -> str:
        """Of the float32 weights, whatever the backbone computes in."""
        return self._fingerprint or self.backbone.fingerprint()

    def request(self, head: Head) -> FeatureRequest:
        """The blocks of this backbone that `head` asks for by name, and whether they are normed."""
        return self.requested(head.blocks, head.norm, head.windows)

    def requested(self, blocks: str, norm: bool, windows: int = 1) -> FeatureRequest:
        """A named choice of blocks, resolved for this backbone."""
        return FeatureRequest(resolve_blocks(self.backbone.name, blocks), norm, windows)

    def widths(self, arguments: Mapping[str, Any]) -> list[int]:
        """Of the maps that a head made with these arguments will see, one for each of its blocks."""
        blocks = resolve_blocks(self.backbone.name, arguments.get("blocks", "last"))
        return [self.backbone.embed_dim * (2 if arguments.get("windows", 1) > 1 else 1)] * len(blocks)

    @property
    def origin(self) -> str:
        """Fingerprint of the weights that a run starts from."""
        return self.fingerprint()

    @torch.no_grad()
    def forward(self, images: Tensor, requests: Sequence[FeatureRequest]) -> Levels:
        """(B, C, H, W) of any size -> every level that a request names, from one pass that ends at the deepest."""
        return self._levels(images, requests)

    def _levels(self, images: Tensor, requests: Sequence[FeatureRequest]) -> Levels:
        if self.pass_size is not None and len(images) > self.pass_size:
            return Levels.cat([self._levels(part, requests) for part in torch.split(images, self.pass_size)])
        fitted, padding = fit_to_patch(images, self.backbone.patch_size, self.patch_fit)
        wanted = sorted({level for request in requests for level in request.levels})
        patch_maps: dict[Level, Tensor] = {}
        cls_tokens: dict[Level, Tensor] = {}
        for windows in {level.windows for level in wanted}:
            levels = [level for level in wanted if level.windows == windows]
            maps, tokens = self._see(fitted, levels) if windows == 1 else self._see_in_windows(fitted, levels, windows)
            patch_maps |= dict(zip(levels, maps, strict=True))
            cls_tokens |= dict(zip(levels, tokens, strict=True))
        return Levels(patch_maps, cls_tokens, (int(images.shape[-2]), int(images.shape[-1])), padding)

    def _see(self, images: Tensor, levels: Sequence[Level]) -> tuple[list[Tensor], list[Tensor]]:
        """Patch map and cls token of each level, from images of whole patches."""
        rows, columns = (side // self.backbone.patch_size for side in images.shape[-2:])
        outputs = self._block_outputs(images, sorted({level.block for level in levels}))
        maps, cls_tokens = [], []
        for level in levels:
            tokens = self.backbone.norm(outputs[level.block]) if level.norm else outputs[level.block]
            patches = tokens[:, 1 + self.backbone.num_registers :]
            maps.append(patches.transpose(1, 2).unflatten(2, (rows, columns)).contiguous())
            cls_tokens.append(tokens[:, 0])
        return maps, cls_tokens

    def _see_in_windows(self, images: Tensor, levels: Sequence[Level], num: int) -> tuple[list[Tensor], list[Tensor]]:
        """The same of `num` x `num` windows beside a global view, as DINOv3's detector sees an image (facts sheet 7.5).

        Windows are of whole patches, those at the right and the bottom smaller where the grid does not divide. The
        global view is the image at the size of one window; its maps are enlarged to the grid, its cls token stands for
        the image.
        """
        patch = self.backbone.patch_size
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        height, width = (-(-side // num) * patch for side in grid)
        small = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
        overview, cls_tokens = self._see(small, levels)
        strips = []
        for strip in torch.split(images, height, dim=-2):
            seen = [self._see(window, levels)[0] for window in torch.split(strip, width, dim=-1)]
            strips.append([torch.cat(parts, dim=-1) for parts in zip(*seen, strict=True)])
        tiled = [torch.cat(parts, dim=-2) for parts in zip(*strips, strict=True)]
        maps = [torch.cat([resize(far, grid), near], dim=1) for far, near in zip(overview, tiled, strict=True)]
        return maps, cls_tokens

    def placement(self, features: Features | Levels) -> Placement:
        """How a head's map of these features lies on the image that they came from.

        With `pad` the map of the padded image is resized straight to the unpadded size, as the original does; the
        slight misalignment is part of the published numbers. `pad_exact` cuts the padding out.
        """
        return Placement(features.image_size, features.padding if self.patch_fit == "pad_exact" else NO_PADDING)

    def maps(self, seen: Tensor | Levels, heads: Sequence[Head]) -> tuple[list[Tensor], Placement]:
        """Each head's map (B, K, h', w') in float32, from one backbone pass or from its features, and its place."""
        requests = [self.request(head) for head in heads]
        levels = (seen if isinstance(seen, Levels) else self(seen, requests)).float()
        each = [levels.features(request) for request in requests]
        return [head(features).float() for head, features in zip(heads, each, strict=True)], self.placement(levels)

    def predict_all(self, seen: Tensor | Levels, heads: Sequence[Head]) -> list[Tensor]:
        """One map (B, K, H, W) at the images' own size for each head, from one backbone pass or from its features."""
        maps, placement = self.maps(seen, heads)
        return [placement.enlarge(map) for map in maps]


def leave_out_of_state_dicts(module: nn.Module) -> None:
    """A state dict of what holds `module` neither carries nor misses its tensors."""
    module.register_state_dict_post_hook(_leave_out_of_state_dict)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_stand_in_for_itself)  # type: ignore[no-untyped-call]


def _leave_out_of_state_dict(module: nn.Module, state: Mapping[str, Any], prefix: str, _: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]  # type: ignore[attr-defined]


def _stand_in_for_itself(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict loads: put this module's own tensors where none were saved."""
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        state.setdefault(prefix + key, tensor.data)


class DenseModel(nn.Module):
    """Frozen backbone + one head + its card: what is trained, kept, loaded and used; a family adds `decode`."""

    transform_type: type[EvalTransform] = EvalTransform
    inputs: Inputs = Pictures()  # what `mode=predict` finds and reads for it
    inference_type: type[Inference] = Inference
    pooled = False  # whether its heads see of a patch map its mean alone, so that caches need keep no more

    def __init__(self, backbone: FrozenBackbone, head: Head, card: Card) -> None:
        """`card` says how images are prepared and looked at; `transform` and `inference` may be changed after."""
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.card = card
        self.transform = self.transform_type(**{k: v for k, v in card.preprocessing.items() if k not in OF_BACKBONE})
        self.inference = self.inference_type(**card.inference)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised -> the head's prediction (B, K, H, W) at the batch's own size."""
        return self.backbone.predict_all(images, [self.head])[0]

    def decode(self, views: Sequence[View], size: Size) -> Tensor:
        """The prediction (H, W) of one image at `size`, from its normalised test views, each (C, h, w)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the head is; one without training has buffers only."""
        return next(itertools.chain(self.head.parameters(), self.head.buffers())).device

    def predict(self, image: Any) -> np.ndarray:
        """The prediction (H, W) at the image's own size: class ids int64, or metres float32.

        `image`: a path, a PIL image, a uint8 array (H, W, 3) or (H, W), or a uint8 tensor (3, H, W).

        Raises:
            UserError: the image cannot be read.
        """
        found, _ = self._decoded(image)
        prediction: np.ndarray = found.cpu().numpy()
        return prediction

    @torch.inference_mode()
    def _decoded(self, image: Any) -> tuple[Any, Size]:
        """What `decode` gives for an image of any kind, and its (height, width)."""
        pixels = read_image(image) if isinstance(image, str | Path) else to_uint8(image)
        size = (int(pixels.shape[0]), int(pixels.shape[1]))
        return self.decode([view.to(self.device) for view in self.transform(pixels)], size), size
