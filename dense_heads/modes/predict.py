"""`mode=predict`: a trained model on a file or a folder of images of any size and mode."""

import logging
from collections import Counter
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import track

from dense_heads.build.model import make_model
from dense_heads.build.parts import family_of
from dense_heads.data.images import list_images, read_image
from dense_heads.errors import UserError

log = logging.getLogger("dense_heads")


def main(cfg: DictConfig) -> None:
    """Predict every image of `input` into `output`; unreadable files are named at the end and stop nothing.

    Raises:
        UserError: a key is missing, there is nothing to read, or not one file could be read.
    """
    if cfg.input is None or cfg.output is None:
        raise UserError("mode=predict needs model=RUN, input=FILE_OR_FOLDER and output=FOLDER.")
    images = images_in(Path(cfg.input))
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)  # if it cannot be, say so before the work
    model = make_model(cfg).to("cuda" if torch.cuda.is_available() else "cpu")
    writer = family_of(cfg).writer(cfg, output, model.card)
    failed = []
    for source, name in track(named(images, Path(cfg.input)), description="predict", transient=True):
        try:
            pixels = read_image(source)
            prediction = model.predict(pixels)
        except UserError as error:
            failed.append(str(error) if str(source) in str(error) else f"{source}: {error}")
            continue
        writer.write(name, pixels, prediction)
    log.info("%d of %d images predicted into %s", len(images) - len(failed), len(images), output)
    if failed:
        log.warning("%d could not be read:\n%s", len(failed), "\n".join(failed))
        if len(failed) == len(images):
            raise UserError(f"None of the {len(images)} files of {cfg.input} could be read:\n" + "\n".join(failed[:5]))


def images_in(source: Path) -> list[Path]:
    """The image files that `input` names.

    Raises:
        UserError: nothing is there, or no image.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"input={source} does not exist. Expected an image file or a folder of images.")
    images = list_images(source, recursive=True)
    if not images:
        raise UserError(f"input={source} holds no image files (png, jpg, tif, webp, bmp).")
    return images


def named(images: list[Path], source: Path) -> list[tuple[Path, str]]:
    """Each image with its name below the output folder; files that differ in their suffix only keep it."""
    root = source if source.is_dir() else source.parent
    relative = [path.relative_to(root) for path in images]
    stems = Counter(path.with_suffix("") for path in relative)
    names = [
        path.as_posix() if stems[path.with_suffix("")] > 1 else path.with_suffix("").as_posix() for path in relative
    ]
    return list(zip(images, names, strict=True))
