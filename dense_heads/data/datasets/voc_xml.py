"""Pascal VOC detection: one XML file of boxes for each image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from dense_heads.data.datasets.base import missing_data, read_list, require_files
from dense_heads.data.datasets.object_reader import ObjectReader, inside
from dense_heads.data.images import list_images
from dense_heads.data.objects import DetectionSample, Objects, ObjectsBuilder, Repairs
from dense_heads.errors import UserError

LAYOUT = """
    ROOT/
        JPEGImages/NAME.jpg
        Annotations/NAME.xml
        ImageSets/Main/train.txt  val.txt          (names, one a line)
"""
_LARGEST_FILE = 10_000_000  # bytes of an XML file; VOC's have about 1,000


class VocXml(ObjectReader):
    """Images, XML files of the same names, and lists of names.

    Boxes in the files are 1-based and inclusive: (1, 1, 1, 1) is the first pixel. Objects marked difficult are kept as
    such. Of a line in a list the first word counts. Categories are the names that occur, sorted.

    Args:
        root: the folder with JPEGImages and Annotations, or one above it (`VOCdevkit`).
        year: of the folder below it.
        splits: the names of the splits' lists, `{"train": "trainval", "val": "test"}`.
        fallback: the names to take where a list of `splits` is missing; a run then says so.
        val_fraction, seed, split, hint: as for CocoJson.

    Raises:
        UserError: missing folders or files, XML of another form.
    """

    layout = LAYOUT

    def __init__(
        self,
        root: str | Path,
        year: int | None = None,
        splits: Mapping[str, str] | None = None,
        fallback: Mapping[str, str] | None = None,
        val_fraction: float = 0.2,
        seed: int = 0,
        split: Mapping[str, Sequence[str]] | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(root, hint)
        places = [self.root / "VOCdevkit" / f"VOC{year}", self.root / f"VOC{year}", self.root]
        found = next((place for place in places if (place / "Annotations").is_dir()), None)
        if found is None:
            raise missing_data((places[1] if year else self.root) / "Annotations", LAYOUT, hint)
        self.root = found
        repairs = Repairs(self.root / "Annotations")
        lists = self._lists(dict(splits or {"train": "train", "val": "val", "test": "test"}), fallback)
        for name, path in lists.items():
            self.loaded[name] = self._read([line.split()[0] for line in read_list(path)], repairs)
        if not lists:
            self.loaded["train"] = self._read([p.stem for p in list_images(self.root / "JPEGImages")], repairs)
        self.sort_categories()
        self.category_ids = list(range(1, len(self.categories) + 1))
        self.finish([repairs], split, val_fraction, seed)

    def _lists(self, wanted: Mapping[str, str], fallback: Mapping[str, str] | None) -> dict[str, Path]:
        folder = self.root / "ImageSets" / "Main"
        paths = {split: folder / f"{name}.txt" for split, name in wanted.items()}
        missing = [path for path in paths.values() if not path.is_file()]
        if missing and fallback:
            self.notice(f"not comparable: {missing[0]} is missing; {' and '.join(fallback.values())} are used")
            paths = {split: folder / f"{name}.txt" for split, name in fallback.items()}
        return {split: path for split, path in paths.items() if path.is_file()}

    def _read(self, names: Sequence[str], repairs: Repairs) -> list[DetectionSample]:
        images, samples = self.root / "JPEGImages", []
        for name in names:
            image = inside(images, f"{name}.jpg", self.root)
            if not image.is_file():
                image = next((path for path in sorted(images.glob(f"{name}.*"))), image)
            samples.append(DetectionSample(name, image, objects=self._objects(name, repairs)))
        require_files(samples, self.root)
        return samples

    def _objects(self, name: str, repairs: Repairs) -> Objects:
        path = self.root / "Annotations" / f"{name}.xml"
        root = _parsed(path)
        height, width = (_number(root, f"size/{side}", path) for side in ("height", "width"))
        builder = ObjectsBuilder((int(height), int(width)), repairs)
        for number, node in enumerate(root.findall("object"), start=1):
            left, top, right, bottom = (_number(node, f"bndbox/{e}", path) for e in ("xmin", "ymin", "xmax", "ymax"))
            category = (node.findtext("name") or "").strip()
            if not category:
                raise UserError(f"{path}: object {number} has no name; expected the name of its class.")
            if category not in self.categories:
                self.categories.append(category)
            builder.add(
                f"{path.name}, object {number}",
                [left - 1, top - 1, right, bottom],
                self.categories.index(category),
                difficult=(node.findtext("difficult") or "").strip() == "1",
            )
        return builder.build()


def _parsed(path: Path) -> ElementTree.Element:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; expected the annotations of one image.")
        return ElementTree.fromstring(path.read_bytes())  # expat itself refuses entities that grow without measure
    except OSError as error:
        raise UserError(
            f"{path}: no annotations of this image ({error.strerror}). Add them, or correct the list."
        ) from error
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path} cannot be read as XML: {error}. Expected a whole VOC annotation.") from error


def _number(node: ElementTree.Element, where: str, path: Path) -> float:
    text = node.findtext(where)
    try:
        return float(text or "")
    except ValueError as error:
        raise UserError(f"{path}: <{where}> is {text!r:.60}; expected a number of pixels.") from error
