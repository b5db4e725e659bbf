"""Volumes as training and evaluation samples: each slice is an image, and knows its place in its volume."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dense_heads.data import dicom
from dense_heads.data.datasets.base import Sample
from dense_heads.data.datasets.volumes import VolumeCase
from dense_heads.data.images import UInt8
from dense_heads.data.intensity import Intensity
from dense_heads.data.labels import LabelRule
from dense_heads.data.medical import CaseItem, classes_of
from dense_heads.data.segmentation import SegmentationDataset
from dense_heads.data.transforms import EvalTransform, TrainPipeline
from dense_heads.data.volumes import (
    Frame,
    SliceView,
    Volume,
    check_same_place,
    read_frame,
    read_label_volume,
    read_nifti,
    view_of,
)
from dense_heads.errors import UserError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Stack:
    """A volume ready to be looked at: grey 0..1 (C, S, H, W), and the view that it was cut by."""

    grey: npt.NDArray[np.float32]
    view: SliceView

    def __len__(self) -> int:
        return int(self.grey.shape[1])


@dataclass(frozen=True)
class Cut:
    """How a volume becomes images.

    Args:
        plane: sagittal | coronal | axial; None cuts across the coarsest spacing.
        neighbours: slices on each side that come along as channels (2.5d); at the ends the last slice stands in.
        in_channels: of the backbone. One grey channel is repeated to that number; otherwise modalities times slices
            must be that number.
        intensity: from the scanner's units to grey.
    """

    plane: str | None = None
    neighbours: int = 0
    in_channels: int = 3
    intensity: Intensity = field(default_factory=Intensity)

    def check_channels(self, num_modalities: int) -> None:
        """Refuse volumes whose channels cannot be brought to those of the backbone.

        Raises:
            UserError: says how many there are.
        """
        num = num_modalities * (2 * self.neighbours + 1)
        if num not in (1, self.in_channels):
            raise UserError(
                f"{num_modalities} modalities in {2 * self.neighbours + 1} slices make {num} channels; the backbone "
                f"takes {self.in_channels}. Set backbone.in_channels={num} (its patch embedding is adapted), or "
                "task.data.slices."
            )

    def stack(self, volume: Volume) -> Stack:
        """The whole volume, in grey.

        Raises:
            UserError: its channels cannot be brought to those of the backbone.
        """
        x, y, z = volume.values.shape[1:]
        view = view_of(Frame((x, y, z), volume.affine), self.plane)
        self.check_channels(len(volume.values))
        return Stack(np.ascontiguousarray(view.slices(self.intensity(volume.values, volume.modalities))), view)

    def image(self, stack: Stack, index: int) -> npt.NDArray[np.float32]:
        """One slice with its neighbours, (H, W, in_channels)."""
        around = np.arange(index - self.neighbours, index + self.neighbours + 1).clip(0, len(stack) - 1)
        planes = stack.grey[:, around].reshape(-1, *stack.grey.shape[2:])  # modality by modality
        if len(planes) == 1:
            planes = np.broadcast_to(planes, (self.in_channels, *planes.shape[1:]))
        return np.ascontiguousarray(planes.transpose(1, 2, 0))


@dataclass(frozen=True)
class Slice(Sample):
    """A slice of a case; `image` and `mask` are the files of its volume."""

    case: VolumeCase = field(default_factory=lambda: VolumeCase("", Path()))
    index: int = 0
    num_slices: int = 1
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # mm between slices, rows, columns


class VolumeStore:
    """Volumes that were read lately, grey and label, up to a number of bytes in each process."""

    def __init__(self, cut: Cut, labels: LabelRule, keep_mb: int = 1024) -> None:
        self.cut, self.labels = cut, labels
        self._most = keep_mb * 2**20
        self._kept: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def stack(self, case: VolumeCase) -> Stack:
        """The case in grey."""
        return self._get("image", case)  # type: ignore[no-any-return]

    def label(self, case: VolumeCase) -> npt.NDArray[np.uint8]:
        """Train ids (S, H, W) as the case's slices have them."""
        return self._get("label", case)  # type: ignore[no-any-return]

    def _get(self, what: str, case: VolumeCase) -> Any:
        key = what, case.image_id
        if key not in self._kept:
            self._kept[key] = self._read_stack(case) if what == "image" else self._read_label(case)
            while sum(map(_num_bytes, self._kept.values())) > self._most and len(self._kept) > 2:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _read_stack(self, case: VolumeCase) -> Stack:
        try:
            return self.cut.stack(read_case(case))
        except UserError as error:
            raise error if str(case.image) in str(error) else UserError(f"{case.image}: {error}") from error

    def _read_label(self, case: VolumeCase) -> npt.NDArray[np.uint8]:
        assert case.mask is not None, case
        frame = case_frame(case)
        raw = read_label_volume(case.mask, frame, case.image)
        try:
            ids = self.labels(raw.reshape(len(raw), -1)).reshape(raw.shape)  # in two dimensions: three would be colours
        except UserError as error:
            raise UserError(f"{case.mask}: {error}") from error
        return np.ascontiguousarray(view_of(frame, self.cut.plane).slices(ids.astype(np.uint8)))


class SliceDataset(SegmentationDataset):
    """All slices of the cases, in order; items carry `case_id`, `slice_index`, `num_slices` and `spacing` (mm).

    Images are float grey 0..1; what else is true of items is said by SegmentationDataset.
    """

    def __init__(
        self,
        cases: Sequence[VolumeCase],
        store: VolumeStore,
        transform: TrainPipeline | EvalTransform,
        seed: int = 0,
    ) -> None:
        self.store = store
        super().__init__([s for case in cases for s in slices_of(case, store.cut)], store.labels, transform, seed)

    def mask_files(self) -> list[Path]:
        """None: volumes are no pictures."""
        return []

    def read(self, sample: Sample) -> tuple[Array, Array | None]:
        """Grey (H, W, C) and train ids (H, W)."""
        assert isinstance(sample, Slice)
        image = self.store.cut.image(self.store.stack(sample.case), sample.index)
        mask = None if sample.mask is None else self.store.label(sample.case)[sample.index].astype(np.int64)
        return image, mask

    def describe(self, sample: Sample, item: Any) -> None:
        """Add the slice's place."""
        assert isinstance(sample, Slice)
        item.update(_place(sample))

    def picture(self, index: int) -> UInt8:
        """A slice as a person sees it: its first modality in grey, (H, W, 3)."""
        sample = self.samples[index]
        assert isinstance(sample, Slice)
        grey = (255 * self.store.stack(sample.case).grey[0, sample.index]).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)

    def view(self, index: int) -> SliceView:
        """How the volume of a slice was cut."""
        sample = self.samples[index]
        assert isinstance(sample, Slice)
        return view_of(case_frame(sample.case), self.store.cut.plane)

    def shown(self) -> list[set[int]]:
        """For each slice the classes of its label but the background."""
        slices = (sample for sample in self.samples if isinstance(sample, Slice))
        return [classes_of(self.store.label(one.case)[one.index]) for one in slices]


def _place(sample: Slice) -> CaseItem:
    return {
        "case_id": sample.case.image_id,
        "slice_index": sample.index,
        "num_slices": sample.num_slices,
        "spacing": sample.spacing,
    }


def slices_of(case: VolumeCase, cut: Cut) -> list[Slice]:
    """The slices of a case, by its header alone."""
    frame = case_frame(case)
    view = view_of(frame, cut.plane)
    num = frame.shape[view.order[0]]
    return [
        Slice(
            f"{case.image_id}_{i:03d}", case.image, case.mask, case=case, index=i, num_slices=num, spacing=view.spacing
        )
        for i in range(num)
    ]


def case_frame(case: VolumeCase) -> Frame:
    """Where a case's voxels lie."""
    return dicom.read_frame(case.image) if case.image.is_dir() else read_frame(case.image)


def read_case(case: VolumeCase) -> Volume:
    """A case with all its modalities as channels.

    Raises:
        UserError: a file that cannot be read, or modalities that do not lie in one place.
    """
    files = case.channels or (case.image,)
    first = read_volume(files[0])
    if len(files) == 1:
        return Volume(first.values, first.affine, case.modalities or first.modalities, first.header)
    x, y, z = first.values.shape[1:]
    values = [first.values]
    for path in files[1:]:
        other = read_volume(path)
        shape = other.values.shape[1:]
        check_same_place(
            Frame((shape[0], shape[1], shape[2]), other.affine), Frame((x, y, z), first.affine), path, files[0]
        )
        values.append(other.values)
    return Volume(np.concatenate(values), first.affine, case.modalities, first.header)


def read_volume(path: Path) -> Volume:
    """A NIfTI file, or a folder with a DICOM series."""
    return dicom.read_series(path) if path.is_dir() else read_nifti(path)


def _num_bytes(kept: Any) -> int:
    return int(kept.grey.nbytes if isinstance(kept, Stack) else kept.nbytes)
