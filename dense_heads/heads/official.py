"""The heads that DINOv2's authors released, and how a head is filled from a file: theirs, or our own artefacts."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.base import Head
from dense_heads.heads.files import listed, read_tensors, weights_file

log = logging.getLogger(__name__)

BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"
# What was released, and what tells the files apart: they hold tensors only, no names. (The zoo knows the widths too,
# but rooms do not import each other, and these are the files' own.)
_WIDTHS = {"vits14": 384, "vitb14": 768, "vitl14": 1024, "vitg14": 1536}
_NUM_CLASSES = {"ade20k": 150, "voc2012": 21}
_SEGMENTATION = {"linear": "linear", "linear4": "ms"}  # our name of the head -> theirs
_DEPTH = {"linear_depth": "linear", "linear4_depth": "linear4", "dpt": "dpt"}
_RELEASED = {"ade20k": _SEGMENTATION, "voc2012": _SEGMENTATION, "nyu": _DEPTH, "kitti": _DEPTH}
_NUM_BLOCKS = {"linear": 1, "linear4": 4, "linear_depth": 1, "linear4_depth": 4, "dpt": 4}
# The weight whose shape says whose head it is: of the linear heads, the linear depth heads, and DPT.
_LINEAR, _LINEAR_DEPTH, _DPT = "conv_seg.weight", "conv_depth.weight", "reassemble_blocks.projects.0.conv.weight"
_DPT_LAST = "conv_depth.head.4.weight"
_RELEASED_NAME = re.compile(r"dinov2_(vit[sblg]14)_(ade20k|voc2012|nyu|kitti)_(linear4?|ms|dpt)_head")
_HEAD_PREFIX, _BACKBONE_PREFIX = "decode_head.", "backbone."
_NO_REGISTERS = (
    "DINOv2's dense heads were trained on, and released for, the backbones without registers only; features of the "
    "register backbones are others, and such a head gives wrong predictions on them"
)


def official_head_url(backbone_name: str, dataset: str, head_name: str) -> str:
    """Where a released head lies [D2 README, hub/depthers.py; there are no hub entries for segmentation].

    Args:
        backbone_name: such as `vitl14`, with or without `dinov2_`.
        dataset: `ade20k` or `voc2012` (segmentation), `nyu` or `kitti` (depth).
        head_name: `linear` or `linear4` (the original's `ms`) for segmentation; `linear_depth`, `linear4_depth` or
            `dpt` for depth.

    Raises:
        UserError: nothing was released for this backbone, data set or head.
    """
    name = _checked_backbone(backbone_name)
    if name not in _WIDTHS:
        raise UserError(
            f"There is no official head for backbone {backbone_name!r}; there are some for {', '.join(_WIDTHS)}. "
            "Take one of these backbones, or train a head (head.weights=null)."
        )
    if dataset not in _RELEASED:
        raise unknown_name("data set of official heads", dataset, _RELEASED)
    if head_name not in _RELEASED[dataset]:
        raise unknown_name(f"official {dataset} head", head_name, _RELEASED[dataset])
    return f"{BASE_URL}/dinov2_{name}/dinov2_{name}_{dataset}_{_RELEASED[dataset][head_name]}_head.pth"


def load_head_weights(head: Head, weights: str | Path, backbone_name: str, dataset: str | None = None) -> None:
    """Load a trained head's weights, strictly, key for key; on an error the head is as it was.

    Args:
        head: the head to fill.
        weights: a released `.pth` (`state_dict` with `decode_head.*`), our own `head.safetensors`, a folder that
            holds one, or a `.pth` of a head's own state dict. Nothing in the file is executed.
        backbone_name: the backbone that the head stands on.
        dataset: `ade20k`, `voc2012`, `nyu` or `kitti` to check a released file against, by what tells them apart: the
            number of classes, the file's name; None does not check.

    Raises:
        UserError: no file, unreadable, hostile, other keys or shapes, values that are not finite; a released head
            over a backbone with registers, or named for another backbone, data set or head.
    """
    path = weights_file(Path(weights))
    state = read_tensors(path)
    if any(key.startswith(_HEAD_PREFIX) for key in state):
        name = _checked_backbone(backbone_name)
        if dataset is not None and dataset not in _RELEASED:
            raise unknown_name("data set of official heads", dataset, _RELEASED)
        _check_file_name(path, head, name, dataset)
        state = _head_part(state, path)
        _check_dataset(state, path, dataset)
    _check_fit(state, head, path, backbone_name)
    head.load_state_dict(state, strict=True)


def num_outputs_in(weights: str | Path) -> int:
    """How many outputs the head in a file has: its classes, or 1 for depth. `weights` as for `load_head_weights`.

    Raises:
        UserError: no file, unreadable, hostile, or no head of ours.
    """
    path = weights_file(Path(weights))
    state = {key.removeprefix(_HEAD_PREFIX): value for key, value in read_tensors(path).items()}
    if _LINEAR_DEPTH in state:  # its channels are bins
        return 1
    last = state.get(_LINEAR, state.get(_DPT_LAST))
    if last is None or last.ndim != 4:
        raise UserError(
            f"{path} holds no head that is known here; expected {_LINEAR}, {_LINEAR_DEPTH} or {_DPT_LAST} (with or "
            f"without {_HEAD_PREFIX}), got {listed(state)}."
        )
    return int(last.shape[0])


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

    Shapes alone cannot tell all: four blocks of ViT-S and one of ViT-g are equally wide, NYU and KITTI heads are alike.
    """
    match = _RELEASED_NAME.search(path.name)
    if match is None:
        return
    by_name = next((ours for ours, theirs in _RELEASED[match[2]].items() if theirs == match[3]), None)
    if by_name is None:  # such as "nyu_ms": no file of theirs
        return
    blocks = len(head.in_channels)
    if match[1] != backbone_name or _NUM_BLOCKS[by_name] != blocks or match[2] != (dataset or match[2]):
        raise UserError(
            f"{path} is by its name the official head of head={by_name} on backbone={match[1]} for {match[2]}; got a "
            f"head on {blocks} block(s) of {backbone_name}{f' for {dataset}' if dataset else ''}. Take the "
            "file that belongs to it (head.weights=official finds it)."
        )


def _head_part(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The head's tensors of an mmseg checkpoint, without their prefix."""
    ignored = [key for key in state if key.startswith(_BACKBONE_PREFIX)]
    others = [key for key in state if not key.startswith((_HEAD_PREFIX, _BACKBONE_PREFIX))]
    if others:
        raise UserError(
            f"{path} holds {listed(others)} beside its {_HEAD_PREFIX}* tensors; expected a head, or a head and its "
            "backbone. Take them out of the file if they are not needed."
        )
    if ignored:
        log.warning("%s: %d backbone.* tensors are ignored, only the head is loaded.", path, len(ignored))
    return {key.removeprefix(_HEAD_PREFIX): value for key, value in state.items() if key.startswith(_HEAD_PREFIX)}


def _check_dataset(state: Mapping[str, Tensor], path: Path, dataset: str | None) -> None:
    if dataset is None:
        return
    classes = _NUM_CLASSES.get(dataset)
    weight = state.get(_LINEAR)
    theirs = weight.shape[0] if weight is not None and weight.ndim == 4 else None
    if theirs != classes and _looks_like(state):
        task = "is a depth data set" if classes is None else f"has {classes} classes"
        raise UserError(f"{path} does not belong to {dataset}, which {task}.{_looks_like(state)}")


def _check_fit(state: Mapping[str, Tensor], head: Head, path: Path, backbone_name: str) -> None:
    """Raise unless keys, shapes and values are right."""
    wanted = head.state_dict()
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or unexpected:
        raise UserError(
            f"{path} does not fit {type(head).__name__}: {len(missing)} keys are missing ({listed(missing)}), "
            f"{len(unexpected)} are unknown ({listed(unexpected)}).{_looks_like(state)} Choose the head that the file "
            "was made for."
        )
    wrong = [key for key, value in wanted.items() if state[key].shape != value.shape]
    if wrong:
        key = next((telling for telling in (_LINEAR, _LINEAR_DEPTH, _DPT) if telling in wrong), wrong[0])
        raise UserError(
            f"{path} does not fit: {key} is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)} for "
            f"{head.num_outputs} outputs on {len(head.in_channels)} block(s) of {backbone_name}.{_looks_like(state)} "
            "Choose backbone, head and task to match the file, or another file."
        )
    broken = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise UserError(f"{path} holds values that are not finite in {listed(broken)}. Take another file.")


def _looks_like(state: Mapping[str, Tensor]) -> str:
    """A sentence on whose head the tensors could be; empty where nothing tells."""
    key = next((key for key in (_LINEAR, _LINEAR_DEPTH, _DPT) if key in state and state[key].ndim == 4), None)
    if key is None:
        return ""
    outputs, channels = state[key].shape[:2]
    if key == _LINEAR:
        dataset = next((f"{name}, " for name, num in _NUM_CLASSES.items() if num == outputs), "")
        what, sizes = f"{dataset}{outputs} classes, ", {"linear": 1, "linear4": 4}
    elif key == _LINEAR_DEPTH:  # each block brings its cls token too
        what, sizes = "depth (nyu or kitti), ", {"linear_depth": 2, "linear4_depth": 8}
    else:
        what, sizes = "", {"dpt": 1}
    owners = [
        f"head={head} backbone={backbone}"
        for backbone, width in _WIDTHS.items()
        for head, size in sizes.items()
        if width * size == channels
    ]
    return f" The file: it looks like {what}{' or '.join(owners) or f'{channels} channels'}."
