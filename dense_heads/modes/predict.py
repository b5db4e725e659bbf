"""`mode=predict`: label maps and overlays for a file or a folder of images."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from rich.progress import track

from dense_heads.build.model import make_model
from dense_heads.data.images import list_images, read_image
from dense_heads.data.labels import LabelRule
from dense_heads.errors import UserError
from dense_heads.report.panel import overlay

log = logging.getLogger("dense_heads")


def main(cfg: DictConfig) -> None:
    """Predict every image of `input` into `output`; unreadable files are named at the end and stop nothing.

    Writes `labels/NAME.png` (palette PNG of class ids at the image's own size) and `overlays/NAME.png`.
    """
    if cfg.input is None or cfg.output is None:
        raise UserError("mode=predict needs model=RUN, input=FILE_OR_FOLDER and output=FOLDER.")
    if cfg.output_ids not in ("train", "raw"):
        raise UserError(f"output_ids={cfg.output_ids}; expected train (0 to K-1) or raw (the data set's own values).")
    images = _images(Path(cfg.input))
    output = Path(cfg.output)
    model = make_model(cfg).to("cuda" if torch.cuda.is_available() else "cpu")
    rule = LabelRule(**model.card.labels)
    palette = np.array(model.card.colours, dtype=np.uint8)
    failed = []
    for source, name in track(list(_names(images, Path(cfg.input))), description="predict", transient=True):
        try:
            pixels = read_image(source)
        except UserError as error:
            failed.append(str(error))
            continue
        labels = model.predict(pixels)
        _save_labels(output / "labels" / f"{name}.png", labels, palette, rule if cfg.output_ids == "raw" else None)
        _save(output / "overlays" / f"{name}.png", Image.fromarray(overlay(pixels, labels, palette)))
    log.info("%d of %d images predicted into %s", len(images) - len(failed), len(images), output)
    if failed:
        log.warning("%d could not be read:\n%s", len(failed), "\n".join(failed))
        if len(failed) == len(images):
            raise UserError(f"None of the {len(images)} files of {cfg.input} could be read:\n" + "\n".join(failed[:5]))


def _images(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"input={source} does not exist. Expected an image file or a folder of images.")
    images = list_images(source, recursive=True)
    if not images:
        raise UserError(f"input={source} holds no image files (png, jpg, tif, webp, bmp).")
    return images


def _names(images: list[Path], source: Path) -> list[tuple[Path, str]]:
    """Each image with its name below the output folder; files that differ in their suffix only keep it."""
    root = source if source.is_dir() else source.parent
    relative = [path.relative_to(root) for path in images]
    stems = Counter(path.with_suffix("") for path in relative)
    names = [
        path.as_posix() if stems[path.with_suffix("")] > 1 else path.with_suffix("").as_posix() for path in relative
    ]
    return list(zip(images, names, strict=True))


def _save_labels(path: Path, labels: np.ndarray, palette: np.ndarray, rule: LabelRule | None) -> None:
    if rule is not None:
        _save(path, Image.fromarray(rule.to_raw(labels)))
        return
    picture = Image.fromarray(labels.astype(np.uint8), mode="P")
    picture.putpalette(palette.tobytes())
    _save(path, picture)


def _save(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
