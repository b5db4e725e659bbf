"""What `mode=predict` leaves of medical predictions: label maps in the input's own geometry, and pictures of them."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dense_heads.data.labels import LabelRule
from dense_heads.data.slices import Cut
from dense_heads.data.volumes import Volume, write_labels
from dense_heads.models.card import Card
from dense_heads.report.medical_panel import class_masks, drawn_colours, montage, outlined, outlined_objects
from dense_heads.report.predictions import LabelWriter, Writer
from dense_heads.report.sheet import Pixels


class VolumeWriter(Writer):
    """`labels/NAME.nii.gz` with the input's affine, shape and orientation, and `montages/NAME.png`.

    With several labels one file for each, `labels/NAME_CLASS.nii.gz`.
    """

    def __init__(self, output: Path, card: Card, cut: Cut, ids: str = "train") -> None:
        """`ids`: `train` (0 to K-1) or `raw` (the values of the data set's own files)."""
        self.output, self.card, self.cut = output, card, cut
        self.multilabel = bool(card.settings["multilabel"])
        self.rule = LabelRule(**card.labels) if ids == "raw" and not self.multilabel else None

    def write(self, name: str, pixels: Volume, prediction: NDArray[Any]) -> None:
        """The files of one volume; `prediction` as stored."""
        labels = self.output / "labels"
        if self.multilabel:
            for label, mask in zip(self.card.classes, prediction, strict=True):
                write_labels(labels / f"{name}_{_plain(label)}.nii.gz", mask, pixels)
        elif self.rule is not None:
            raw = self.rule.to_raw(prediction.reshape(len(prediction), -1)).reshape(prediction.shape)
            write_labels(labels / f"{name}.nii.gz", raw, pixels)
        else:
            write_labels(labels / f"{name}.nii.gz", prediction, pixels)
        stack = self.cut.stack(pixels)
        palette = np.array(self.card.colours, dtype=np.uint8)
        middle = stack.grey[0]
        shown = stack.view.slices(prediction)
        sheet = montage(middle, None, shown, stack.view, palette, self.card.classes, name, self.multilabel)
        path = self.output / "montages" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)


class ContourWriter(LabelWriter):
    """`labels/NAME.png` as LabelWriter, and `overlays/NAME.png` with outlines.

    With several labels one file for each, `labels/NAME_CLASS.png`, of 0 and 255. Of single objects also
    `objects/NAME.png`, 16 bits, 0 background, 1..n.
    """

    def __init__(self, output: Path, card: Card, ids: str = "train") -> None:
        """As LabelWriter."""
        super().__init__(output, card, ids)
        self.names, self.multilabel = card.classes, bool(card.settings["multilabel"])
        self.objects = card.settings.get("objects") is not None

    def write(self, name: str, pixels: Pixels, prediction: NDArray[Any]) -> None:
        """All files of one image."""
        width = max(1, round(max(pixels.shape[:2]) / 400))
        if self.objects:
            self.save("objects", name, Image.fromarray(prediction.astype(np.uint16)))
            self.save("labels", name, self.label_map((prediction > 0).astype(np.int64)))
            colour = drawn_colours(self.palette, False)[0]
            self.save("overlays", name, Image.fromarray(outlined_objects(pixels, prediction, colour, width)))
            return
        if self.multilabel:
            for label, mask in zip(self.names, prediction, strict=True):
                self.save("labels", f"{name}_{_plain(label)}", Image.fromarray((255 * mask).astype(np.uint8)))
        else:
            self.save("labels", name, self.label_map(prediction))
        masks = class_masks(prediction, len(self.palette), self.multilabel)
        picture = outlined(pixels, masks, drawn_colours(self.palette, self.multilabel), width)
        self.save("overlays", name, Image.fromarray(picture))


def _plain(name: str) -> str:
    """A class's name as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
