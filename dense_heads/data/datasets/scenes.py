"""The procedural indoor scenes as data sets: drawn into a folder once, then read like anyone's own data."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import track

from dense_heads.data.datasets.base import Sample, Split
from dense_heads.data.datasets.depth_folders import DepthFolders
from dense_heads.data.datasets.folders import PairedFolders
from dense_heads.data.images import open_image
from dense_heads.data.scenes import CLASSES, THINGS, VERSION, camera_intrinsics, extent, render_scene
from dense_heads.errors import UserError
from dense_heads.ops.seeding import stable_seed
from dense_heads.structures import Size

log = logging.getLogger(__name__)

DEPTH_SCALE = 1000.0  # stored depth is 16-bit millimetres
_MARK = "scenes.json"  # stands in a folder that is whole
_SPLIT_FOLDERS = {"train": "train", "val": "val"}


class SceneMasks(PairedFolders):
    """Semantic segmentation of the indoor scenes; what is missing below `root` is drawn first (`draw_scenes`).

    Args:
        root: where scenes are kept.
        num_train: scenes to train on.
        num_val: scenes to measure on.
        size: (height, width) of the images.
        hint: unused, as nothing has to be got; readers all take it.

    Raises:
        UserError: see `draw_scenes`.
    """

    def __init__(
        self,
        root: str | Path,
        num_train: int = 400,
        num_val: int = 100,
        size: Sequence[int] = (240, 320),
        hint: str = "",
    ) -> None:
        folder = draw_scenes(root, num_train, num_val, size)
        super().__init__(folder, "images/{split}", "masks/{split}", splits=_SPLIT_FOLDERS, hint=hint)


class SceneDepth(DepthFolders):
    """Depth of the same scenes, with the focal length of their camera; what is missing is drawn first.

    Args:
        root: where scenes are kept; the same as for `SceneMasks`, so that they are drawn once for both.
        num_train: scenes to train on.
        num_val: scenes to measure on.
        size: (height, width) of the images.
        hint: unused, as nothing has to be got; readers all take it.

    Raises:
        UserError: see `draw_scenes`.
    """

    def __init__(
        self,
        root: str | Path,
        num_train: int = 400,
        num_val: int = 100,
        size: Sequence[int] = (240, 320),
        hint: str = "",
    ) -> None:
        folder = draw_scenes(root, num_train, num_val, size)
        self.focal = float(camera_intrinsics((size[0], size[1]))[0, 0])
        super().__init__(folder, "images/{split}", "depth/{split}", splits=_SPLIT_FOLDERS, hint=hint)

    def samples(self, split: Split) -> list[Sample]:
        """The split's samples, sorted by id; [] for the test split, which does not exist."""
        return [replace(sample, focal=self.focal) for sample in super().samples(split)]


@dataclass(frozen=True, eq=False)
class SceneObjects:
    """The boxes and spheres of one scene; n is the number of those of which a pixel is visible, none is left out."""

    boxes: npt.NDArray[np.float32]  # (n, 4) xyxy pixels, the far edges exclusive: the extent of the visible pixels
    labels: npt.NDArray[np.int64]  # (n,) 0 = box, 1 = sphere: the places in `data.scenes.THINGS`
    masks: npt.NDArray[np.bool_]  # (n, H, W) the visible pixels


def scene_objects(folder: Path, split: str, image_id: str) -> SceneObjects:
    """What `instances/` and `masks/` of a drawn folder say about one scene, exactly as `render_scene` made it.

    Args:
        folder: what `draw_scenes` gave.
        split: train | val.
        image_id: as the readers' samples have it, `000000`.

    Raises:
        UserError: one of the files is not there, or is no image.
    """
    instances, classes = (_stored(folder / kind / split / f"{image_id}.png") for kind in ("instances", "masks"))
    masks = np.asarray(instances[None] == np.arange(1, int(instances.max()) + 1)[:, None, None])
    of_class = [int(classes[mask][0]) for mask in masks]
    return SceneObjects(
        boxes=np.array([extent(mask) for mask in masks], np.float32).reshape(-1, 4),
        labels=np.array([THINGS.index(label) for label in of_class], np.int64),
        masks=masks,
    )


def draw_scenes(root: str | Path, num_train: int = 400, num_val: int = 100, size: Sequence[int] = (240, 320)) -> Path:
    """The folder below `root` with these scenes; drawn when they are not there yet.

    Every size and number of scenes, and every version of the generator, has a folder of its own, so nothing is ever
    drawn over. It appears under its name when it is whole; processes that want the same one draw it once. Inside:
    `images/SPLIT/000000.png` RGB; `masks/` 8-bit class ids; `depth/` 16-bit millimetres along the optical axis;
    `instances/` 16-bit, 0 = room, and a number for each box and sphere; `scenes.json` says the rest (seeds, camera).

    Args:
        root: made when it does not exist.
        num_train: scenes of the training split; the first n are the same whatever the number is.
        num_val: scenes of the validation split; none of them is in the training split.
        size: (height, width).

    Raises:
        UserError: numbers that are not positive, a size that is none, a folder that cannot be written.
    """
    height_width = _checked(num_train, num_val, size)
    name = f"v{VERSION}-{height_width[0]}x{height_width[1]}-{num_train}+{num_val}"
    folder, part = Path(root) / name, Path(root) / f".{name}.part"
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        if not (folder / _MARK).is_file():
            with FileLock(Path(root) / f".{name}.lock"):
                if not (folder / _MARK).is_file():  # another process may have drawn them while we waited
                    if folder.exists():
                        raise UserError(
                            f"{folder} is there, but has no {_MARK}: it is not a folder of drawn scenes. Expected one, "
                            "or nothing, under this name. Move it away, or set data.root=FOLDER."
                        )
                    log.info("drawing %d scenes into %s, once", num_train + num_val, folder)
                    shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
                    _draw(part, {"train": num_train, "val": num_val}, height_width)
                    os.replace(part, folder)
    except OSError as error:
        raise UserError(
            f"The scenes cannot be drawn into {folder}: {error}. Expected a folder that can be written, with about "
            f"{_megabytes(num_train + num_val, height_width)} MB to spare. Set data.root=FOLDER."
        ) from error
    return folder


def scene_seed(split: str, index: int) -> int:
    """The seed of a scene; no two splits share one."""
    return stable_seed("scene", split, index)


def _checked(num_train: int, num_val: int, size: Sequence[int]) -> Size:
    if min(num_train, num_val) < 1:
        raise UserError(f"{num_train} training and {num_val} validation scenes were asked for; expected 1 of each.")
    if len(size) != 2 or min(size) < 8:
        raise UserError(f"Scenes of size {list(size)} were asked for; expected [height, width], each at least 8.")
    return int(size[0]), int(size[1])


def _draw(folder: Path, splits: dict[str, int], size: Size) -> None:
    todo = [(split, index) for split, num in splits.items() for index in range(num)]
    for split in splits:
        for kind in ("images", "masks", "depth", "instances"):
            (folder / kind / split).mkdir(parents=True)
    console = Console(stderr=True)
    for split, index in track(
        todo, description="scenes", console=console, transient=True, disable=not console.is_terminal
    ):
        scene = render_scene(scene_seed(split, index), size)
        name = f"{index:06d}.png"
        _save(scene.image, folder / "images" / split / name)
        _save(scene.labels.astype(np.uint8), folder / "masks" / split / name)
        _save(np.round(scene.depth_m * DEPTH_SCALE).astype(np.uint16), folder / "depth" / split / name)
        _save(scene.instances.astype(np.uint16), folder / "instances" / split / name)
    about = {
        "version": VERSION,
        "size": size,
        "splits": splits,
        "classes": CLASSES,
        "seeds": {split: [scene_seed(split, index) for index in range(num)] for split, num in splits.items()},
        "intrinsics": camera_intrinsics(size).tolist(),
        "depth_per_metre": DEPTH_SCALE,
    }
    (folder / _MARK).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _stored(path: Path) -> npt.NDArray[Any]:
    with open_image(path) as image:
        return np.asarray(image)


def _save(pixels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16], path: Path) -> None:
    Image.fromarray(pixels).save(path, compress_level=1)  # noisy images hardly get smaller with more effort


def _megabytes(num: int, size: Size) -> int:
    return max(1, round(num * size[0] * size[1] * 2.3 / 1e6))  # bytes a pixel of the four files, as measured
