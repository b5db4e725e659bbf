"""What a person looks at while a head learns: pictures of its predictions, in the run folder and in loggers."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import Tensor

from dense_heads.data.images import read_image
from dense_heads.errors import UserError
from dense_heads.report.sheet import Pixels
from dense_heads.structures import IMAGENET_MEAN, IMAGENET_STD, Batch, Size

# image or None, label or None, prediction, title; label and prediction are arrays, or of objects dicts of arrays
Panel = Callable[[Any, Any, Any, str], Image.Image]

Cases = Callable[[Any, Any, str], Iterable[tuple[str, Image.Image]]]


class PictureCallback(pl.Callback):
    """Draws the first images of each validation and of the test, into the run folder and to loggers that take pictures.

    Reads `outputs["prediction"]` of the step (a list of (H, W) tensors, each at its label's own size, or of objects in
    pixels of the image on disk) and the batch. Files are `pictures/val/<image_id>.png` and
    `pictures/test/<image_id>.png`; a later validation replaces them, so at the end they show the final state. Only
    rank 0 draws.
    """

    def __init__(
        self,
        folder: str | Path,
        panel: Panel | None = None,
        label_key: str | Sequence[str] = "",
        every: int = 1,
        num: int = 4,
        cases: Cases | None = None,
    ) -> None:
        """Keep what the pictures need.

        Args:
            folder: the run folder; `pictures/` is made in it.
            panel: draws (image or None, label or None, prediction, title) as one picture; None: no single images.
            label_key: where the batch keeps the labels: `mask`, `depth_m`; several keys make a dict.
            every: draw at every so many validations, and always at the last one of the training.
            num: images per validation or test; 0 draws none.
            cases: draws whole cases once a test or the last validation is measured: (module, data set, `val` or `test`)
                -> (file name, picture) of each.

        Raises:
            UserError: `every` below 1 or `num` below 0.
        """
        super().__init__()
        if every < 1 or num < 0:
            raise UserError(f"Pictures: got every={every} and num={num}; expected every >= 1 and num >= 0 (0: none).")
        self.folder = Path(folder) / "pictures"
        self.panel, self.label_key = panel, label_key
        self.every, self.num, self.cases = every, num, cases
        self._validations = 0
        self._left = 0  # pictures still to draw in this pass over the data

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were, so that a resumed run draws at the same ones."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._validations = int(state_dict["validations"])

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide whether this validation is drawn."""
        self._left = 0
        if trainer.sanity_checking:
            return
        if trainer.state.fn != TrainerFn.FITTING:  # mode=evaluate: always drawn, and no validation of the training
            self._left = self.num
            return
        last = 0 < trainer.max_steps <= trainer.global_step
        if self._validations % self.every == 0 or last:
            self._left = self.num
        self._validations += 1

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *where: int
    ) -> None:
        """Draw."""
        self._draw(trainer, outputs, batch, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The test is always drawn."""
        self._left = self.num

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *where: int
    ) -> None:
        """Draw."""
        self._draw(trainer, outputs, batch, "test")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw cases, at the end of the training and wherever there is none."""
        last = trainer.state.fn != TrainerFn.FITTING or 0 < trainer.max_steps <= trainer.global_step
        if last and not trainer.sanity_checking:
            self._draw_cases(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw cases."""
        self._draw_cases(trainer, pl_module, "test")

    def _draw_cases(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        if self.cases is None or not self.num or not trainer.is_global_zero:
            return
        shutil.rmtree(self.folder / split, ignore_errors=True)  # other cases may have been the worst before
        for name, picture in self.cases(pl_module, getattr(trainer.datamodule, split), split):  # type: ignore[attr-defined]
            self._keep(trainer, split, _file_name(name), picture)

    def _draw(self, trainer: pl.Trainer, outputs: Any, batch: Batch, split: str) -> None:
        if not trainer.is_global_zero or not self._left or self.panel is None:
            return
        predictions = outputs["prediction"]
        for index, tensor in enumerate(predictions[: self._left]):
            prediction = _numpy(tensor)
            label = _numpy(_label(batch, self.label_key, index))
            image_id = batch["image_id"][index]
            image = _restore(batch, index, _size(prediction, batch, index))
            panel = self.panel(image, label, prediction, image_id)
            self._keep(trainer, split, _file_name(image_id), panel)
        self._left -= min(self._left, len(predictions))

    def _keep(self, trainer: pl.Trainer, split: str, name: str, picture: Image.Image) -> None:
        """As a file, and in the loggers that take pictures."""
        path = self.folder / split / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    f"{split}/{name}", np.asarray(picture), trainer.global_step, dataformats="HWC"
                )
            elif isinstance(logger, WandbLogger):
                logger.log_image(f"{split}/pictures/{name}", [picture], step=trainer.global_step)


def _numpy(value: Any) -> Any:
    """Tensors as arrays, also inside a dict; anything else as it is."""
    if isinstance(value, dict):
        return {name: _numpy(part) for name, part in value.items()}
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _label(batch: Batch, key: str | Sequence[str], index: int) -> Any:
    """What is known of one image; None where nothing is."""
    if isinstance(key, str):
        return batch[key][index] if key in batch else None  # type: ignore[literal-required]
    return {one: batch[one][index] for one in key if one in batch} or None  # type: ignore[literal-required]


def _size(prediction: Any, batch: Batch, index: int) -> Size:
    """(height, width) that the prediction is at."""
    height, width = batch["original_size"][index].tolist() if isinstance(prediction, dict) else prediction.shape
    return int(height), int(width)


def _restore(batch: Batch, index: int, shape: Size) -> Pixels | None:
    """The image as RGB at the prediction's (H, W): from its file, else from the normalised tensor, else None."""
    try:
        pixels = read_image(Path(batch["path"][index]))
    except (KeyError, UserError):  # a picture is no reason to end a run: the file may be gone, the tensor is here
        tensor = _tensor(batch, index)
        if tensor is None:
            return None
        pixels = _unnormalise(tensor)
    size = (shape[1], shape[0])
    if pixels.shape[:2] != tuple(shape):
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    return pixels


def _tensor(batch: Batch, index: int) -> Tensor | None:
    """The image of a batch, the largest of its test scales; None where features stand in its place."""
    if "image" in batch:
        return batch["image"][index]
    if "views" in batch:
        return max((view for view in batch["views"][index] if isinstance(view, Tensor)), key=Tensor.numel, default=None)
    return None


def _unnormalise(image: Tensor) -> Pixels:
    """(C, H, W) ImageNet-normalised -> RGB uint8; with other than 3 channels the first one, stretched, as grey."""
    image = image.detach().float().cpu()
    if len(image) == 3:
        pixels = image * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    else:
        low, high = image[:1].min(), image[:1].max()
        pixels = ((image[:1] - low) / (high - low).clamp(min=1e-6) * 255).expand(3, -1, -1)
    rounded: Pixels = pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return rounded


def _file_name(image_id: str) -> str:
    """A name that stays inside its folder on every file system; different ids keep different names."""
    name = re.sub(r"[^\w.-]+", "_", image_id, flags=re.ASCII).lstrip(".")[:100]
    if name and name == image_id:
        return name
    return f"{name or 'image'}-{hashlib.sha256(image_id.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
