"""What is predicted without looking at the image, against plain loops."""

import re

import numpy as np
import pytest

from dense_heads.data import blind_depth
from dense_heads.data.blind_depth import blind_depths, read_label
from dense_heads.data.datasets.base import Sample
from dense_heads.data.depth import DepthDataset
from dense_heads.data.depth_maps import DepthRule
from dense_heads.data.depth_transforms import DepthEvalTransform
from tests.factories import save_depth


def dataset(folder, maps, transform=None):
    """Of depth files alone: the images are never read."""
    samples = []
    for i, depth_m in enumerate(maps):
        samples.append(Sample(f"{i}", folder / f"{i}.jpg", depth=save_depth(folder / f"{i}.png", depth_m)))
    return DepthDataset(samples, DepthRule(1000), transform or DepthEvalTransform())


def holey_maps(num, size=(40, 6)):
    rng = np.random.default_rng(num)
    maps = rng.integers(500, 9000, (num, *size)) / 1000
    maps[rng.uniform(size=maps.shape) < 0.3] = 0
    maps[:, 0, 0] = 0  # nowhere measured
    maps[:, 0, 1] = 12.0  # never within the range
    maps[:, 0, 2] = 0
    maps[0, 0, 2] = 3.0  # once
    return maps


@pytest.mark.parametrize("num", [1, 6, 7])
def test_medians_of_everything_and_of_each_pixel(tmp_path, num):
    maps = holey_maps(num)
    data = dataset(tmp_path, maps)
    everywhere, of_pixel, weighted = blind_depths(data, data, 0.001, 10.0)
    measured = [value for value in maps.ravel() if 0.001 < value < 10]
    median = np.median(measured)
    np.testing.assert_allclose(everywhere.depth_m, np.full((40, 6), median), rtol=1e-6)
    said = re.fullmatch(r"training median, (.*) m", everywhere.name)[1]
    assert float(said) == pytest.approx(median, abs=0.0051)
    assert "of each pixel" in of_pixel.name and "1 / depth" in weighted.name
    for y in range(40):
        for x in range(6):
            values = np.array([v for v in maps[:, y, x] if 0.001 < v < 10])
            assert of_pixel.depth_m[y, x] == pytest.approx(np.median(values) if len(values) else median, rel=1e-6)
            if len(values):  # nothing else on this pixel has a smaller mean of |d - t| / t
                errors = [np.mean(np.abs(d - values) / values) for d in values]
                ours = np.mean(np.abs(weighted.depth_m[y, x] - values) / values)
                assert ours == pytest.approx(min(errors), rel=1e-5, abs=1e-6)
            else:
                assert weighted.depth_m[y, x] == pytest.approx(median, rel=1e-6)


def test_labels_are_cut_as_the_evaluation_cuts_them_and_sizes_may_differ(tmp_path):
    frames = [np.full(size, depth) for size, depth in (((375, 1242), 4.0), ((370, 1226), 8.0), ((370, 1226), 6.0))]
    frames[1][-1, :] = 2.0
    data = dataset(tmp_path, frames, DepthEvalTransform(crop="kb"))
    assert read_label(data, 1).shape == (352, 1216)
    _, of_pixel, _ = blind_depths(data, data, 0.001, 80.0)
    assert of_pixel.depth_m.shape == (352, 1216) and of_pixel.depth_m[-1, 5] == 4.0 and of_pixel.depth_m[0, 0] == 6.0
    (tmp_path / "small").mkdir()
    mixed = dataset(tmp_path / "small", [np.full((8, 6), 2.0), np.full((4, 3), 4.0)])
    assert blind_depths(mixed, mixed, 0.001, 80.0)[1].at((2, 2)).tolist() == [[3, 3], [3, 3]]


def test_of_many_maps_some_are_taken_and_the_name_says_so(tmp_path, monkeypatch):
    data = dataset(tmp_path, [np.full((4, 5), 1.0 + i) for i in range(9)])
    monkeypatch.setattr(blind_depth, "_MOST_PIXELS", 60)
    everywhere, *_ = blind_depths(data, data, 0.001, 80.0)
    assert everywhere.name == "training median of 3 maps, 5.00 m"  # the first, the middle and the last


def test_nothing_measured_gives_nothing(tmp_path):
    data = dataset(tmp_path, [np.zeros((4, 5))])
    assert blind_depths(data, data, 0.001, 10.0) == []
