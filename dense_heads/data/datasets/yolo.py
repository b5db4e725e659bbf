"""YOLO text files: `data.yaml`, images/, and labels/ with a line for each object."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dense_heads.data.datasets.base import missing_data
from dense_heads.data.datasets.object_reader import ObjectReader
from dense_heads.data.images import IMAGE_SUFFIXES, image_size, list_images
from dense_heads.data.objects import DetectionSample, Objects, ObjectsBuilder, Repairs
from dense_heads.errors import UserError

LAYOUT = """
    ROOT/
        data.yaml                                  (train, val: folders or lists of images; names)
        images/train/NAME.jpg  images/val/NAME.jpg
        labels/train/NAME.txt  labels/val/NAME.txt (class x y width height, or class x1 y1 x2 y2 ..., as shares)
"""
_KEYS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


class YoloTxt(ObjectReader):
    """Images with a text file each, in the folder `labels` beside `images`.

    A line with four numbers is a box (centre and size), one with six or more a polygon, all as shares of the image.
    An image without a text file, or with an empty one, has no objects.

    Args:
        root: the folder with `data.yaml` (or another single YAML file).
        val_fraction, seed, split, hint: as for CocoJson.

    Raises:
        UserError: no YAML file, folders that are not there, a line of another form, a class that has no name.
    """

    layout = LAYOUT

    def __init__(
        self,
        root: str | Path,
        val_fraction: float = 0.2,
        seed: int = 0,
        split: Mapping[str, Sequence[str]] | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(root, hint)
        path = yaml_file(self.root)
        if path is None:
            raise missing_data(self.root / "data.yaml", LAYOUT, hint)
        content = _content(path)
        self.category_ids, self.categories = _names(content.get("names"), path)
        base = self.root / str(content.get("path") or "")
        base = base if base.is_dir() else self.root
        repairs = []
        for name, keys in _KEYS.items():
            value = next((content[key] for key in keys if content.get(key)), None)
            if value is not None:
                images = [image for one in _listed(value) for image in _images(one, base, path)]
                repairs.append(Repairs(path))
                self.loaded[name] = [self._sample(image, base, repairs[-1]) for image in images]
        if not self.loaded:
            raise UserError(f"{path}: neither train nor val; expected the folders of images.\nThe layout is:\n{LAYOUT}")
        self.finish(repairs, split, val_fraction, seed)

    def _sample(self, image: Path, base: Path, repairs: Repairs) -> DetectionSample:
        name = image.relative_to(base) if image.is_relative_to(base) else Path(image.name)
        return DetectionSample(name.with_suffix("").as_posix(), image, objects=self._objects(image, repairs))

    def _objects(self, image: Path, repairs: Repairs) -> Objects:
        path, size = label_file(image), image_size(image)
        builder = ObjectsBuilder(size, repairs)
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text: {error}. Write the file again.") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self._add(builder, line.split(), f"{path.name}, line {number}", f"{path}, line {number}")
        return builder.build()

    def _add(self, builder: ObjectsBuilder, words: list[str], which: str, where: str) -> None:
        try:
            label, shares = int(float(words[0])), [float(word) for word in words[1:]]
        except ValueError:
            label, shares = -1, []
        polygon = len(shares) >= 6 and len(shares) % 2 == 0
        if len(shares) != 4 and not polygon:
            raise UserError(
                f"{where}: {' '.join(words)!r:.80}; expected `class x y width height`, or a class and at least three "
                "points, as shares of the image."
            )
        if label not in self.category_ids:
            raise UserError(f"{where}: class {words[0]} has no name; `names` has {self.category_ids}. Correct either.")
        height, width = builder.size
        place = self.category_ids.index(label)
        if polygon:
            points = [share * side for share, side in zip(shares, [width, height] * (len(shares) // 2), strict=True)]
            builder.add(which, None, place, outline=[points])
        else:
            x, y, w, h = shares
            box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            builder.add(which, box, place)


def yaml_file(root: Path) -> Path | None:
    """`data.yaml` of a folder, or its only YAML file; None where there is none."""
    found = sorted([*root.glob("*.yaml"), *root.glob("*.yml")])
    named = [path for path in found if path.stem == "data"]
    return next(iter(named or (found if len(found) == 1 else [])), None)


def label_file(image: Path) -> Path:
    """The text file of an image: the last folder `images` in its path becomes `labels`."""
    parts = list(image.parent.parts)
    for place in reversed(range(len(parts))):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts) / f"{image.stem}.txt"


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}. Correct the file.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys; expected train, val and names.\nThe layout is:\n{LAYOUT}")
    return content


def _names(names: Any, path: Path) -> tuple[list[int], list[str]]:
    pairs = sorted(names.items()) if isinstance(names, dict) else list(enumerate(names or []))
    ids, texts = [i for i, _ in pairs], [str(name) for _, name in pairs]
    if not ids or not all(isinstance(i, int) for i in ids) or len(set(texts)) < len(texts):
        raise UserError(f"{path}: `names` is {names!r:.100}; expected different names by class number, or a list.")
    return ids, texts


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _images(place: str, base: Path, source: Path) -> list[Path]:
    """The images of a folder, or those that a text file lists."""
    # Roboflow writes ../train/images, seen from a folder that does not exist.
    path = next((p for p in (base / place, base / place.removeprefix("../")) if p.exists()), base / place)
    if path.is_dir():
        found = list_images(path, recursive=True)
    elif path.is_file() and path.suffix == ".txt":
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [base / line for line in lines]
        gone = [image for image in found if not image.is_file() or image.suffix.lower() not in IMAGE_SUFFIXES]
        if gone:
            raise UserError(f"{path}: {len(gone)} of its images are not there, such as {gone[0]}. Correct the list.")
    else:
        raise UserError(f"{source}: {place!r} is no folder and no list of images below {base}. Correct the file.")
    if not found:
        raise UserError(f"{path}: no images; expected some.\nThe layout is:\n{LAYOUT}")
    return found
