"""The card of a trained head: everything but its weights, as plain values in `card.json`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dense_heads.errors import UserError
from dense_heads.ops.files import write_atomically

CARD_FILE = "card.json"


@dataclass(frozen=True)
class Card:
    """Which backbone and head, what is predicted, how images are prepared and looked at, and the licence."""

    family: str
    task: str
    backbone: dict[str, Any]  # arguments of load_backbone, and the fingerprint
    head: dict[str, Any]  # name, target, arguments
    num_outputs: int
    classes: list[str]
    colours: list[list[int]]
    labels: dict[str, Any]  # arguments of LabelRule: raw value <-> class
    preprocessing: dict[str, Any]  # arguments of EvalTransform, and the patch fit and precision of the backbone
    inference: dict[str, Any]  # arguments of Inference
    licence: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)  # what only the family's model needs
    overrides: list[str] = field(default_factory=list)
    version: int = 1


_NEEDED = {
    "backbone": ("name", "weights", "fingerprint"),
    "head": ("name", "target", "arguments"),
    "preprocessing": ("patch_fit",),
    "inference": (),
}


def write_card(folder: Path, card: Card) -> None:
    """Write `card.json` into `folder`."""
    write_atomically(folder / CARD_FILE, json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n")


def read_card(folder: Path) -> Card:
    """The card of a run folder, or beside an artefact's file.

    Raises:
        UserError: no finished run is there, or the card is not readable.
    """
    path = (folder if folder.is_dir() else folder.parent) / CARD_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no trained head ({CARD_FILE} is missing). Expected the folder of a finished run; "
            "one that was stopped goes on with resume=RUN."
        )
    try:
        card = Card(**json.loads(path.read_text(encoding="utf-8")))
        for part, keys in _NEEDED.items():
            content = getattr(card, part)
            missing = [key for key in keys if key not in content] if isinstance(content, dict) else list(keys)
            if missing:
                raise ValueError(f"{part} lacks {', '.join(missing)}")
        if card.version != Card.version:
            raise ValueError(f"it is of version {card.version}, this is {Card.version}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a card that this version reads: {error}.") from error
    return card
