"""Some samples of a data set, so that several splits share what is computed of the whole."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset


class Part(Dataset[Any]):
    """The samples of `whole` at `indices`, in that order; asked for as the whole is, by index or (epoch, index).

    Random choices are those that the whole makes of the sample: they do not depend on the part.
    """

    def __init__(self, whole: Any, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int] | int) -> Any:
        if isinstance(key, tuple):
            return self.whole[key[0], self.indices[key[1]]]
        return self.whole[self.indices[key]]

    @property
    def samples(self) -> list[Any]:
        """On disk."""
        return [self.whole.samples[index] for index in self.indices]

    @property
    def transform(self) -> Any:
        """Of the whole."""
        return self.whole.transform

    def picture(self, index: int) -> Any:
        """A sample as a person sees it."""
        return self.whole.picture(self.indices[index])

    def view(self, index: int) -> Any:
        """How the volume of a slice was cut."""
        return self.whole.view(self.indices[index])

    def shown(self) -> list[set[int]] | None:
        """For each sample the classes of its label but the background; None where the whole does not tell."""
        if not hasattr(self.whole, "shown"):
            return None
        classes = self.whole.shown()
        return [classes[index] for index in self.indices]

    def part(self, indices: Sequence[int]) -> "Part":
        """A part of this part."""
        return Part(self.whole, [self.indices[index] for index in indices])
