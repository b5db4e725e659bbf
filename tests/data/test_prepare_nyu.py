"""scripts/prepare_nyu.py on a small file of the same inside as nyu_depth_v2_labeled.mat."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dense_heads.data.datasets.depth_folders import DepthFolders
from dense_heads.data.datasets.nyu import NYUDepth
from dense_heads.data.depth_checks import check_depth
from dense_heads.data.depth_maps import DepthRule
from tests.factories import fake_depth

h5py = pytest.importorskip("h5py", reason="the extra `prepare` is not installed")
scipy_io = pytest.importorskip("scipy.io")

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_nyu.py"
SIZE = (480, 640)
TYPES = ("kitchen", "bedroom", "kitchen", "home_office")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_nyu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_mat(path, types=TYPES):
    scenes = [fake_depth(i, SIZE) for i in range(len(types))]
    with h5py.File(path, "w") as file:
        file["images"] = np.stack([image.T for image, _ in scenes])  # MATLAB's order: (n, 3, W, H)
        file["rawDepths"] = np.stack([depth.T for _, depth in scenes])
        file["depths"] = np.stack([np.where(depth > 0, depth, 4).T.astype(np.float32) for _, depth in scenes])
        for i, name in enumerate(types):
            file[f"#refs#/{i}"] = np.array([[ord(letter)] for letter in name], np.uint16)
        file["sceneTypes"] = np.array([[file[f"#refs#/{i}"].ref for i in range(len(types))]], dtype=h5py.ref_dtype)
    return path


@pytest.fixture
def mats(tmp_path):
    splits = {"trainNdxs": np.array([[1], [2]]), "testNdxs": np.array([[3], [4]])}  # MATLAB counts from 1
    scipy_io.savemat(tmp_path / "splits.mat", splits)
    return [str(make_mat(tmp_path / "labeled.mat")), str(tmp_path / "splits.mat")]


def test_pairs(script, mats, tmp_path):
    script.main([*mats, str(tmp_path / "out")])
    reader = DepthFolders(tmp_path / "out", splits={"train": "training", "val": "validation"})
    splits = {split: reader.samples(split) for split in ("train", "val")}
    assert [[s.image_id for s in samples] for samples in splits.values()] == [
        ["nyu_00000", "nyu_00001"],
        ["nyu_00002", "nyu_00003"],
    ]
    check_depth(splits, DepthRule(1000), 0.001, 10)
    image, depth_m = fake_depth(3, SIZE)
    np.testing.assert_array_equal(np.array(Image.open(splits["val"][1].image)), image)
    read = DepthRule(1000).read(splits["val"][1].depth)
    np.testing.assert_allclose(read, np.where(depth_m > 0, depth_m, 4), atol=0.00051)  # filled in


def test_official_test_frames(script, mats, tmp_path):
    script.main([*mats, str(tmp_path / "out"), "--layout", "official"])
    samples = NYUDepth(tmp_path / "out").samples("val")
    assert [s.image_id for s in samples] == ["home_office/rgb_00003", "kitchen/rgb_00002"]
    assert samples[0].focal == 518.8579
    image, depth_m = fake_depth(3, SIZE)
    np.testing.assert_allclose(DepthRule(1000).read(samples[0].depth), depth_m, atol=0.00051)  # as measured, with holes
    written = np.array(Image.open(samples[0].image)).astype(int)
    assert written[:5].max() < 16 and written[:, 634:].max() < 16  # the frame is black
    assert np.abs(written[20:460, 20:620] - image[20:460, 20:620]).mean() < 4


def test_broken_input_is_named(script, mats, tmp_path):
    cases = {
        "no such file": [str(tmp_path / "gone.mat"), mats[1]],
        "cannot be read as HDF5": [mats[1], mats[1]],
        "no official split": [mats[0], mats[0]],
    }
    make_mat(tmp_path / "one.mat", TYPES[:1])
    cases["1 frames, and the splits name frame 2"] = [str(tmp_path / "one.mat"), mats[1]]
    make_mat(tmp_path / "hostile.mat", ("../../up", *TYPES[1:]))
    cases["scene type"] = [str(tmp_path / "hostile.mat"), mats[1]]
    with h5py.File(tmp_path / "empty.mat", "w") as file:
        file["images"] = np.zeros((4, 3, 4, 4), np.uint8)
    cases["holds no depths, sceneTypes"] = [str(tmp_path / "empty.mat"), mats[1]]
    for message, paths in cases.items():
        with pytest.raises(SystemExit, match=message):
            script.main([*paths, str(tmp_path / "out")])
    assert not (tmp_path.parent / "up").exists()


def test_millimetres(script):
    found = script.to_millimetres(np.float32([[np.nan, np.inf, -1], [0, 2.7314, 70]]))
    np.testing.assert_array_equal(found, np.array([[0, 0, 0], [0, 2731, 0]], np.uint16))
