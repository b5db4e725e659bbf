"""Reading images of any kind as 8-bit RGB, and saying clearly why one cannot be read."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from dense_heads.errors import UserError
from dense_heads.structures import Size

UInt8 = npt.NDArray[np.uint8]
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"})

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | Path) -> UInt8:
    """Read an image file as uint8 (H, W, 3) RGB, upright.

    Grey, palette, CMYK and 1-bit images become RGB; alpha is dropped, not blended; the EXIF rotation is applied; of
    several frames the first counts. Grey images of more than 8 bits (16-bit, 32-bit, float) are scaled from the file's
    own minimum..maximum to 0..255 (a constant image, and values that are not finite, become 0).

    Raises:
        UserError: no such file, not an image, truncated, or so large that it looks like a decompression bomb.
    """
    with open_image(path) as image:
        return _rgb(image)


def image_size(path: str | Path) -> Size:
    """(height, width) of the upright image, from the header alone.

    Raises:
        UserError: no such file, or no image header in it.
    """
    with open_image(path) as image:
        width, height = image.size
        return (width, height) if orientation(image) >= 5 else (height, width)


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder by their suffix, sorted by path; hidden files and folders are left out.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected a folder of images. Check the path.")
    found = folder.rglob("*") if recursive else folder.iterdir()
    images = (path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(p for p in images if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def to_uint8(image: Any) -> UInt8:
    """An image in memory as uint8 (H, W, 3) RGB, by the same rules as `read_image`.

    Takes a PIL image; an array (H, W) or (H, W, 1|2|3|4); or a tensor (H, W) or (1|2|3|4, H, W). Two channels are grey
    and alpha, four RGB and alpha. Colour in floating point must lie in 0..1.

    Raises:
        UserError: another type, shape or range.
    """
    if isinstance(image, Image.Image):
        return _rgb(image)
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        pixels = pixels.float() if pixels.dtype in (torch.bfloat16, torch.float16) else pixels
        array = pixels.permute(1, 2, 0).numpy() if image.ndim == 3 else pixels.numpy()
        layout = "(C, H, W)"
    elif isinstance(image, np.ndarray):
        array, layout = image, "(H, W, C)"
    else:
        raise UserError(f"An image was given as {type(image).__name__}; expected a path, PIL image, array or tensor.")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or array.size == 0:
        raise UserError(
            f"An image was given with shape {tuple(image.shape)}; expected one image, (H, W) or {layout} with 1 to 4 "
            "channels. Pass the images of a batch one by one."
        )
    array = array[..., : 1 if array.shape[2] <= 2 else 3]  # alpha is dropped
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        array = _grey_to_uint8(array) if array.shape[2] == 1 else _colour_to_uint8(array)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file with PIL; whatever goes wrong inside the block becomes a UserError that names the file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an image. Check the path.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large images and odd metadata; what matters raises
            with Image.open(path) as image:
                yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path}: {error} Expected an ordinary image. Cut it into tiles if it is meant to be this large."
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path}: not an image that can be read ({path.stat().st_size} bytes). Expected PNG, JPEG, TIFF, BMP, "
            "WebP or another format of Pillow's. Replace or remove the file."
        ) from error
    except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
        raise UserError(
            f"{path}: the image cannot be read: {error or type(error).__name__}. Expected a whole, undamaged file. "
            "Copy or download it again, or remove it."
        ) from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image (1 = upright), 1 where the EXIF block is absent or broken.

    Looked up before the pixels are decoded: a PNG's block counts where it stands before the pixels, as it should.
    """
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole file in search of the block
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the pixels can still be good
        return 1


def upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF rotation applied."""
    method = _UPRIGHT.get(orientation(image))
    return image if method is None else image.transpose(method)


def _rgb(image: Image.Image) -> UInt8:
    image = upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return np.repeat(_grey_to_uint8(np.asarray(image))[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow's own advice; RGB directly would guess a matte colour
    if image.mode in ("La", "RGBa"):  # premultiplied: only its straight form says what the colour was
        image = image.convert(image.mode[:-1] + "A")
    return np.array(image.convert("RGB"))


def _grey_to_uint8(grey: npt.NDArray[Any]) -> UInt8:
    values = grey.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(grey.shape, np.uint8)
    low, high = values[finite].min(), values[finite].max()
    if high <= low:
        return np.zeros(grey.shape, np.uint8)
    return np.asarray(np.where(finite, (values - low) / (high - low) * 255 + 0.5, 0)).astype(np.uint8)


def _colour_to_uint8(colour: npt.NDArray[Any]) -> UInt8:
    if not np.issubdtype(colour.dtype, np.floating) or not (0 <= colour.min() and colour.max() <= 1):
        raise UserError(
            f"A colour image was given as {colour.dtype} with values {colour.min():g}..{colour.max():g}; expected "
            "uint8 0..255, or floating point 0..1 that is not normalised. Convert it first."
        )
    return np.asarray(colour * 255 + 0.5).astype(np.uint8)
