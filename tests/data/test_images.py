import numpy as np
import pytest
import torch
from PIL import Image

from dense_heads.data.images import image_size, list_images, read_image, to_uint8
from dense_heads.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def save(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def test_rgb_comes_back_unchanged(tmp_path):
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", RGB)), RGB)


def test_grey_and_one_bit(tmp_path):
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", GREY)), np.stack([GREY] * 3, -1))
    bits = GREY > 100
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", bits))[..., 1], bits * 255)


def test_alpha_is_dropped_not_blended(tmp_path):
    rgba = np.dstack([RGB, np.zeros((7, 11), np.uint8)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", rgba)), RGB)
    la = np.dstack([GREY, np.full((7, 11), 9, np.uint8)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", la))[..., 2], GREY)


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255, 3])])
def test_palette_gives_its_colours(tmp_path, transparency):
    indices = GREY % 4
    palette = [(255, 0, 0), (1, 2, 3), (9, 200, 30), (0, 0, 250)]
    image = Image.fromarray(indices, mode="P")
    image.putpalette([c for colour in palette for c in colour])
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(
        read_image(save(tmp_path / "a.png", image, **options)), np.array(palette, np.uint8)[indices]
    )


def test_cmyk(tmp_path):
    cmyk = Image.fromarray(RGB).convert("CMYK")
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.tif", cmyk)), np.array(cmyk.convert("RGB")))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_grey_is_scaled_by_its_own_range(tmp_path, dtype):
    deep = np.array([[100, 200], [300, 1100]], dtype)
    suffix = ".png" if dtype == np.uint16 else ".tif"
    # (v - 100) / 1000 * 255, rounded
    np.testing.assert_array_equal(read_image(save(tmp_path / f"a{suffix}", deep))[..., 0], [[0, 26], [51, 255]])
    constant = np.full((3, 4), 700, dtype)
    assert read_image(save(tmp_path / f"b{suffix}", constant)).max() == 0


def test_float_with_nan_and_infinity(tmp_path):
    values = np.array([[np.nan, 0.5], [np.inf, 1.0]], np.float32)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.tif", values))[..., 0], [[0, 0], [0, 255]])


@pytest.mark.parametrize("number", range(1, 9))
def test_exif_rotation(tmp_path, number):
    # The eight orientations by their definition: where row 0 and column 0 of the stored pixels are in the scene.
    expected = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.swapaxes(0, 1),
        6: np.rot90(RGB, -1), 7: RGB[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(RGB),
    }[number]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = number
    path = save(tmp_path / "a.png", RGB, exif=exif)
    np.testing.assert_array_equal(read_image(path), expected)
    assert image_size(path) == expected.shape[:2]


def test_broken_exif_does_not_hide_the_pixels(tmp_path):
    path = save(tmp_path / "a.png", RGB, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\xff")
    np.testing.assert_array_equal(read_image(path), RGB)
    assert image_size(path) == (7, 11)


def test_first_frame_of_several(tmp_path):
    save(tmp_path / "a.tif", Image.fromarray(RGB), save_all=True, append_images=[Image.fromarray(255 - RGB)])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), RGB)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_truncated(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    path = save(tmp_path / f"a{suffix}", noise)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=rf"a\{suffix}.*cannot be read"):
        read_image(path)
    assert image_size(path) == (200, 200)  # from the header, which is whole


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + b"\xff" * 60])
def test_not_an_image(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for read in (read_image, image_size):
        with pytest.raises(UserError, match=r"a\.png"):
            read(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "no.png", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            read_image(path)
    with pytest.raises(UserError, match="not a folder"):
        list_images(tmp_path / "no")


def test_decompression_bomb(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", np.zeros((100, 100), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"a\.png.*bomb"):
        read_image(path)


def test_list_images(tmp_path):
    for name in ("b.JPG", "a.png", "._a.png", "notes.txt", "sub/c.tif", ".checkpoints/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in list_images(tmp_path)] == ["a.png", "b.JPG"]
    assert [p.name for p in list_images(tmp_path, recursive=True)] == ["a.png", "b.JPG", "c.tif"]


def test_to_uint8_of_every_kind():
    np.testing.assert_array_equal(to_uint8(RGB), RGB)
    np.testing.assert_array_equal(to_uint8(Image.fromarray(RGB)), RGB)
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(RGB).permute(2, 0, 1)), RGB)
    np.testing.assert_array_equal(to_uint8(np.dstack([RGB, GREY])), RGB)
    np.testing.assert_array_equal(to_uint8(GREY)[..., 2], GREY)
    np.testing.assert_array_equal(to_uint8(GREY[..., None])[..., 0], GREY)
    np.testing.assert_array_equal(to_uint8(RGB / 255), RGB)
    np.testing.assert_array_equal(to_uint8((torch.from_numpy(RGB).permute(2, 0, 1) / 255).double()), RGB)
    assert to_uint8(torch.rand(3, 4, 5, dtype=torch.bfloat16)).shape == (4, 5, 3)
    np.testing.assert_array_equal(to_uint8(GREY > 9)[..., 0], (GREY > 9) * 255)
    np.testing.assert_array_equal(to_uint8(np.array([[100, 1100]], np.uint16))[0, :, 0], [0, 255])
    assert to_uint8(RGB[:, ::-1]).flags["C_CONTIGUOUS"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("a.png", "str"),
        (np.zeros((2, 3, 4, 5), np.uint8), "shape"),
        (np.zeros((0, 5, 3), np.uint8), "shape"),
        (torch.zeros(5, 6, 7), "shape"),
        (RGB.astype(np.float32) - 100, "0..1"),
        (RGB.astype(np.int64), "0..1"),
        (np.full((2, 2, 3), np.nan), "0..1"),
    ],
)
def test_to_uint8_refuses(bad, message):
    with pytest.raises(UserError, match=message):
        to_uint8(bad)
