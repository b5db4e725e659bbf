"""What readers of objects share: splits (or one that is drawn), categories, notices."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from dense_heads.data.datasets.base import SPLITS, Split, draw_split, missing_data
from dense_heads.data.objects import DetectionSample, Repairs, relabelled
from dense_heads.errors import UserError

log = logging.getLogger(__name__)


class ObjectReader:
    """Samples with objects, by split. A subclass fills `loaded` and `categories` and then calls `finish`.

    A validation split that is nowhere is drawn from the training images by a hash of (seed, id); `made_split` then
    holds it, to be kept with the run and given back as `split` by whoever resumes.
    """

    layout = ""  # of the folder, for messages

    def __init__(self, root: str | Path, hint: str = "") -> None:
        self.root, self.hint = Path(root), hint
        self.notices: list[str] = []
        self.loaded: dict[str, list[DetectionSample]] = {}
        self.categories: list[str] = []  # names in the order of the labels
        self.category_ids: list[int] = []  # their ids in the files
        self.made_split: dict[str, list[str]] | None = None

    def available(self) -> list[Split]:
        """The splits that are on disk or were drawn."""
        return [split for split in SPLITS if split in {*self.loaded, *(self.made_split or ())}]

    def samples(self, split: Split) -> list[DetectionSample]:
        """The split's samples in a fixed order; [] for a test split that does not exist."""
        if self.made_split is not None and split in self.made_split:
            chosen = set(self.made_split[split])
            return [sample for sample in self.loaded["train"] if sample.image_id in chosen]
        if split not in self.loaded:
            if split == "test":
                return []
            raise missing_data(self.root / split, self.layout, self.hint)
        return self.loaded[split]

    def finish(
        self,
        repairs: Sequence[Repairs] = (),
        split: Mapping[str, Sequence[str]] | None = None,
        val_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        """Say what was repaired; draw a validation split, or take the one that was drawn before."""
        for one in repairs:
            for sentence in one.notices():
                self.notice(sentence)
        if split is not None and "train" in self.loaded:
            self.made_split = {name: list(ids) for name, ids in split.items()}
        elif "train" in self.loaded and "val" not in self.loaded:
            ids = [sample.image_id for sample in self.loaded["train"]]
            self.made_split = draw_split(ids, val_fraction, seed, self.root)
            num = len(self.made_split["val"])
            self.notice(f"no validation split on disk: {num} of {len(ids)} images are held out (seed {seed})")

    def sort_categories(self) -> None:
        """Bring categories that were met one after the other into alphabetical order."""
        ordered = sorted(self.categories)
        place = {label: ordered.index(name) for label, name in enumerate(self.categories)}
        for split, samples in self.loaded.items():
            self.loaded[split] = [relabelled(sample, place) for sample in samples]
        self.categories = ordered

    def notice(self, sentence: str) -> None:
        """Keep a sentence for the report, and say it now."""
        if sentence not in self.notices:
            self.notices.append(sentence)
            log.warning(sentence)


def inside(folder: Path, name: str, source: Path) -> Path:
    """`folder / name`, for a name out of a file.

    Raises:
        UserError: it leads out of the folder.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{source}: the file name {name!r}; expected a path below {folder}. Correct it.")
    return folder / name
