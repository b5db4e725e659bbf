"""What `mode=predict` is given: files to find, and how one is read."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from dense_heads.data.images import UInt8, list_images, read_image
from dense_heads.errors import UserError

Named = tuple[Any, str]  # what to read, and its name below the output folder


class Inputs(Protocol):
    """Things to predict, found and read."""

    kind: str  # what they are called: `images`

    def find(self, source: Path) -> list[Named]:
        """All that is at `source`; UserError where there is nothing."""
        ...

    def read(self, item: Any) -> Any:
        """What the model's `predict` takes; UserError where it cannot be read."""
        ...


class Pictures:
    """An image file, or a folder of them and its sub-folders."""

    kind = "images"

    def find(self, source: Path) -> list[Named]:
        """The images, each with its name below the output folder; files that differ in their suffix only keep it."""
        if source.is_file():
            return named([source], source.parent)
        if not source.is_dir():
            raise UserError(f"input={source} does not exist. Expected an image file or a folder of images.")
        images = list_images(source, recursive=True)
        if not images:
            raise UserError(f"input={source} holds no image files (png, jpg, tif, webp, bmp).")
        return named(images, source)

    def read(self, item: Path) -> UInt8:
        """(H, W, 3) uint8."""
        return read_image(item)


def named(paths: Sequence[Path], root: Path) -> list[Named]:
    """Each file with its path below `root` without suffix, or with it where two would have one name."""
    relative = [path.relative_to(root) for path in paths]
    stems = Counter(path.with_suffix("") for path in relative)
    names = [
        path.as_posix() if stems[path.with_suffix("")] > 1 else path.with_suffix("").as_posix() for path in relative
    ]
    return list(zip(paths, names, strict=True))
