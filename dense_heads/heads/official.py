"""Trained heads from files: those that DINOv2's authors released, and our own artefacts."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.base import Head

log = logging.getLogger(__name__)

BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"
# What was released, and what tells the files apart: they hold tensors only, no names. (The zoo knows the widths too,
# but rooms do not import each other, and these are the files' own.)
_WIDTHS = {"vits14": 384, "vitb14": 768, "vitl14": 1024, "vitg14": 1536}
_NUM_CLASSES = {"ade20k": 150, "voc2012": 21}
_FILE_NAMES = {"linear": "linear", "linear4": "ms"}  # our name of the head -> theirs
_NUM_BLOCKS = {"linear": 1, "linear4": 4}
_RELEASED_NAME = re.compile(r"dinov2_(vit[sblg]14)_(ade20k|voc2012)_(linear|ms)_head")
_HEAD_PREFIX, _BACKBONE_PREFIX = "decode_head.", "backbone."
_NO_REGISTERS = (
    "DINOv2's dense heads were trained on, and released for, the backbones without registers only; features of the "
    "register backbones are others, and such a head gives wrong predictions on them"
)


class _IgnoredDtype:
    """Stands in for `numpy.dtype` while a checkpoint is read."""

    def __init__(self, *args: object) -> None: ...
    def __setstate__(self, state: object) -> None: ...


def _ignored_scalar(*args: object) -> None:
    """Stands in for numpy's scalar reconstruction while a checkpoint is read."""


# mmcv checkpoints keep a few numpy scalars beside the weights (best score, time), which `weights_only=True` refuses.
# We do not want their values, so their names lead to stand-ins: numpy's own unpickling, which sets flags of C
# structures from the file's bytes, never runs.
_SCALAR_GLOBALS = [
    (_ignored_scalar, "numpy.core.multiarray.scalar"),  # written by numpy 1
    (_ignored_scalar, "numpy._core.multiarray.scalar"),  # written by numpy 2
    (_IgnoredDtype, "numpy.dtype"),
]


def official_head_url(backbone_name: str, dataset: str, head_name: str) -> str:
    """Where a released segmentation head lies [D2 README; hub entries have none for segmentation].

    Args:
        backbone_name: such as `vitl14`, with or without `dinov2_`.
        dataset: `ade20k` or `voc2012`.
        head_name: `linear` or `linear4` (the original's `ms`).

    Raises:
        UserError: nothing was released for this backbone, data set or head.
    """
    name = _checked_backbone(backbone_name)
    if name not in _WIDTHS:
        raise UserError(
            f"There is no official head for backbone {backbone_name!r}; there are some for {', '.join(_WIDTHS)}. "
            "Take one of these backbones, or train a head (head.weights=null)."
        )
    if dataset not in _NUM_CLASSES:
        raise unknown_name("data set of official heads", dataset, _NUM_CLASSES)
    if head_name not in _FILE_NAMES:
        raise unknown_name("official head", head_name, _FILE_NAMES)
    return f"{BASE_URL}/dinov2_{name}/dinov2_{name}_{dataset}_{_FILE_NAMES[head_name]}_head.pth"


def load_head_weights(head: Head, weights: str | Path, backbone_name: str, dataset: str | None = None) -> None:
    """Load a trained head's weights, strictly, key for key; on an error the head is as it was.

    Args:
        head: the head to fill.
        weights: a released `.pth` (`state_dict` with `decode_head.*`), our own `head.safetensors`, a folder that
            holds one, or a `.pth` of a head's own state dict. Nothing in the file is executed.
        backbone_name: the backbone that the head stands on.
        dataset: `ade20k` or `voc2012` to check a released file's number of classes against; None does not check.

    Raises:
        UserError: no file, unreadable, hostile, other keys or shapes, values that are not finite; a released head
            over a backbone with registers, or named for another backbone, data set or head.
    """
    path = _file(Path(weights))
    state = _read(path)
    if any(key.startswith(_HEAD_PREFIX) for key in state):
        name = _checked_backbone(backbone_name)
        _check_file_name(path, head, name, dataset)
        state = _head_part(state, path)
        _check_dataset(state, path, dataset)
    _check_fit(state, head, path, backbone_name)
    head.load_state_dict(state, strict=True)


def _file(path: Path) -> Path:
    if path.is_dir():
        path = path / "head.safetensors"
    if not path.is_file():
        raise UserError(
            f"There is no head weights file {path}. Expected a released .pth, a head.safetensors, or the folder of a "
            "run; or head.weights=official for a released head."
        )
    return path


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors by name, whatever it is wrapped in."""
    try:
        if path.suffix == ".safetensors":
            content: object = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals(list(_SCALAR_GLOBALS)):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file fails in a dozen ways; the original's advice would be to trust it
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged or cut short, or holds Python "
            "objects beyond tensors and plain values, which are never loaded because they could run code. Fetch it "
            "again from where it was released."
        ) from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if not (isinstance(content, Mapping) and content and all(isinstance(key, str) for key in content)):
        raise UserError(f"{path} holds no weights; expected a state dict, or one under 'state_dict'.")
    strangers = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise UserError(f"{path} holds {_listed(strangers)} that are no tensors; expected a state dict of tensors.")
    return dict(content)


def _checked_backbone(backbone_name: str) -> str:
    """The name without `dinov2_`, if it has no registers."""
    name = backbone_name.removeprefix("dinov2_")
    if name.endswith("_reg"):
        plain = name.removesuffix("_reg")
        instead = f"backbone={plain}" if plain in _WIDTHS else f"one of {', '.join(_WIDTHS)}"
        raise UserError(
            f"An official head does not belong on backbone {backbone_name!r}: {_NO_REGISTERS}. Take {instead}, or "
            "train a head (head.weights=null)."
        )
    return name


def _check_file_name(path: Path, head: Head, backbone_name: str, dataset: str | None) -> None:
    """Refuse a file whose name says that it belongs elsewhere.

    Shapes alone cannot tell all: four blocks of ViT-S and one of ViT-g are both 1536 wide.
    """
    match = _RELEASED_NAME.search(path.name)
    if match is None:
        return
    blocks = {_FILE_NAMES[name]: num for name, num in _NUM_BLOCKS.items()}[match[3]]
    if match[1] != backbone_name or blocks != len(head.in_channels) or match[2] != (dataset or match[2]):
        ours = next(name for name, theirs in _FILE_NAMES.items() if theirs == match[3])
        raise UserError(
            f"{path} is by its name the official head of head={ours} on backbone={match[1]} for {match[2]}; got a head "
            f"on {len(head.in_channels)} block(s) of {backbone_name}{f' for {dataset}' if dataset else ''}. Take the "
            "file that belongs to it (head.weights=official finds it)."
        )


def _head_part(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The head's tensors of an mmseg checkpoint, without their prefix."""
    ignored = [key for key in state if key.startswith(_BACKBONE_PREFIX)]
    others = [key for key in state if not key.startswith((_HEAD_PREFIX, _BACKBONE_PREFIX))]
    if others:
        raise UserError(
            f"{path} holds {_listed(others)} beside its {_HEAD_PREFIX}* tensors; expected a head, or a head and its "
            "backbone. Take them out of the file if they are not needed."
        )
    if ignored:
        log.warning("%s: %d backbone.* tensors are ignored, only the head is loaded.", path, len(ignored))
    return {key.removeprefix(_HEAD_PREFIX): value for key, value in state.items() if key.startswith(_HEAD_PREFIX)}


def _check_dataset(state: Mapping[str, Tensor], path: Path, dataset: str | None) -> None:
    if dataset is None:
        return
    if dataset not in _NUM_CLASSES:
        raise unknown_name("data set of official heads", dataset, _NUM_CLASSES)
    weight = state.get("conv_seg.weight")
    if weight is not None and weight.ndim == 4 and weight.shape[0] != _NUM_CLASSES[dataset]:
        raise UserError(
            f"{path} does not belong to {dataset}, which has {_NUM_CLASSES[dataset]} classes: {_looks_like(weight)}."
        )


def _check_fit(state: Mapping[str, Tensor], head: Head, path: Path, backbone_name: str) -> None:
    """Raise unless keys, shapes and values are right."""
    wanted = head.state_dict()
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or unexpected:
        raise UserError(
            f"{path} does not fit {type(head).__name__}: {len(missing)} keys are missing ({_listed(missing)}), "
            f"{len(unexpected)} are unknown ({_listed(unexpected)}). Choose the head that the file was made for."
        )
    wrong = [key for key, value in wanted.items() if state[key].shape != value.shape]
    if wrong:
        key = "conv_seg.weight" if "conv_seg.weight" in wrong else wrong[0]
        guess = f" The file: {_looks_like(state[key])}." if key == "conv_seg.weight" and state[key].ndim == 4 else ""
        raise UserError(
            f"{path} does not fit: {key} is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)} for "
            f"{head.num_outputs} outputs on {len(head.in_channels)} block(s) of {backbone_name}.{guess} Choose "
            "backbone, head and task to match the file, or another file."
        )
    broken = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise UserError(f"{path} holds values that are not finite in {_listed(broken)}. Take another file.")


def _looks_like(weight: Tensor) -> str:
    """Whose released head a (classes, channels, 1, 1) weight could be."""
    classes, channels = weight.shape[:2]
    dataset = next((f"{name}, " for name, num in _NUM_CLASSES.items() if num == classes), "")
    owners = [
        f"head={head} backbone={backbone}"
        for backbone, width in _WIDTHS.items()
        for head, blocks in _NUM_BLOCKS.items()
        if width * blocks == channels
    ]
    return f"it looks like {dataset}{classes} classes, {' or '.join(owners) or f'{channels} channels'}"


def _listed(keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "") or "none"
