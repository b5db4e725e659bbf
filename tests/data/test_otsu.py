import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dense_heads.data.otsu import Case, cases_of, class_of_ranges, grey_ranges


def by_definition(values, num):
    """The cuts with the least variance within ranges, of all that there are."""
    best, cuts = np.inf, None
    for chosen in itertools.combinations(np.unique(values)[:-1], num - 1):
        inside = sum(part.var() * len(part) for part in parted(values, chosen))
        if inside < best - 1e-9:
            best, cuts = inside, chosen
    return cuts


def parted(values, cuts):
    edges = [-1, *cuts, 256]
    return [values[(values > low) & (values <= high)] for low, high in itertools.pairwise(edges)]


def blobs(seed, levels=(40, 120, 200), size=(9, 11)):
    """Grey in which each class has a level of its own, and the classes (1, H, W)."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, len(levels), (1, *size))
    return (np.array(levels)[label] + rng.normal(0, 15, label.shape)).clip(0, 255).astype(np.uint8), label


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_thresholds_are_those_of_the_definition(num, seed):
    grey, _ = blobs(seed)
    counted = np.ones(grey.shape, bool)
    counted[:, 0] = False
    grey[:, 0] = 255  # would move the thresholds
    expected = np.digitize(grey, by_definition(grey[counted].astype(float), num), right=True)
    np.testing.assert_array_equal(grey_ranges(grey, counted, num), expected)


def test_what_is_flat_is_one_range():
    flat = np.full((1, 4, 4), 7, np.uint8)
    assert not grey_ranges(flat, np.ones(flat.shape, bool), 2).any()
    assert not grey_ranges(flat, np.zeros(flat.shape, bool), 2).any()


@pytest.mark.parametrize("levels", list(itertools.permutations((40, 120, 200))))
def test_classes_take_the_range_that_training_shows(levels):
    cases = [Case([], *blobs(seed, levels)) for seed in range(3)]
    assert class_of_ranges(cases, 3) == list(np.argsort(levels))
    grey, label = blobs(9, levels)
    found = np.array(class_of_ranges(cases, 3))[grey_ranges(grey, np.ones(grey.shape, bool), 3)]
    assert (found == label).mean() > 0.95


def test_the_mean_dice_decides_not_the_number_of_pixels():
    """Bright in two small images, dark in a large one."""
    small, large = blobs(0, (40, 200)), blobs(1, (200, 40), (40, 40))
    cases = [Case([], *small), Case([], *blobs(2, (40, 200))), Case([], *large)]
    assert class_of_ranges(cases, 2) == [0, 1]
    assert class_of_ranges([*cases[1:], Case([], *blobs(3, (200, 40)))], 2) == [1, 0]


class Slices:
    """Two volumes of three slices, as SliceDataset gives them."""

    def __init__(self):
        cases = [SimpleNamespace(image_id=name) for name in "ab" for _ in range(3)]
        self.samples = [SimpleNamespace(image_id=f"{case.image_id}_{i % 3}", case=case) for i, case in enumerate(cases)]

    def __getitem__(self, index):
        return {"mask": torch.full((2, 2), index), "case_id": self.samples[index].case.image_id}

    def picture(self, index):
        return np.full((2, 2, 3), 10 * index, np.uint8)


def test_slices_of_a_volume_are_one_case():
    first, second = cases_of(Slices())
    assert first.grey[:, 0, 0].tolist() == [0, 10, 20] and second.label[:, 1, 1].tolist() == [3, 4, 5]
    assert [len(case.items) for case in cases_of(Slices(), num=4)] == [3, 1]
    (only,) = cases_of(Slices(), most=1)
    assert only.items[0]["case_id"] == "a"
