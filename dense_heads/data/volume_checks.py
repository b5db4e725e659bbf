"""Cheap checks of volumes before the first training step."""

from collections.abc import Iterator, Mapping, Sequence

from dense_heads.data.checks import refuse, sample_problems, spread
from dense_heads.data.datasets.volumes import VolumeCase
from dense_heads.data.labels import distinct
from dense_heads.data.slices import VolumeStore, case_frame, read_case
from dense_heads.data.volumes import check_same_place, read_frame, read_label_volume
from dense_heads.errors import UserError
from dense_heads.structures import IGNORE_INDEX


def check_volumes(splits: Mapping[str, Sequence[VolumeCase]], store: VolumeStore, max_volumes: int = 64) -> None:
    """Refuse volumes in which something is wrong; all that is found goes into one message.

    Raises:
        UserError: with the first five of what `volume_problems` found.
    """
    refuse(list(volume_problems(splits, store, max_volumes)))


def volume_problems(
    splits: Mapping[str, Sequence[VolumeCase]], store: VolumeStore, max_volumes: int = 64
) -> Iterator[str]:
    """What is wrong with the volumes of the splits, one sentence for each problem.

    An id twice in a split, a file in two splits; by all headers: volumes that cannot be read, labels of another shape
    or in another place; by up to `max_volumes` whole volumes of each split, spread evenly: damaged data, values outside
    the classes, channels that do not fit the backbone, a split without any labelled foreground.
    """
    yield from sample_problems(splits)
    sound = {split: [case for case in cases] for split, cases in splits.items()}
    for split, cases in splits.items():
        for case in cases:
            if problem := _header_problem(case):
                sound[split].remove(case)
                yield problem
    yield from _decide_labels(
        [case for cases in sound.values() for case in spread(cases, max_volumes) if case.mask], store
    )
    first = next((cases[0] for cases in sound.values() if cases), None)
    if first is not None and (problem := _channel_problem(first, store)):
        yield problem  # the same of all of them
        return
    for split, cases in sound.items():
        yield from _content_problems(split, spread(cases, max_volumes), store)


def _header_problem(case: VolumeCase) -> str | None:
    try:
        frame = case_frame(case)
        for path in (*case.channels[1:], *([case.mask] if case.mask else [])):
            check_same_place(read_frame(path), frame, path, case.image)
    except UserError as error:
        return str(error)
    return None


def _channel_problem(case: VolumeCase, store: VolumeStore) -> str | None:
    try:
        num = len(read_case(case).values)
    except UserError:
        return None  # said with its content
    try:
        store.cut.check_channels(num)
    except UserError as error:
        return f"{case.image}: {error}"
    return None


def _decide_labels(cases: Sequence[VolumeCase], store: VolumeStore) -> Iterator[str]:
    """How label volumes are stored is decided once, for all of them."""
    if store.labels.encoding is not None:
        return
    values: set[int] = set()
    for case in cases:
        try:
            assert case.mask is not None
            values |= {int(v) for v in distinct(read_label_volume(case.mask, case_frame(case), case.image))}
        except UserError:
            continue  # said with its content
    store.labels.decide_ids(values)
    yield from ()


def _content_problems(split: str, cases: Sequence[VolumeCase], store: VolumeStore) -> Iterator[str]:
    classes: set[int] = set()
    wrong = False
    for case in cases:
        try:
            store.stack(case)
            if case.mask is not None:
                classes |= set(distinct(store.label(case)).tolist()) - {IGNORE_INDEX}
        except UserError as error:
            wrong = True
            yield str(error)
    labelled = any(case.mask is not None for case in cases)
    if labelled and len(classes) < 2 and not wrong:
        yield (
            f"{split}: all labelled voxels of its {len(cases)} volumes are class "
            f"{', '.join(map(str, classes)) or 'none'}; expected at least two classes, else there is nothing to learn "
            f"or measure. Look at task.data.labels and at the labels, such as {cases[0].mask}"
        )
