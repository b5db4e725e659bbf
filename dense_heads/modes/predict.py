"""`mode=predict`: a trained model on a file or a folder: images of any size and mode, or volumes."""

import logging
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import track

from dense_heads.build.model import make_model
from dense_heads.build.parts import family_of
from dense_heads.errors import UserError

log = logging.getLogger("dense_heads")


def main(cfg: DictConfig) -> None:
    """Predict everything at `input` into `output`; unreadable files are named at the end and stop nothing.

    Raises:
        UserError: a key is missing, there is nothing to read, or not one file could be read.
    """
    if cfg.input is None or cfg.output is None:
        raise UserError("mode=predict needs model=RUN, input=FILE_OR_FOLDER and output=FOLDER.")
    if not Path(cfg.input).exists():
        raise UserError(f"input={cfg.input} does not exist. Expected a file or a folder.")
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)  # if it cannot be, say so before the work
    model = make_model(cfg).to("cuda" if torch.cuda.is_available() else "cpu")
    found = model.inputs.find(Path(cfg.input))
    writer = family_of(cfg).writer(cfg, output, model.card)
    failed = []
    for source, name in track(found, description="predict", transient=True):
        try:
            seen = model.inputs.read(source)
            prediction = model.predict(seen)
        except UserError as error:
            failed.append(str(error) if str(getattr(source, "image", source)) in str(error) else f"{source}: {error}")
            continue
        writer.write(name, seen, prediction)
    writer.close()
    log.info("%d of %d %s predicted into %s", len(found) - len(failed), len(found), model.inputs.kind, output)
    if failed:
        log.warning("%d could not be read:\n%s", len(failed), "\n".join(failed))
        if len(failed) == len(found):
            raise UserError(f"None of the {len(found)} files of {cfg.input} could be read:\n" + "\n".join(failed[:5]))
