"""Unlabelled images from a folder, a list or tar shards, as crops for self-supervised training."""

import io
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dense_heads.data.crops import MultiCrop
from dense_heads.data.fast_crops import cut_batch
from dense_heads.data.image_files import ImageFile
from dense_heads.data.images import IMAGE_SUFFIXES, UInt8, list_images, read_image, to_uint8
from dense_heads.errors import UserError
from dense_heads.ops.seeding import stable_seed
from dense_heads.structures import IMAGENET_MEAN, IMAGENET_STD, Batch

log = logging.getLogger("dense_heads")

PATCHED_IMAGES = 1000  # that patches are sampled from


class ImageFiles:
    """Image files, read when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def files(self) -> list[ImageFile]:
        """What is read, for a digest."""
        return [ImageFile(path.name, path) for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> UInt8:
        """(H, W, 3)."""
        return read_image(self.paths[index])


class TarShards:
    """Images inside tar files (WebDataset shards), by random access: shuffled wholly, resumable like files.

    The shards are scanned once for the places of their images; everything else in them is left alone.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.places: list[tuple[Path, int, int, str]] = []
        for shard in shards:
            try:
                with tarfile.open(shard, "r:") as archive:
                    self.places += [
                        (shard, member.offset_data, member.size, member.name)
                        for member in archive
                        if member.isfile() and Path(member.name).suffix.lower() in IMAGE_SUFFIXES
                    ]
            except (tarfile.TarError, OSError) as error:
                raise UserError(
                    f"{shard}: not a readable tar file ({error}). Expected uncompressed shards, as WebDataset writes "
                    "them; unpack compressed ones."
                ) from error

    def files(self) -> list[ImageFile]:
        """What is read, for a digest."""
        return [ImageFile(f"{name}@{offset}", shard) for shard, offset, _, name in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int) -> UInt8:
        """(H, W, 3)."""
        shard, offset, size, name = self.places[index]
        with shard.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        try:
            with Image.open(io.BytesIO(content)) as image:
                return to_uint8(image)
        except UserError:
            raise
        except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
            raise UserError(f"{shard}: {name} in it cannot be read as an image ({error}). Replace it.") from error


class InMemory:
    """Images decoded once, shrunk to at most `short_side`, uint8."""

    def __init__(self, source: ImageFiles | TarShards, short_side: int) -> None:
        self.images = [_shrunk(source.read(index), short_side) for index in range(len(source))]
        log.info("%d images in memory, %.0f MB", len(self.images), sum(i.nbytes for i in self.images) / 1e6)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> UInt8:
        """(H, W, 3)."""
        return self.images[index]


ImageSource = ImageFiles | TarShards | InMemory


def sample_patches(source: ImageSource, patch_size: int, seed: int, number: int = 20_000) -> Tensor:
    """(number, 3 * P * P): patches at random places of random images, ImageNet-normalised, channel by channel.

    Raises:
        UserError: an image is smaller than a patch.
    """
    rng = np.random.default_rng(stable_seed("patches", seed))
    images = [source.read(int(index)) for index in rng.permutation(len(source))[:PATCHED_IMAGES]]
    cut = np.empty((number, patch_size, patch_size, 3), np.uint8)
    for place in range(number):
        image = images[place % len(images)]
        if min(image.shape[:2]) < patch_size:
            raise UserError(
                f"An image of {image.shape[1]} x {image.shape[0]} pixels is among the training images; expected at "
                f"least {patch_size} x {patch_size}, a patch. Leave it out."
            )
        top, left = (int(rng.integers(side - patch_size + 1)) for side in image.shape[:2])
        cut[place] = image[top : top + patch_size, left : left + patch_size]
    pixels = torch.from_numpy(cut).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels - mean) / std).flatten(1)


def find_images(root: str | Path) -> ImageFiles | TarShards:
    """The images of `root`: a folder (searched through), a `.txt` list of paths, a `.tar`, or a folder of them.

    Paths in a list are relative to the list's folder.

    Raises:
        UserError: nothing there, a file of the list that does not exist, or a tar that cannot be read.
    """
    path = Path(root).expanduser()
    if path.suffix == ".tar" and path.is_file():
        found: ImageFiles | TarShards = TarShards([path])
    elif path.is_file():
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        paths = [path.parent / name for name in names]
        missing = [p for p in paths if not p.is_file()]
        if missing:
            raise UserError(
                f"{path} names {len(missing)} files that are not there, the first {missing[0]}. Expected one image "
                "path a line, absolute or relative to the list's folder."
            )
        found = ImageFiles(paths)
    elif path.is_dir():
        shards = sorted(path.glob("*.tar"))
        found = TarShards(shards) if shards else ImageFiles(list_images(path, recursive=True))
    else:
        raise UserError(f"{path}: no such folder or list. Set data.root to a folder of images, a .txt list, or a .tar.")
    if len(found) == 0:
        raise UserError(f"{path}: no images. Expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return found


class CropDataset(Dataset[list[Tensor]]):
    """Asked by (epoch, index), gives an image's crops; asked for a list of these, a whole batch."""

    def __init__(self, source: ImageSource, crops: MultiCrop, fast: bool = False) -> None:
        """`fast`: whole batches through `fast_crops.py` in place of the published steps."""
        self.source, self.crops, self.fast = source, crops, fast

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> list[Tensor]:
        epoch, index = key
        return self.crops(self.source.read(index), epoch, index)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[list[Tensor]] | Batch:
        """What a loader calls for a batch."""
        if not self.fast:
            return [self[key] for key in keys]
        images = [self.source.read(index) for _, index in keys]
        draws = [self.crops.draws(image.shape[:2], *key) for image, key in zip(images, keys, strict=True)]
        views = [
            cut_batch(images, [drawn[view] for drawn in draws], recipe.size)
            for view, recipe in enumerate(self.crops.recipes)
        ]
        return {"crops": _by_size(views)}


def collate_crops(items: list[list[Tensor]] | Batch) -> Batch:
    """Crops of each image -> `crops`: one tensor for each size, all images' first view, then all second views, ..."""
    if isinstance(items, dict):
        return items
    return {"crops": _by_size([torch.stack(view) for view in zip(*items, strict=True)])}


def _by_size(views: Sequence[Tensor]) -> list[Tensor]:
    """Global crops are the first two views; local ones, of whatever size, the rest."""
    groups = [views[:2], views[2:]]
    return [torch.cat(list(group)) for group in groups if group]


def _shrunk(image: UInt8, short_side: int) -> UInt8:
    height, width = image.shape[:2]
    factor = short_side / min(height, width)
    if factor >= 1:
        return image
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.ascontiguousarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
