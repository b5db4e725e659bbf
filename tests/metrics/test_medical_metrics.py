import math
import warnings

import numpy as np
import pytest
import torch

from dense_heads.metrics.cases import CaseMeter, Protocol
from dense_heads.metrics.medical import bootstrap, class_row, conventions, over_cases

monai = pytest.importorskip("monai.metrics")


def blob(shape, seed, grow=0.55):
    """A smooth random mask."""
    from scipy import ndimage

    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return noise > np.quantile(noise, grow)


def one_voxel(shape, at):
    mask = np.zeros(shape, bool)
    mask[at] = True
    return mask


def full(shape):
    return np.ones(shape, bool)


SHAPES = [(24, 31), (13, 17, 11)]
SPACINGS = {2: [(1.0, 1.0), (0.37, 2.1)], 3: [(1.0, 1.0, 1.0), (3.0, 0.61, 0.83)]}
PAIRS = [
    *[(shape, blob(shape, 1), blob(shape, 2)) for shape in SHAPES],
    *[(shape, blob(shape, 3, 0.9), blob(shape, 4, 0.2)) for shape in SHAPES],
    *[(shape, one_voxel(shape, (0,) * len(shape)), one_voxel(shape, (-1,) * len(shape))) for shape in SHAPES],
    *[(shape, one_voxel(shape, (5,) * len(shape)), one_voxel(shape, (5,) * len(shape))) for shape in SHAPES],
    *[(shape, full(shape), blob(shape, 5)) for shape in SHAPES],  # touches every border
    *[(shape, full(shape), full(shape)) for shape in SHAPES],
]


@pytest.mark.parametrize(("shape", "prediction", "label"), PAIRS)
@pytest.mark.parametrize("which", [0, 1])
def test_scores_agree_with_monai(shape, prediction, label, which):
    spacing = SPACINGS[len(shape)][which]
    row = class_row(prediction, label, spacing, tolerance=1.23)
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, label)]
    theirs = {
        "dice": monai.DiceMetric(include_background=True)(*pair),
        "hd95": monai.compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing),
        "assd": monai.compute_average_surface_distance(*pair, include_background=True, symmetric=True, spacing=spacing),
        "surface_dice": monai.compute_surface_dice(*pair, [1.23], include_background=True, spacing=spacing),
    }
    matrix = monai.get_confusion_matrix(*pair, include_background=True)
    for name, ours in (("iou", "threat score"), ("sensitivity", "sensitivity"), ("precision", "precision")):
        theirs[name] = monai.compute_confusion_matrix_metric(ours, matrix)
    for name, value in theirs.items():
        assert row[name] == pytest.approx(value.item(), abs=1e-5), name


@pytest.mark.parametrize("shape", SHAPES)
def test_empty_masks_follow_the_stated_rule_where_monai_has_none(shape):
    spacing = SPACINGS[len(shape)][1]
    empty, some = np.zeros(shape, bool), blob(shape, 1)
    pair = [torch.zeros(1, 1, *shape), torch.from_numpy(some)[None, None].float()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = monai.compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
        neither = monai.compute_hausdorff_distance(pair[0], pair[0], include_background=True, percentile=95)
    assert not math.isfinite(theirs.item()) and math.isnan(neither.item())
    diagonal = math.sqrt(sum((n * s) ** 2 for n, s in zip(shape, spacing, strict=True)))
    for prediction, label in ((empty, some), (some, empty)):
        row = class_row(prediction, label, spacing, 1.0)
        assert {row[n] for n in ("dice", "iou", "sensitivity", "precision", "surface_dice")} == {0.0}
        assert row["hd95"] == row["assd"] == pytest.approx(diagonal)
    row = class_row(empty, empty, spacing, 1.0)
    assert {row[n] for n in ("dice", "iou", "sensitivity", "precision", "surface_dice")} == {1.0}
    assert math.isnan(row["hd95"]) and math.isnan(row["assd"]) and math.isnan(row["volume_error"])


def test_volume_error():
    prediction, label = np.zeros((2, 10, 10), bool)
    prediction[:3], label[:5] = True, True
    assert class_row(prediction, label, (1, 1), 1)["volume_error"] == pytest.approx(0.4)


def random_case(seed, num_slices=5, size=(20, 24), num_classes=3):
    rng = np.random.default_rng(seed)
    label = np.stack([np.digitize(blob((num_slices, *size), seed + k), [0.5]) for k in range(1, num_classes)])
    label = (label * np.arange(1, num_classes)[:, None, None, None]).max(axis=0)
    logits = rng.normal(size=(num_slices, num_classes, *size)) + 2 * np.eye(num_classes)[label].transpose(0, 3, 1, 2)
    return torch.from_numpy(logits).softmax(dim=1).float(), torch.from_numpy(label)


def feed(meter, name, probabilities, label, spacing=(2.0, 1.0, 1.0), order=None):
    for index in order if order is not None else range(len(label)):
        meter.update(name, index, len(label), spacing, probabilities[index], label[index])


def test_a_case_is_measured_as_the_whole_that_its_slices_make():
    meter = CaseMeter(Protocol(3, tolerance=1.5))
    spacing = (2.5, 0.8, 1.1)
    cases = {name: random_case(seed) for name, seed in (("a", 1), ("b", 30))}
    feed(meter, "a", *cases["a"], spacing, order=[3, 0, 4, 1, 2])  # in any order, mixed with another case
    feed(meter, "b", *cases["b"], spacing)
    found = meter.compute()
    expected = {}
    for name, (probabilities, label) in cases.items():
        prediction = probabilities.argmax(dim=1)
        one_hot = [torch.stack([volume == k for k in (1, 2)])[None].float() for volume in (prediction, label)]
        expected[name] = {
            "dice": monai.DiceMetric(include_background=True)(*one_hot).mean().item(),
            "hd95_mm": monai.compute_hausdorff_distance(
                *one_hot, include_background=True, percentile=95, spacing=spacing
            ).mean().item(),
        }  # fmt: skip
        for score, value in expected[name].items():
            assert found["rows"][name][score] == pytest.approx(value, abs=1e-5)
    means = {score: np.mean([case[score] for case in expected.values()]) for score in ("dice", "hd95_mm")}
    for score, value in means.items():
        assert found["scores"][score] == pytest.approx(value, abs=1e-5) == found["spread"][score]["mean"]
    assert found["spread"]["dice"]["cases"] == 2 and len(found["per_class"]) == 2


def test_calibration_agrees_with_torchmetrics():
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities, label = random_case(3)
    meter = CaseMeter(Protocol(3))
    label[:, :4] = 255
    feed(meter, "a", probabilities, label)
    flat = probabilities.permute(0, 2, 3, 1).reshape(-1, 3)[label.flatten() != 255]
    theirs = multiclass_calibration_error(flat, label[label != 255].flatten(), 3, n_bins=15, norm="l1")
    assert meter.compute()["scores"]["ece"] == pytest.approx(theirs.item(), abs=1e-5)


def test_ignored_pixels_count_nowhere():
    probabilities, label = random_case(5, num_slices=1)
    meter, cut = CaseMeter(Protocol(3, unit="px")), CaseMeter(Protocol(3, unit="px"))
    feed(cut, "a", probabilities[:, :, :12], label[:, :12])
    hidden = label.clone()
    hidden[:, 12:] = 255
    feed(meter, "a", probabilities, hidden)
    ours, theirs = meter.compute()["scores"], cut.compute()["scores"]
    for name in ("dice", "iou", "precision", "ece", "dice_pooled", "volume_error"):
        assert ours[name] == pytest.approx(theirs[name]), name
    assert "hd95_px" in ours


def test_labels_that_overlap_are_measured_one_by_one():
    masks = torch.from_numpy(np.stack([blob((30, 30), 1), blob((30, 30), 2)])).long()
    meter = CaseMeter(Protocol(2, multilabel=True, unit="px"))
    meter.update("a", 0, 1, (1, 1, 1), masks.float() * 0.9 + 0.05, masks)
    found = meter.compute()
    assert bool((masks.sum(dim=0) == 2).any())  # they do overlap
    assert found["scores"]["dice"] == 1 and found["scores"]["hd95_px"] == 0 and len(found["per_class"]) == 2
    assert found["scores"]["ece"] == pytest.approx(0.05, abs=1e-6)


def test_mean_over_cases_is_not_the_pooled_dice():
    meter = CaseMeter(Protocol(2, unit="px"))
    for name, right in (("a", 8), ("b", 1)):
        label, found = torch.zeros(10, 10, dtype=torch.long), torch.zeros(2, 10, 10)
        label[:right, :8], found[0] = 1, 0.4
        found[1, :1, :8] = 0.6
        meter.update(name, 0, 1, (1, 1, 1), found, label)
    scores = meter.compute()["scores"]
    assert scores["dice"] == pytest.approx((16 / 72 + 1) / 2)
    assert scores["dice_pooled"] == pytest.approx(2 * 16 / (16 + 72))


def test_a_case_without_a_class_is_left_out_of_distances_and_counted():
    meter = CaseMeter(Protocol(2, unit="px"))
    nothing = torch.zeros(9, 9, dtype=torch.long)
    empty = torch.stack([torch.ones(9, 9), torch.zeros(9, 9)])
    meter.update("empty", 0, 1, (1, 1, 1), empty, nothing)
    some = nothing.clone()
    some[2:4, 2:4] = 1
    meter.update("some", 0, 1, (1, 1, 1), torch.nn.functional.one_hot(some, 2).permute(2, 0, 1).float(), some)
    found = meter.compute()
    assert found["scores"]["dice"] == 1 and found["scores"]["hd95_px"] == 0
    assert found["spread"]["hd95_px"]["cases"] == 1 and found["rows"]["empty"]["no_distance"] == 1


def test_the_interval_holds_the_mean_in_about_95_of_100_samples():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        low, high = bootstrap(rng.normal(size=30).tolist())
        held += low <= 0 <= high
    assert 88 <= held <= 99
    found = over_cases([1.0, 2.0, float("nan"), 6.0])
    assert (found["mean"], found["cases"]) == (3.0, 3) and found["std"] == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert found["low"] < 3 < found["high"] and over_cases([1.0, 2.0, 6.0]) == {**found, "cases": 3}


def test_the_conventions_say_what_is_done_with_empty_masks():
    text = conventions("mm", 2.0)
    assert "both empty" in text and "diagonal" in text and "2 mm" in text and "255" in text
