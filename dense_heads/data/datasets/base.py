"""What every reader of an on-disk format shares: its samples and its errors."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from dense_heads.errors import UserError
from dense_heads.ops.seeding import stable_seed

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLIT_NAMES: dict[str, tuple[str, ...]] = {  # of folders and lists, the usual first
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Sample:
    """One image and its label on disk."""

    image_id: str
    image: Path
    mask: Path | None = None  # None where a test set keeps its labels to itself
    depth: Path | None = None
    focal: float | None = None  # pixels, of the image on disk


class Reader(Protocol):
    """A data set on disk. `notices` are sentences that a run must show, such as "not comparable"."""

    notices: list[str]

    def available(self) -> list[Split]:
        """The splits that there are, so that one without training images can still be measured."""
        ...

    def samples(self, split: Split) -> list[Sample]:
        """The samples of a split in a fixed order; [] for a test split that does not exist."""
        ...


def missing_data(what: Path, layout: str, hint: str = "") -> UserError:
    """The error for data that are not there: the place looked in, the layout expected, how to get them."""
    looked = f"{what.resolve()} does not exist or is no folder."
    get_it = hint.strip() or "Set data.root=FOLDER to the folder that holds it."
    return UserError(f"{looked}\nExpected this layout:\n{layout.strip(chr(10))}\nHow to get it: {get_it}")


def read_list(path: Path) -> list[str]:
    """The names in a split list (`train.txt`), one a line, blank lines left out.

    Raises:
        UserError: the file cannot be read, is empty, or names a sample twice.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of samples ({error}). Expected one name a line.") from error
    if not names:
        raise UserError(f"{path}: the list is empty; expected one name a line.")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: {shorten(twice)} named more than once; expected each sample once. Remove the copies.")
    return names


@dataclass(frozen=True)
class Pair:
    """A line of a list of pairs: paths as they stand there, without a leading slash."""

    image: str
    depth: str | None  # None where the list says `None`: there is no measurement
    focal: float | None  # pixels


def read_pairs(path: Path) -> list[Pair]:
    """The lines `image depth [focal length]` of a list, sorted by the image (as the published evaluations do).

    Raises:
        UserError: the file cannot be read, is empty, names an image twice, or a line has another form.
    """
    pairs: dict[str, Pair] = {}
    for line in read_list(path):
        fields = line.split()
        try:
            focal = float(fields[2]) if len(fields) == 3 else None
        except ValueError:
            fields = []
        outside = any(".." in Path(name).parts for name in fields[:2])
        if len(fields) not in (2, 3) or outside or (focal is not None and not 0 < focal < math.inf):
            raise UserError(
                f"{path}: the line {line[:200]!r}; expected `IMAGE DEPTH` or `IMAGE DEPTH FOCAL_LENGTH`, separated by "
                "blanks, with paths below the data's folder. Correct the line, or get the list again."
            )
        image, depth = (name.lstrip("/") for name in fields[:2])
        if image in pairs:
            raise UserError(f"{path}: {image} is named more than once; expected each image once. Remove the copies.")
        pairs[image] = Pair(image, None if depth == "None" else depth, focal)
    return [pairs[image] for image in sorted(pairs)]


def draw_split(ids: Sequence[str], val_fraction: float, seed: int, source: object) -> dict[str, list[str]]:
    """`train` and `val` of data that have no split: by a hash of (seed, id), so that new ids do not reshuffle old ones.

    Raises:
        UserError: fewer than two ids; `source` is named.
    """
    if len(ids) < 2:
        raise UserError(f"{source}: {len(ids)} image; expected at least 2, one to train and one to validate.")
    drawn = sorted(ids, key=lambda i: stable_seed("split", seed, i))
    num_val = min(len(ids) - 1, max(1, round(len(ids) * val_fraction)))
    return {"train": sorted(drawn[num_val:]), "val": sorted(drawn[:num_val])}


def require_files(samples: Sequence[Sample], source: Path) -> None:
    """Check that all images and labels exist.

    Raises:
        UserError: some do not; names the first of them.
    """
    gone = [str(p) for s in samples for p in (s.image, s.mask, s.depth) if p is not None and not p.is_file()]
    if gone:
        raise UserError(
            f"{source}: {len(gone)} of the files that belong to it do not exist: {shorten(gone)}. "
            "The data set is incomplete; unpack it again, or correct the list."
        )


def shorten(names: Collection[str], first: int = 5) -> str:
    """The first names of many, and how many more there are."""
    shown = list(names)[:first]
    more = f" and {len(names) - first} more" if len(names) > first else ""
    return ", ".join(shown) + more
