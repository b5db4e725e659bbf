"""Scores of medical segmentation: of each case (image or volume) first, then over the cases."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dense_heads.metrics import instances
from dense_heads.metrics.surface import diagonal, surface_distances

Array = npt.NDArray[Any]

RATIOS = ("dice", "iou", "sensitivity", "precision", "surface_dice")
BINS = 15  # of the calibration error
RESAMPLES = 2000  # of the bootstrap


def conventions(unit: str, tolerance: float, objects: bool = False) -> str:
    """How the scores are counted; `unit` of distances, `mm` or `px`; `objects`: whether single objects are too."""
    space = (
        "millimetres, by the spacing of each volume" if unit == "mm" else "pixels, because the images state no spacing"
    )
    return (
        "Each case (an image, or a volume put together from its slices at its own size) is measured for each class but "
        "the background; a case's score is the mean over the classes, the score of the split the mean over its cases, "
        "with the standard deviation over cases and a 95 % interval from a bootstrap over cases "
        f"({RESAMPLES} resamples, percentiles). Pixels labelled 255 count nowhere. With TP, FP, FN voxels of a class: "
        "Dice = 2 TP / (2 TP + FP + FN), IoU = TP / (TP + FP + FN), sensitivity = TP / (TP + FN), precision = TP / "
        "(TP + FP). HD95 is the larger of both directions' 95th percentiles of surface distances, ASSD their mean over "
        f"both surfaces, surface Dice the share of both surfaces within {tolerance:g} {unit} of the other; a surface "
        "voxel is one with a face to the outside, beyond the image's border included. Distances are in "
        f"{space}. Where prediction and label are both empty, ratios are 1 and distances are left out and counted "
        "(no_distance); where one is empty, ratios are 0 and distances are the image's diagonal. dice_pooled is the "
        "Dice of the voxels of all cases together, mean over classes. volume_error is |predicted - true| / true "
        f"volume, left out where the true one is 0. ECE is over all labelled pixels of a case, background included, "
        f"{BINS} equal bins of the winning probability." + (instances.CONVENTIONS if objects else "")
    )


def class_row(prediction: Array, label: Array, spacing: Sequence[float], tolerance: float) -> dict[str, float]:
    """The scores of one class in one case.

    Args:
        prediction: bool mask of two or three dimensions.
        label: the same.
        spacing: mm along each.
        tolerance: of surface Dice, mm.

    Returns:
        dice, iou, sensitivity, precision, surface_dice (0 to 1), hd95, assd (mm), voxels `tp`, `fp`, `fn`, and
        `volume_error`; by `conventions` where a mask is empty, nan = left out.
    """
    tp = int((prediction & label).sum())
    fp, fn = int(prediction.sum()) - tp, int(label.sum()) - tp
    row: dict[str, float] = {"tp": tp, "fp": fp, "fn": fn}
    row["volume_error"] = abs(fp - fn) / (tp + fn) if tp + fn else float("nan")
    if not (tp + fp and tp + fn):
        both = not (tp + fp or tp + fn)
        row |= dict.fromkeys(RATIOS, 1.0 if both else 0.0)
        return row | dict.fromkeys(("hd95", "assd"), float("nan") if both else diagonal(label.shape, spacing))
    row |= {
        "dice": 2 * tp / (2 * tp + fp + fn),
        "iou": tp / (tp + fp + fn),
        "sensitivity": tp / (tp + fn),
        "precision": tp / (tp + fp),
    }
    distances = surface_distances(prediction, label, spacing)
    return row | {
        "surface_dice": distances.within(tolerance),
        "hd95": distances.hausdorff(),
        "assd": distances.average(),
    }


def calibration_counts(probabilities: Array, label: Array, valid: Array) -> Array:
    """Pixels, right pixels and summed confidence (3, BINS) by the winning probability.

    Args:
        probabilities: (K, ...) of the classes, summing to 1.
        label: (...) class ids.
        valid: (...) bool, pixels that count.
    """
    winner = probabilities.argmax(axis=0)
    confidence = np.take_along_axis(probabilities, winner[None], axis=0)[0][valid].astype(np.float64)
    right = (winner == label)[valid]
    index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # right-closed bins
    return np.stack([np.bincount(index, weights, BINS) for weights in (np.ones(len(index)), right, confidence)])


def calibration_error(counts: Array) -> float:
    """Expected calibration error of summed `calibration_counts`: mean |share right - confidence|, by pixels."""
    pixels, right, confidence = counts
    return float(np.abs(right - confidence).sum() / pixels.sum()) if pixels.sum() else float("nan")


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean over cases: percentiles over resamples of the cases; nan for none."""
    if not len(values):
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values)[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def over_cases(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (n - 1), bootstrap interval and number of the values that are not nan."""
    known = [value for value in values if not np.isnan(value)]
    low, high = bootstrap(known)
    mean = float(np.mean(known)) if known else float("nan")
    std = float(np.std(known, ddof=1)) if len(known) > 1 else float("nan")
    return {"mean": mean, "std": std, "low": low, "high": high, "cases": len(known)}


def mean_known(values: Sequence[float]) -> float:
    """Mean of those that are not nan; nan where there is none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
