import math

import numpy as np
import pytest
import torch

from dense_heads.errors import UserError
from dense_heads.metrics.depth import CROPS, SCORES, DepthMetrics, conventions, scores

CLOSE = {"rel": 1e-10}


def random_images(num: int = 4, size: tuple[int, int] = (23, 31)) -> list[tuple[np.ndarray, np.ndarray]]:
    """Predictions and labels of different sizes; a quarter without measurement, some beyond 10 m or at the bounds."""
    rng = np.random.default_rng(0)
    images = []
    for index in range(num):
        shape = (size[0] + index, size[1] - index)
        target = rng.uniform(0.5, 12, shape)
        target[rng.random(shape) < 0.25 * (1 + index) / num] = 0
        target[0, :4] = [10.0, 0.001, np.nan, np.inf]
        pred = rng.uniform(0.5, 9, shape)
        pred = np.where(rng.random(shape) < 0.6, np.clip(target, 0.4, 9.9) * rng.uniform(0.8, 1.2, shape), pred)
        images.append((np.where(np.isfinite(pred), pred, 1.0), target))
    return images


def by_hand(pred: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Each score written out, over the pixels that are given."""
    ratio = np.maximum(pred / target, target / pred)
    e = np.log(pred) - np.log(target)
    return {
        "abs_rel": np.mean(np.abs(pred - target) / target),
        "sq_rel": np.mean((pred - target) ** 2 / target),
        "rmse_m": np.sqrt(np.mean((pred - target) ** 2)),
        "rmse_log": np.sqrt(np.mean(e**2)),
        "log10": np.mean(np.abs(np.log10(pred) - np.log10(target))),
        "silog": 100 * np.sqrt(np.mean(e**2) - np.mean(e) ** 2),
        "delta1": np.mean(ratio < 1.25),
        "delta2": np.mean(ratio < 1.25**2),
        "delta3": np.mean(ratio < 1.25**3),
    }


def inside(pred: np.ndarray, target: np.ndarray, max_m: float = 10.0) -> tuple[np.ndarray, np.ndarray]:
    valid = (target > 0.001) & (target < max_m)
    return pred[valid], target[valid]


def measured(images, **arguments) -> dict[str, float]:
    metric = DepthMetrics(**arguments)
    for pred, target in images:
        metric.update(torch.from_numpy(pred), torch.from_numpy(target))
    return scores(metric.compute())


def test_over_images_is_the_mean_of_each_ones_scores():
    images = random_images()
    each = [by_hand(*inside(*image)) for image in images]
    ours = measured(images)
    assert tuple(each[0]) == SCORES
    for name in SCORES:
        assert ours[name] == pytest.approx(np.mean([own[name] for own in each]), **CLOSE), name
    assert ours["images_left_out"] == 0
    assert 0 < ours["delta1"] < ours["delta2"] < ours["delta3"] < 1


def test_over_pixels_is_one_pool():
    images = random_images()
    pool = [np.concatenate(parts) for parts in zip(*(inside(*image) for image in images), strict=True)]
    ours, expected = measured(images, over="pixels"), by_hand(*pool)
    for name in SCORES:
        assert ours[name] == pytest.approx(expected[name], **CLOSE), name
    assert ours["rmse_m"] != pytest.approx(measured(images)["rmse_m"], rel=1e-3)


def test_small_numbers():
    # |1 - 2| / 2 and |6 - 4| / 4; ratios 2 and 1.5
    ours = measured([(np.array([[1.0, 6.0, 3.0]]), np.array([[2.0, 4.0, 0.0]]))])
    assert ours["abs_rel"] == 0.5
    assert ours["sq_rel"] == 0.75
    assert ours["rmse_m"] == pytest.approx(math.sqrt(2.5))
    assert ours["log10"] == pytest.approx((math.log10(2) + math.log10(1.5)) / 2)
    assert ours["silog"] == pytest.approx(100 * (math.log(2) + math.log(1.5)) / 2)
    assert (ours["delta1"], ours["delta2"], ours["delta3"]) == (0.0, 0.5, 0.5)
    perfect = measured([(np.array([[2.0, 4.0]]), np.array([[2.0, 4.0]]))])
    assert [perfect[name] for name in SCORES] == [0, 0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("crop", "size", "rows", "columns"),
    [
        ("none", (5, 7), (0, 5), (0, 7)),
        ("eigen", (480, 640), (45, 471), (41, 601)),
        ("eigen", (530, 730), (45, 471), (41, 601)),  # SUN: the same native pixels
        ("eigen", (441, 591), (45, 441), (41, 591)),
        ("garg", (352, 1216), (143, 349), (43, 1172)),
        ("garg_eigen", (352, 1216), (117, 321), (43, 1172)),
    ],
)
def test_crops_are_cut_at_the_labels_own_size(crop, size, rows, columns):
    target = np.full(size, 2.0)
    wrong = np.full(size, 100.0)
    wrong[slice(*rows), slice(*columns)] = 3.0
    assert measured([(wrong, target)], crop=crop)["abs_rel"] == 0.5
    # And not a pixel less: its first and its last corner count.
    area = (rows[1] - rows[0]) * (columns[1] - columns[0])
    for corner in ((rows[0], columns[0]), (rows[1] - 1, columns[1] - 1)):
        dotted = np.full(size, 2.0)
        dotted[corner] = 4.0
        assert measured([(dotted, target)], crop=crop)["abs_rel"] == pytest.approx(1 / area)


@pytest.mark.parametrize("over", ["images", "pixels"])
def test_images_without_a_valid_pixel_are_left_out_and_counted(over):
    images = random_images(2)
    nothing = [np.zeros((9, 9)), np.full((9, 9), 11.0), np.full((9, 9), np.nan)]
    empty = [(np.full((9, 9), 2.0), target) for target in nothing]
    mixed, plain = (measured(these, over=over) for these in ([*empty, *images], images))
    assert mixed.pop("images_left_out") == 3 and plain.pop("images_left_out") == 0
    assert mixed == plain
    alone = measured(empty, over=over)
    assert alone.pop("images_left_out") == 3
    assert all(math.isnan(value) for value in alone.values())
    # The label ends before the crop begins.
    assert measured([(np.ones((40, 40)), np.ones((40, 40)))], crop="eigen")["images_left_out"] == 1


def test_scale_and_shift_is_a_least_squares_fit_of_each_image():
    images = random_images()
    each = []
    for pred, target in images:
        pred, target = inside(pred, target)
        scale, shift = np.polyfit(pred, target, 1)
        each.append(by_hand(np.clip(scale * pred + shift, 0.001, 10.0), target))
    ours = measured(images, align="scale_shift")
    for name in SCORES:
        assert ours[name] == pytest.approx(np.mean([own[name] for own in each]), rel=1e-8), name
    moved = [(0.03 * pred - 7, target) for pred, target in images]  # negative too: relative depth has no zero
    assert measured(moved, align="scale_shift") == pytest.approx(ours, rel=1e-8)


def test_scale_is_by_medians_of_each_image():
    images = random_images(3)
    each = []
    for pred, target in images:
        pred, target = inside(pred, target)
        each.append(by_hand(np.clip(pred * np.median(target) / np.median(pred), 0.001, 10.0), target))
    ours = measured(images, align="scale")
    for name in SCORES:
        assert ours[name] == pytest.approx(np.mean([own[name] for own in each]), **CLOSE), name
    for scale in (0.1, 50.0):
        assert measured([(scale * pred, target) for pred, target in images], align="scale") == pytest.approx(ours)
    assert measured(images)["abs_rel"] != pytest.approx(ours["abs_rel"], rel=1e-3)


def test_alignment_looks_at_valid_pixels_only():
    target = np.array([[1.0, 2.0, 3.0, 0.0, 50.0]])
    pred = np.array([[10.0, 20.0, 30.0, 1e6, -1e6]])
    for align in ("scale", "scale_shift"):
        assert measured([(pred, target)], align=align)["rmse_m"] == pytest.approx(0, abs=1e-12)


def test_a_constant_prediction_can_be_aligned():
    target = np.array([[1.0, 2.0, 6.0]])
    assert measured([(np.full((1, 3), 5.0), target)], align="scale_shift")["rmse_m"] == pytest.approx(np.std(target))
    assert measured([(np.full((1, 3), 5.0), target)], align="scale")["abs_rel"] == pytest.approx((1 + 0 + 4 / 6) / 3)


def test_predictions_are_clipped_where_it_is_asked():
    pred, target = np.array([[20.0, 2.0]]), np.array([[8.0, 2.0]])
    assert measured([(pred, target)])["abs_rel"] == 0.75
    assert measured([(pred, target)], clip_m=8.0)["abs_rel"] == 0.0


@pytest.mark.parametrize("over", ["images", "pixels"])
def test_is_the_same_however_the_images_are_shared_out(over):
    images = random_images(5)
    whole = measured(images, over=over)
    merged = DepthMetrics(over=over)
    for share in (images[:2], images[2:]):
        part = DepthMetrics(over=over)
        for pred, target in share:
            part.update(torch.from_numpy(pred), torch.from_numpy(target))
        merged.merge_state(part)  # by the reduction that processes use at the end
    assert scores(merged.compute()) == pytest.approx(whole, rel=1e-12)


def test_sums_stay_exact_in_a_half_precision_run():
    images = random_images(2)
    metric = DepthMetrics()
    metric.half()
    metric.to(torch.bfloat16)
    for pred, target in images:
        metric.update(torch.from_numpy(pred), torch.from_numpy(target))
    assert metric.sums.dtype == torch.float64
    assert scores(metric.compute()) == measured(images)


def test_a_result_stays_as_it_was_and_reset_starts_again():
    images = random_images(2)
    metric = DepthMetrics()
    metric.update(*map(torch.from_numpy, images[0]))
    first = metric.compute()
    kept = first.clone()
    metric.update(*map(torch.from_numpy, images[1]))
    assert torch.equal(first, kept) and not torch.equal(metric.compute(), kept)
    metric.reset()
    metric.update(*map(torch.from_numpy, images[0]))
    assert torch.equal(metric.compute(), kept)


def test_a_prediction_that_is_no_number_is_not_hidden():
    images = random_images(2)
    images[0][0][5:] = np.nan
    assert math.isnan(measured(images)["abs_rel"])


def test_conventions_say_what_was_done():
    text = conventions(0.001, 80.0, "garg", "images", "none")
    assert all(word in text for word in ("0.001 and 80 m", "Garg's crop", "averaged over images", "as they are"))
    other = conventions(0.001, 10.0, "eigen", "pixels", "scale_shift", 8.0)
    assert all(word in other for word in ("rows 45 to 470", "at once", "least squares", "beyond 8 m"))
    for crop in CROPS:
        assert conventions(0.001, 10.0, crop) != conventions(0.001, 10.0, "none") or crop == "none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": "eigenn"}, "'eigenn'.*Did you mean 'eigen'"),
        ({"over": "batches"}, "'batches'.*images, pixels"),
        ({"align": "shift"}, "'shift'"),
        ({"min_m": 10.0}, "min_m < max_m"),
        ({"max_m": float("nan")}, "min_m < max_m"),
        ({"clip_m": 0.0}, "cut at 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        DepthMetrics(**arguments)
    with pytest.raises(UserError, match=message):
        conventions(**{"min_m": 0.001, "max_m": 10.0, **arguments})


def test_unequal_sizes_are_our_own_mistake():
    with pytest.raises(AssertionError):
        DepthMetrics().update(torch.ones(3, 4), torch.ones(4, 3))
