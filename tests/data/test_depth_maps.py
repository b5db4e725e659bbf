import sys

import numpy as np
import pytest
from PIL import Image

from dense_heads.data.depth_maps import DepthRule, depth_size, read_depth
from dense_heads.errors import UserError
from tests.factories import DATA, save

RAW = np.array([[0, 1, 1000], [2731, 9999, 65535]], np.uint16)


def test_png_of_millimetres_and_of_kitti(tmp_path):
    path = save(tmp_path / "a.png", RAW)
    depth_m = read_depth(path, 1000)
    assert depth_m.dtype == np.float32 and depth_m.shape == (2, 3)
    np.testing.assert_array_equal(depth_m, np.array([[0, 0.001, 1], [2.731, 9.999, 65.535]], np.float32))
    np.testing.assert_array_equal(read_depth(path, 256)[1], np.array([2731, 9999, 65535], np.float32) / 256)
    np.testing.assert_array_equal(read_depth(path, 1000, invalid=[0, 65535])[1], np.float32([2.731, 9.999, 0]))
    np.testing.assert_array_equal(read_depth(path, 1000, invalid=1)[0], np.float32([0, 0, 1]))
    assert depth_size(path) == (2, 3)


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [(suffix, dtype) for suffix in (".tif", ".npy") for dtype in (np.uint8, np.uint16, np.int32, np.float32)]
    + [(".png", np.uint8), (".png", np.uint16)],
)
def test_formats_agree(tmp_path, suffix, dtype):
    values = np.array([[0, 7, 200], [3, 100, 255]]).astype(dtype)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    np.testing.assert_array_equal(read_depth(path, 100), values.astype(np.float32) / np.float32(100))
    assert depth_size(path) == (2, 3)


@pytest.mark.parametrize("suffix", [".npy", ".tiff"])
def test_what_is_no_number_or_not_positive_is_no_measurement(tmp_path, suffix):
    values = np.array([[np.nan, np.inf, -np.inf], [-1.5, 0.1, 2.5]], np.float32)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    np.testing.assert_array_equal(read_depth(path, 1), np.float32([[0, 0, 0], [0, 0.1, 2.5]]))
    np.testing.assert_array_equal(read_depth(path, 1, invalid=0.1), np.float32([[0, 0, 0], [0, 0, 2.5]]))


def test_values_beyond_float32_are_no_measurement(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1e300, 1.0]]))
    np.testing.assert_array_equal(read_depth(tmp_path / "a.npy", 1), [[0, 1]])


@pytest.mark.parametrize("shape", [(1, 4, 5), (4, 5, 1)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_with_one_channel_and_any_order_and_byte_order(tmp_path, shape, order):
    values = np.arange(1, 21, dtype=">f4").reshape(4, 5)
    np.save(tmp_path / "a.npy", np.asarray(values.reshape(shape), order=order))
    depth_m = read_depth(tmp_path / "a.npy", 1)
    np.testing.assert_array_equal(depth_m, values)
    assert depth_m.dtype == np.dtype("=f4") and depth_size(tmp_path / "a.npy") == (4, 5)


def test_sun_rgbd_bits_by_hand(tmp_path):
    # 2731 mm is stored as 2731 * 8 = 21848; 8191 mm as 65528, cut to 8 m; the low bits of 3 go to the top: 24576
    path = save(tmp_path / "a.png", np.array([[0, 8, 21848], [65528, 3, 64000]], np.uint16))
    expected = np.float32([[0, 0.001, 2.731], [8.0, 8.0, 8.0]])
    np.testing.assert_array_equal(read_depth(path, 1000, encoding="sun_rgbd"), expected)
    with pytest.raises(UserError, match=r"b\.png: uint8 values; expected 16-bit PNG"):
        read_depth(save(tmp_path / "b.png", np.zeros((2, 2), np.uint8)), 1000, encoding="sun_rgbd")


def test_not_a_depth_map(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    np.save(tmp_path / "cube.npy", np.zeros((2, 3, 4)))
    np.save(tmp_path / "words.npy", np.array([["far", "near"]]))
    np.save(tmp_path / "objects.npy", np.array([[{"a": 1}]], dtype=object))
    np.save(tmp_path / "empty.npy", np.zeros((0, 3)))
    np.save(tmp_path / "complex.npy", np.zeros((2, 2), complex))
    with (tmp_path / "several.npy").open("wb") as file:
        np.savez(file, a=np.zeros((2, 2)))
    grey = Image.fromarray(RAW.astype(np.uint8))
    save(tmp_path / "colour.png", np.zeros((2, 2, 3), np.uint8))
    grey.convert("P").save(tmp_path / "palette.png")
    grey.convert("1").save(tmp_path / "bits.png")
    grey.save(tmp_path / "lossy.png", format="JPEG")
    (tmp_path / "fake.exr").write_bytes(b"EXR it is not")
    messages = {
        "text.png": "not an image",
        "cube.npy": r"shape \(2, 3, 4\); expected one depth map",
        "words.npy": "expected one array of real numbers",
        "objects.npy": "cannot be read",
        "empty.npy": r"shape \(0, 3\)",
        "complex.npy": "complex128",
        "several.npy": "several arrays",
        "colour.png": "mode RGB .*expected one channel",
        "palette.png": "mode P",
        "bits.png": "mode 1",
        "lossy.png": "JPEG",
        "fake.exr": "not an OpenEXR file",
        "gone.npy": "no such file",
        "gone.exr": "no such file",
        "gone.png": "no such file",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message) as caught:
            read_depth(tmp_path / name, 1)
        assert name in str(caught.value)


def test_truncated_files(tmp_path):
    noise = np.random.default_rng(0).integers(1, 60000, (64, 64)).astype(np.uint16)
    paths = [save(tmp_path / "a.png", noise), tmp_path / "b.npy", save(tmp_path / "c.tif", noise)]
    np.save(paths[1], noise)
    for path in paths:
        for share in (0.5, 0.01):
            content = path.read_bytes()
            broken = path.with_stem(f"{path.stem}{share}")
            broken.write_bytes(content[: int(len(content) * share)])
            with pytest.raises(UserError, match=broken.name):
                read_depth(broken, 1000)


def test_a_header_cannot_ask_for_memory_that_the_file_does_not_have(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    content = (tmp_path / "a.npy").read_bytes()
    assert b"(2, 3), }          " in content
    (tmp_path / "a.npy").write_bytes(content.replace(b"(2, 3), }          ", b"(9999999, 9999999)}"))
    with pytest.raises(UserError, match=r"a\.npy"):
        read_depth(tmp_path / "a.npy", 1)


METRES = np.array([[0.5, 2.25, 7.0], [np.inf, 9.0, 0.0]], np.float32)


def write_exr(path, channels, data=None, display=None):
    """`data`, `display`: windows (left, top, right, bottom), the last two inclusive as in the format."""
    openexr = pytest.importorskip("OpenEXR")
    header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}
    for name, window in (("dataWindow", data), ("displayWindow", display)):
        if window is not None:
            header[name] = np.array(window[:2], np.int32), np.array(window[2:], np.int32)
    with openexr.File(header, channels) as file:
        file.write(str(path))
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", ["Y", "Z", "R", "anything"])
def test_exr_with_one_channel(tmp_path, name, dtype):
    path = write_exr(tmp_path / "a.exr", {name: METRES.astype(dtype)})
    np.testing.assert_array_equal(read_depth(path, 1), [[0.5, 2.25, 7], [0, 9, 0]])
    np.testing.assert_array_equal(read_depth(path, 2, invalid=9.0), [[0.25, 1.125, 3.5], [0, 0, 0]])
    assert depth_size(path) == (2, 3)


def test_exr_of_whole_millimetres(tmp_path):
    path = write_exr(tmp_path / "a.exr", {"Z": np.array([[0, 2731], [70_000, 4]], np.uint32)})
    np.testing.assert_array_equal(read_depth(path, 1000), np.float32([[0, 2.731], [70, 0.004]]))


def test_exr_with_colours_beside_depth_and_depth_as_grey(tmp_path):
    colours = np.random.default_rng(0).uniform(size=(2, 3, 4)).astype(np.float32)
    path = write_exr(tmp_path / "a.exr", {"RGBA": colours, "ViewLayer.Depth.Z": METRES})
    np.testing.assert_array_equal(read_depth(path, 1), [[0.5, 2.25, 7], [0, 9, 0]])
    grey = np.dstack([METRES, METRES, METRES, np.ones_like(METRES)])
    np.testing.assert_array_equal(read_depth(write_exr(tmp_path / "b.exr", {"RGBA": grey}), 1)[1], [0, 9, 0])
    with pytest.raises(UserError, match=r"c\.exr: different channels, A, B, G, R; expected one of depth"):
        read_depth(write_exr(tmp_path / "c.exr", {"RGBA": colours}), 1)


def test_exr_whose_pixels_are_not_the_whole_picture(tmp_path):
    path = write_exr(tmp_path / "a.exr", {"Z": METRES}, data=(1, 2, 3, 3), display=(0, 0, 4, 4))
    whole = np.zeros((5, 5), np.float32)
    whole[2:4, 1:4] = [[0.5, 2.25, 7], [0, 9, 0]]
    np.testing.assert_array_equal(read_depth(path, 1), whole)
    assert depth_size(path) == (5, 5)
    path = write_exr(tmp_path / "b.exr", {"Z": METRES}, data=(-1, 0, 1, 1), display=(0, 0, 1, 0))  # more than is shown
    np.testing.assert_array_equal(read_depth(path, 1), [[2.25, 7]])


def test_exr_that_is_damaged(tmp_path):
    content = write_exr(tmp_path / "a.exr", {"Z": METRES}).read_bytes()
    for length in (4, 60, len(content) // 2, len(content) - 5):
        (tmp_path / "b.exr").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"b\.exr: the EXR file cannot be read"):
            read_depth(tmp_path / "b.exr", 1)
    at = content.index(b"displayWindow\0box2i\0") + len(b"displayWindow\0box2i\0") + 4
    (tmp_path / "c.exr").write_bytes(content[: at + 8] + b"\xff\xff\xff\x00" * 2 + content[at + 16 :])
    with pytest.raises(UserError, match=r"c\.exr: .*"):
        depth_size(tmp_path / "c.exr")


def test_without_the_library_exr_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.exr").write_bytes(b"\x76\x2f\x31\x01" + bytes(60))
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    for use in (lambda path: read_depth(path, 1), depth_size):
        with pytest.raises(UserError, match=r"a\.exr: .*pip install 'dense-heads\[exr\]'\), or convert"):
            use(tmp_path / "a.exr")


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), "1000", None, True])
def test_scale_is_checked(scale):
    with pytest.raises(UserError, match=r"data\.depth_scale"):
        DepthRule(scale)


def test_other_settings_are_checked():
    for invalid in ("0", [0, None], None):
        with pytest.raises(UserError, match=r"task\.data\.depth\.invalid"):
            DepthRule(1, invalid)
    with pytest.raises(UserError, match=r"Unknown encoding of depths 'plane'\. Did you mean 'plain'"):
        DepthRule(1, encoding="plane")


def test_settings_make_the_same_rule():
    rule = DepthRule(256, [0, 65535], "plain")
    assert DepthRule(**rule.settings()) == rule
    assert rule.settings() == {"scale": 256, "invalid": [0, 65535], "encoding": "plain"}


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")
def test_real_maps():
    filled = read_depth(sorted((DATA / "nyu_depth/depth/training").iterdir())[0], 1000)
    assert filled.shape == (480, 640) and 0.7 < filled.min() and filled.max() < 10
    holes = read_depth(DATA / "nyu_depth_v2/sync/basement/sync_depth_00050.png", 1000)
    assert 0.05 < (holes == 0).mean() < 0.6 and holes.max() < 11
