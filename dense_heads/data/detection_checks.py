"""Cheap checks of a detection data set before the first training step."""

from collections.abc import Iterator, Mapping, Sequence

from dense_heads.data.checks import refuse, sample_problems, spread
from dense_heads.data.detection import size_mismatch
from dense_heads.data.images import image_size
from dense_heads.data.objects import DetectionSample
from dense_heads.errors import UserError


def check_detection(
    splits: Mapping[str, Sequence[DetectionSample]], with_masks: bool = False, max_headers: int = 2000
) -> None:
    """Refuse a data set in which something is wrong; all that is found goes into one message.

    Raises:
        UserError: with the first five of what `find_detection_problems` found.
    """
    refuse(list(find_detection_problems(splits, with_masks, max_headers)))


def find_detection_problems(
    splits: Mapping[str, Sequence[DetectionSample]], with_masks: bool = False, max_headers: int = 2000
) -> Iterator[str]:
    """What is wrong with the data of the splits, one sentence for each problem.

    An id twice in a split; a file in two splits; by the headers of up to `max_headers` images of a split, spread
    evenly: images that cannot be read or are of another size than their annotations say; a labelled split without any
    object, or with `with_masks` without any outline. Images without objects among others are no problem.
    """
    yield from sample_problems(splits)
    for split, samples in splits.items():
        for sample in spread(samples, max_headers):
            try:
                size = image_size(sample.image)
                if sample.objects is not None and sample.objects.size != size:
                    yield str(size_mismatch(sample, size))
            except UserError as error:
                yield str(error)
        labelled = [sample.objects for sample in samples if sample.objects is not None]
        if samples and split != "test" and len(labelled) < len(samples):
            yield f"{split}: {len(samples) - len(labelled)} of {len(samples)} images have no annotations"
        elif labelled and not any(len(objects) for objects in labelled):
            yield f"{split}: not one object in its {len(samples)} images; expected some, else there is nothing to find"
        elif with_masks and labelled and not any(o is not None for objects in labelled for o in objects.outlines):
            yield (
                f"{split}: not one object has an outline; expected polygons or run lengths under `segmentation`. Set "
                "task.masks=false to learn boxes alone"
            )
