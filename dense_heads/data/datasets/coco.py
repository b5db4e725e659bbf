"""COCO JSON: detection and instance segmentation, as COCO, Roboflow and many tools write it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dense_heads.data.datasets.base import missing_data, require_files, shorten
from dense_heads.data.datasets.object_reader import ObjectReader, inside
from dense_heads.data.images import image_size
from dense_heads.data.objects import DetectionSample, ObjectsBuilder, Repairs
from dense_heads.errors import UserError


class CocoJson(ObjectReader):
    """Images in folders, annotations in one JSON file for each split.

    Categories are in the order of their ids, gaps or not; `category_ids` keeps the ids. Crowd regions are kept as such.
    Images without annotations stay in. How bad annotations are treated is said in `data/objects.py`.

    Args:
        root: the folder of the data set.
        annotations: the JSON file below it; `{split}` stands for the split's own name.
        images: the folder below it that file names are relative to.
        splits: the splits' own names, `{"train": "train2017", ...}`; a split that is left out does not exist.
        val_fraction: the share held out of training where there is no validation file.
        seed: of that choice.
        split: ids of each split, as `made_split` gave them before; nothing is drawn then.
        hint: how to get the data, shown when they are missing.

    Raises:
        UserError: missing files, JSON of another form, two splits of different categories.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str = "annotations/instances_{split}.json",
        images: str = "{split}",
        splits: Mapping[str, str] | None = None,
        val_fraction: float = 0.2,
        seed: int = 0,
        split: Mapping[str, Sequence[str]] | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(root, hint)
        self.annotations, self.images = annotations, images
        self.names = dict(splits or {"train": "train", "val": "val", "test": "test"})
        self.layout = self._layout()
        files = {split: self.root / annotations.replace("{split}", name) for split, name in self.names.items()}
        there = {name: path for name, path in files.items() if path.is_file()}
        if not there:
            raise missing_data(next(iter(files.values())), self.layout, hint)
        repairs = [Repairs(path) for path in there.values()]
        for (name, path), own in zip(there.items(), repairs, strict=True):
            self.loaded[name] = self._read(name, path, own)
        self.finish(repairs, split, val_fraction, seed)

    def _read(self, split: str, path: Path, repairs: Repairs) -> list[DetectionSample]:
        content = read_json(path)
        categories = _records(content, "categories", path, {"id": int, "name": str})
        images = _records(content, "images", path, {"id": int, "file_name": str})
        annotations = _records(content, "annotations", path, {"id": int, "image_id": int, "category_id": int})
        self._keep_categories(categories, {record["category_id"] for record in annotations}, path)
        folder = self.root / self.images.replace("{split}", self.names[split])
        label_of = {category: label for label, category in enumerate(self.category_ids)}
        builders: dict[int, ObjectsBuilder] = {}
        files: dict[int, Path] = {}
        for record in images:
            if record["id"] in files:
                raise UserError(f"{path}: image id {record['id']} stands there twice; expected each image once.")
            files[record["id"]] = inside(folder, record["file_name"], path)
            builders[record["id"]] = ObjectsBuilder(_size(record, files[record["id"]], path), repairs)
        for record in annotations:
            which = f"annotation {record['id']}"
            if record["image_id"] not in builders:
                raise UserError(
                    f"{path}: {which} is of image {record['image_id']}, which is not among its images. Add the image "
                    "or remove the annotation."
                )
            if record["category_id"] not in label_of:
                raise UserError(
                    f"{path}: {which} has category {record['category_id']}; expected one of "
                    f"{shorten([str(known) for known in label_of], 10)}. Add the category or correct the annotation."
                )
            builders[record["image_id"]].add(
                which,
                _xyxy(record.get("bbox"), which, path),
                label_of[record["category_id"]],
                iscrowd=bool(record.get("iscrowd", 0)),
                difficult=bool(record.get("difficult", 0)),
                area=_number(record.get("area"), which, path),
                outline=record.get("segmentation"),
            )
        labelled = "annotations" in content
        samples = [
            DetectionSample(
                image_id=name,
                image=files[image_id],
                objects=builders[image_id].build() if labelled else None,
                coco_id=image_id,
            )
            for (image_id, name) in zip(files, _names([record["file_name"] for record in images]), strict=True)
        ]
        if not samples:
            raise UserError(f"{path}: no images; expected some under `images`.")
        require_files(samples, path)
        return samples

    def _keep_categories(self, records: list[dict[str, Any]], used: set[int], path: Path) -> None:
        ordered = sorted(records, key=lambda record: record["id"])
        groups = {record.get("supercategory") for record in records}
        # Roboflow writes the name of the project as a category of its own, the parent of all others.
        found = [
            r for r in ordered if not (r["id"] == 0 and 0 not in used and r["name"] in groups and len(records) > 1)
        ]
        ids, names = [record["id"] for record in found], [record["name"] for record in found]
        if len(set(ids)) < len(ids) or len(set(names)) < len(names) or not ids:
            raise UserError(f"{path}: categories {shorten(names, 10)}; expected at least one, ids and names different.")
        if self.categories and (ids, names) != (self.category_ids, self.categories):
            raise UserError(
                f"{path}: its categories are {_listed(ids, names)}; another split's are "
                f"{_listed(self.category_ids, self.categories)}. Expected the same in all files of a data set."
            )
        self.category_ids, self.categories = ids, names

    def _layout(self) -> str:
        lines = []
        for name in self.names.values():
            lines.append(f"        {self.annotations.replace('{split}', name)}")
            lines.append(f"        {self.images.replace('{split}', name)}/NAME.jpg".replace("//", "/"))
        return "    ROOT/\n" + "\n".join(lines)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {str(error)[:200]}. Get or write the file again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected COCO's object with images, annotations.")
    return content


def _records(content: dict[str, Any], key: str, path: Path, needed: Mapping[str, type]) -> list[dict[str, Any]]:
    """The records under a key; annotations may be absent (a test set keeps them to itself)."""
    records = content.get(key, [] if key == "annotations" else None)
    if not isinstance(records, list):
        raise UserError(f"{path}: `{key}` is no list. Expected a COCO file with images, annotations and categories.")
    for number, record in enumerate(records):
        for name, kind in needed.items():
            value = record.get(name) if isinstance(record, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                which = f"id {record.get('id')}" if isinstance(record, dict) else f"number {number}"
                raise UserError(f"{path}: {key}, {which}: `{name}` is {value!r:.60}; expected {kind.__name__}.")
    return records


def _size(record: dict[str, Any], image: Path, path: Path) -> tuple[int, int]:
    height, width = record.get("height"), record.get("width")
    if height is None and width is None and image.is_file():
        return image_size(image)
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        raise UserError(f"{path}: image {record['id']} is of height {height!r}, width {width!r}; expected pixels.")
    return height, width


def _xyxy(box: Any, which: str, path: Path) -> list[float] | None:
    if box is None:
        return None
    numbers = isinstance(box, list) and all(isinstance(side, int | float) for side in box)
    if not numbers or len(box) != 4:
        raise UserError(f"{path}: {which}: its bbox is {box!r:.80}; expected [x, y, width, height].")
    left, top, width, height = box
    return [left, top, left + width, top + height]


def _number(value: Any, which: str, path: Path) -> float | None:
    if value is not None and not (isinstance(value, int | float) and 0 <= value < float("inf")):
        raise UserError(f"{path}: {which}: its area is {value!r:.80}; expected a number of pixels.")
    return value


def _names(files: Sequence[str]) -> list[str]:
    """Ids of images for people: the file's name without its suffix, where that is enough to tell them apart."""
    stems = [Path(name).with_suffix("").as_posix() for name in files]
    return stems if len(set(stems)) == len(stems) else list(files)


def _listed(ids: Sequence[int], names: Sequence[str]) -> str:
    return shorten([f"{i} {name}" for i, name in zip(ids, names, strict=True)], 10)
