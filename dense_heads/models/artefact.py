"""A trained head on disk: `head.safetensors` and `card.json`, no pickle, no code.

The card says everything that is needed to use the head again: which backbone (and its fingerprint), which head with
which plain arguments, the classes, the preprocessing and the windows it was measured with, and the licence.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dense_heads.backbones.weights import load_backbone, save_backbone
from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.models.card import Card, read_card, write_card
from dense_heads.models.classifier import Classifier
from dense_heads.models.dense import DenseModel, FrozenBackbone
from dense_heads.models.depther import Depther
from dense_heads.models.detector import Detector
from dense_heads.models.medical import MedicalSegmentor
from dense_heads.models.segmentor import Segmentor
from dense_heads.ops.files import write_atomically

HEAD_FILE = "head.safetensors"
BACKBONE_FILE = "backbone.safetensors"  # beside the head where the backbone was trained with it
MODELS: dict[str, type[DenseModel]] = {
    "segmentation": Segmentor,
    "depth": Depther,
    "medical": MedicalSegmentor,
    "detection": Detector,
    "classification": Classifier,
}


def head_target(head: type) -> str:
    """The import path of a head class, as a card names it."""
    return f"{head.__module__}.{head.__qualname__}"


def save_artefact(folder: Path, head: Head, card: Card, backbone: FrozenBackbone) -> None:
    """Write both files into `folder`, and the backbone's weights where it was trained."""
    if backbone.learns:
        save_backbone(backbone.backbone, folder / BACKBONE_FILE)
    tensors = {key: value.detach().contiguous().cpu() for key, value in head.state_dict().items()}
    metadata = {"format": "pt", "task": card.task, "head": card.head["name"]}
    write_atomically(folder / HEAD_FILE, save(tensors, metadata=metadata))
    write_card(folder, card)


def make_head(target: str, arguments: Mapping[str, Any], num_outputs: int, backbone: FrozenBackbone) -> Head:
    """The head that a card describes; a card never decides what code runs beyond the heads of this package.

    Raises:
        UserError: the target is no Head of dense_heads, or its arguments do not fit.
    """
    module_name, _, class_name = target.rpartition(".")
    found = None
    if module_name.startswith("dense_heads.heads.") and class_name.isidentifier():
        try:
            found = getattr(importlib.import_module(module_name), class_name, None)
        except ImportError:
            found = None
    if not (isinstance(found, type) and issubclass(found, Head) and found.__module__ == module_name):
        raise UserError(
            f"The card asks for the head {target!r}. Only heads of dense_heads.heads are loaded from a card, "
            "because a file must not decide what code runs."
        )
    try:
        return found(backbone.widths(arguments), num_outputs, **arguments)
    except TypeError as error:
        raise UserError(f"The card's arguments do not fit {target}: {error}.") from error


def load_head_tensors(head: Head, path: Path) -> None:
    """Fill a head from `head.safetensors`, strictly.

    Raises:
        UserError: the file is missing, truncated, or of another head.
    """
    try:
        head.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}. Copy it again from the run.") from error
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its card: {' '.join(str(error).split())[:400]}") from error


def trained_head(folder: Path, backbone: FrozenBackbone, num_outputs: int | None = None) -> Head:
    """The head of a finished run on a backbone that is already there.

    Raises:
        UserError: the files are missing or broken, the backbone is not the one that the head was trained on, or the
            head predicts another number of classes than `num_outputs`.
    """
    card = read_card(folder)
    ours = backbone.fingerprint()
    if card.backbone["fingerprint"] != ours:
        raise UserError(
            f"{folder}: the head was trained on {card.backbone['name']} with weights {card.backbone['weights']!r} "
            f"(fingerprint {card.backbone['fingerprint']}); this is {backbone.backbone.name} with fingerprint {ours}. "
            "Use the same backbone and weights."
        )
    if num_outputs is not None and num_outputs != card.num_outputs:
        raise UserError(
            f"{folder}: the head predicts {card.num_outputs} classes ({card.task}), the task has {num_outputs}. "
            "Evaluate it on a task with the same classes."
        )
    head = make_head(card.head["target"], card.head["arguments"], card.num_outputs, backbone)
    load_head_tensors(head, folder / HEAD_FILE)
    return head


def own_backbone(folder: Path, name: str) -> Path | None:
    """The weights of the backbone `name` in the folder of a run that trained it; None where none was trained."""
    own = read_card(folder).backbone
    if own["weights"] != BACKBONE_FILE or own["name"] != name:
        return None
    return (folder if folder.is_dir() else folder.parent) / BACKBONE_FILE


def assemble(card: Card, backbone: FrozenBackbone, head: Head) -> DenseModel:
    """The model of the card's family.

    Raises:
        UserError: a family that there is not, or preprocessing or inference with unknown arguments.
    """
    if card.family not in MODELS:
        raise UserError(f"The card's family {card.family!r} is not one of {', '.join(MODELS)}.")
    try:
        return MODELS[card.family](backbone, head, card).eval()
    except TypeError as error:
        raise UserError(f"The card's preprocessing or inference does not fit this version: {error}.") from error


def load_model(path: str | Path, device: str = "cpu") -> DenseModel:
    """A trained model, ready for `predict`: from a finished run's folder, or its `head.safetensors`.

    Raises:
        UserError: nothing is there, the files are broken, the backbone's weights are not to be had, or they are not
            those that the head was trained on.
    """
    folder = Path(path)
    folder = folder if folder.is_dir() else folder.parent
    card = read_card(folder)
    arguments = {key: value for key, value in card.backbone.items() if key != "fingerprint"}
    if (own := own_backbone(folder, card.backbone["name"])) is not None:
        arguments["weights"] = own
    try:
        loaded = load_backbone(**arguments)
    except TypeError as error:
        raise UserError(f"{folder}: the backbone's arguments do not fit this version: {error}.") from error
    backbone = FrozenBackbone(loaded, card.preprocessing["patch_fit"], card.preprocessing.get("precision", "float32"))
    return assemble(card, backbone, trained_head(folder, backbone)).to(device)
