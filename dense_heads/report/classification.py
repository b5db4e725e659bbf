"""Classes of whole images for people: a picture with the most probable classes, and a table of predictions."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dense_heads.models.card import Card
from dense_heads.ops.files import write_atomically
from dense_heads.report.predictions import Writer
from dense_heads.report.sheet import Colour, Pixels, compose

SHOWN = 5  # classes
SIDE = 320  # pixels of a picture's longer side


def classification_panel(
    image: Pixels | None,
    label: Any,
    prediction: Mapping[str, NDArray[Any]],
    palette: Pixels,
    names: Sequence[str],
    title: str = "",
) -> Image.Image:
    """The image with its class, whether that was found, and the most probable classes below.

    Args:
        image: RGB (H, W, 3) uint8; None where there is none to show.
        label: the class's id, or None where it is not known.
        prediction: `probabilities` (K,).
        palette: (K, 3).
        names: K names.
        title: one line above.
    """
    probabilities = prediction["probabilities"]
    best = most_probable(probabilities)
    shown = np.full((SIDE, SIDE, 3), 235, np.uint8) if image is None else _fitted(image)
    caption = f"predicted: {names[best[0]]}"
    if label is not None:
        caption = f"{names[int(label)]}: {'right' if int(label) == best[0] else 'wrong'}"
    legend: list[tuple[str, Colour | None]] = [
        (f"{names[i]} {100 * probabilities[i]:.0f} %", (int(palette[i][0]), int(palette[i][1]), int(palette[i][2])))
        for i in best
    ]
    return compose([(caption, shown)], 1, legend, title)


def most_probable(probabilities: NDArray[Any]) -> list[int]:
    """The ids of the most probable classes, best first."""
    return [int(i) for i in np.argsort(-probabilities, kind="stable")[:SHOWN]]


def _fitted(image: Pixels) -> Pixels:
    factor = SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


class ClassWriter(Writer):
    """`predictions.csv` (image, and its most probable classes with their probabilities) and `pictures/NAME.png`."""

    def __init__(self, output: Path, card: Card) -> None:
        self.output, self.names = output, list(card.classes)
        self.palette = np.array(card.colours, dtype=np.uint8)
        self.rows: list[list[str]] = []

    def write(self, name: str, pixels: Pixels, prediction: NDArray[Any]) -> None:
        """Draw one image and keep its line."""
        best = most_probable(prediction)
        self.rows.append([name, *(cell for i in best for cell in (self.names[i], f"{prediction[i]:.6f}"))])
        picture = classification_panel(pixels, None, {"probabilities": prediction}, self.palette, self.names, name)
        path = self.output / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)

    def close(self) -> None:
        """Write the table."""
        num = min(SHOWN, len(self.names))
        head = ["image", *(f"{what}_{place}" for place in range(1, num + 1) for what in ("class", "probability"))]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([head, *self.rows])
        write_atomically(self.output / "predictions.csv", text.getvalue())
