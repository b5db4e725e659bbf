"""Cheap checks of medical images before the first training step."""

from collections.abc import Iterator, Mapping, Sequence

from dense_heads.data.checks import find_problems, refuse, sample_problems, spread
from dense_heads.data.datasets.base import Sample
from dense_heads.data.datasets.medical_folders import MedicalSample
from dense_heads.data.images import image_size
from dense_heads.data.labels import LabelRule, distinct
from dense_heads.data.segmentation import size_mismatch
from dense_heads.errors import UserError


def check_images(splits: Mapping[str, Sequence[MedicalSample]], labels: LabelRule) -> None:
    """Refuse images in which something is wrong; all that is found goes into one message.

    Raises:
        UserError: with the first five of what `image_problems` found.
    """
    refuse(list(image_problems(splits, labels)))


def image_problems(
    splits: Mapping[str, Sequence[MedicalSample]], labels: LabelRule, max_headers: int = 2000, max_masks: int = 64
) -> Iterator[str]:
    """What is wrong with the images of the splits, one sentence for each problem.

    With one mask for each image as `find_problems`; with several labels the same of each label's masks. Fields of view
    and instances of another size than the image, by their headers.
    """
    several = any(sample.label_masks for samples in splits.values() for sample in samples)
    if several:
        yield from sample_problems(splits)
        yield from _label_problems(splits, labels, max_headers, max_masks)
    else:
        yield from find_problems(splits, labels, max_headers, max_masks)
    for samples in splits.values():
        for sample in spread(samples, max_headers):
            yield from _size_problems(sample, (sample.field_of_view, sample.instances))


def _label_problems(
    splits: Mapping[str, Sequence[MedicalSample]], labels: LabelRule, max_headers: int, max_masks: int
) -> Iterator[str]:
    masks = [path for samples in splits.values() for sample in samples for path in sample.label_masks if path]
    try:
        labels.prepare(masks)
    except UserError as error:
        yield str(error)
        return
    for split, samples in splits.items():
        for sample in spread(samples, max_headers):
            yield from _size_problems(sample, sample.label_masks)
        wrong, seen = False, set()
        for sample in spread(samples, max_masks):
            for path in sample.label_masks:
                try:
                    seen |= set() if path is None else set(distinct(labels.read(path)).tolist())
                except UserError as error:
                    wrong = True
                    yield str(error)
        if samples and not wrong and 1 not in seen:
            yield f"{split}: its masks are all empty; expected some with foreground. Look at task.data.labels."


def _size_problems(sample: MedicalSample, paths: Sequence[object]) -> Iterator[str]:
    try:
        size = image_size(sample.image)
        for path in paths:
            if path is not None and image_size(str(path)) != size:
                wrong = Sample(sample.image_id, sample.image, path)  # type: ignore[arg-type]
                yield str(size_mismatch(wrong, size, image_size(str(path))))
    except UserError as error:
        yield str(error)
