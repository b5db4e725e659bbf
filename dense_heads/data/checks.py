"""Cheap checks of a data set before the first training step."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from dense_heads.data.datasets.base import Sample, shorten
from dense_heads.data.images import image_size
from dense_heads.data.labels import LabelRule, distinct
from dense_heads.data.segmentation import size_mismatch
from dense_heads.errors import UserError
from dense_heads.structures import IGNORE_INDEX

T = TypeVar("T")


def check_segmentation(
    splits: Mapping[str, Sequence[Sample]], labels: LabelRule, max_headers: int = 2000, max_masks: int = 64
) -> None:
    """Refuse a data set in which something is wrong; all that is found goes into one message.

    Raises:
        UserError: with the first five of what `find_problems` found.
    """
    refuse(list(find_problems(splits, labels, max_headers, max_masks)))


def refuse(problems: Sequence[str]) -> None:
    """Raise a UserError with the first five of the problems, if there are any."""
    if problems:
        more = f"\n... and {len(problems) - 5} more" if len(problems) > 5 else ""
        listing = "\n".join(f"- {problem}" for problem in problems[:5])
        raise UserError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in the data:\n{listing}{more}")


def find_problems(
    splits: Mapping[str, Sequence[Sample]], labels: LabelRule, max_headers: int = 2000, max_masks: int = 64
) -> Iterator[str]:
    """What is wrong with the data of the splits, one sentence for each problem.

    An id twice in a split; a file in two splits; by the headers of up to `max_headers` pairs of a split, spread evenly:
    images that cannot be read, image and mask of different sizes; by up to `max_masks` masks: values outside the
    classes; a split whose labelled pixels all have one class (or of which none is labelled).
    """
    yield from sample_problems(splits)
    for split, samples in splits.items():
        if not samples:
            continue
        broken: set[Sample] = set()
        for sample in spread(samples, max_headers):
            problem = _header_problem(sample)
            if problem:
                broken.add(sample)
                yield problem
        yield from _mask_problems(split, [s for s in samples if s.mask and s not in broken], labels, max_masks)


def sample_problems(splits: Mapping[str, Sequence[Sample]]) -> Iterator[str]:
    """What is wrong with the samples of any family: none at all, a file in two splits, an id twice in a split."""
    if not any(splits.values()):
        yield "there are no samples at all"
        return
    yield from _shared_files(splits)
    for split, samples in splits.items():
        twice = [i for i, count in Counter(sample.image_id for sample in samples).items() if count > 1]
        if twice:
            yield f"{split}: ids that stand there more than once: {shorten(twice)}; expected different ones"


def _shared_files(splits: Mapping[str, Sequence[Sample]]) -> Iterator[str]:
    """Files in two splits, also by way of links."""
    seen: dict[tuple[int, int], tuple[str, Sample]] = {}
    for split, samples in splits.items():
        for sample in samples:
            if not sample.image.exists():
                continue  # said by its header check
            status = sample.image.stat()
            other, first = seen.setdefault((status.st_dev, status.st_ino), (split, sample))
            if other != split:
                yield (
                    f"{sample.image} is in {split} and in {other} ({first.image}): a score on images that were trained "
                    "on means nothing. Expected different files; correct the lists or folders"
                )


def _header_problem(sample: Sample) -> str | None:
    try:
        size = image_size(sample.image)
        mask_size = size if sample.mask is None else image_size(sample.mask)
        return None if size == mask_size else str(size_mismatch(sample, size, mask_size))
    except UserError as error:
        return str(error)


def _mask_problems(split: str, samples: Sequence[Sample], labels: LabelRule, max_masks: int) -> Iterator[str]:
    masks = [sample.mask for sample in samples if sample.mask is not None]
    if not masks:
        return
    first = spread(masks, max_masks)
    chosen = set(first)
    classes: set[int] = set()
    wrong = False
    try:
        labels.prepare(masks)
        # The rest is read only as long as a second class is looked for.
        for i, mask in enumerate([*first, *(mask for mask in masks if mask not in chosen)]):
            if i >= len(first) and (len(classes) > 1 or wrong):
                break
            try:
                classes |= set(distinct(labels.read(mask)).tolist()) - {IGNORE_INDEX}
            except UserError as error:
                wrong = True
                yield str(error)
    except UserError as error:
        yield str(error)
        return
    if len(classes) < 2 and not wrong:
        held = (
            f"all labelled pixels of its {len(masks)} masks are class {classes.pop()}"
            if classes
            else (f"no pixel of its {len(masks)} masks is labelled")
        )
        yield (
            f"{split}: {held}; expected at least two classes, else there is nothing to learn or measure. Look at "
            f"task.data.labels (map, ignore, reduce_zero) and at the masks, such as {masks[0]}"
        )


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly over all of them, in order."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]
