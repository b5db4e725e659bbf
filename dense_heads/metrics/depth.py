"""Scores of depth: errors and accuracies over images or over pixels, masked by range and crop."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

from dense_heads.errors import UserError, unknown_name

Box = tuple[int, int, int, int]  # top, left, bottom, right

SCORES = ("abs_rel", "sq_rel", "rmse_m", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3")
OVER = ("images", "pixels")
ALIGNMENTS = ("none", "scale", "scale_shift")


def _none(height: int, width: int) -> Box:
    return 0, 0, height, width


def _eigen(height: int, width: int) -> Box:
    return 45, 41, 471, 601


def _garg(height: int, width: int) -> Box:
    return _shares(height, width, (0.40810811, 0.99189189), (0.03594771, 0.96405229))


def _garg_eigen(height: int, width: int) -> Box:
    return _shares(height, width, (0.3324324, 0.91351351), (0.0359477, 0.96405229))


def _shares(height: int, width: int, rows: tuple[float, float], columns: tuple[float, float]) -> Box:
    return int(rows[0] * height), int(columns[0] * width), int(rows[1] * height), int(columns[1] * width)


CROPS: dict[str, Callable[[int, int], Box]] = {"none": _none, "eigen": _eigen, "garg": _garg, "garg_eigen": _garg_eigen}
_CROP_TEXT = {
    "none": "The whole label counts",
    "eigen": "Of the label, rows 45 to 470 and columns 41 to 600 count (Eigen's crop of NYU's 480 x 640 pixels; the "
    "same pixels of labels of other sizes)",
    "garg": "Of the label, the rows from 40.8 to 99.2 % of its height and the columns from 3.6 to 96.4 % of its width "
    "count (Garg's crop)",
    "garg_eigen": "Of the label, the rows from 33.2 to 91.4 % of its height and the columns from 3.6 to 96.4 % of its "
    "width count (Eigen's crop of KITTI)",
}
_OVER_TEXT = {
    "images": "Scores are measured on each image and averaged over images, as DINOv2's were: RMSE is a mean of the "
    "images' RMSEs. An image without any pixel that counts is left out and counted in images_left_out",
    "pixels": "Scores are measured over all pixels of all images at once. An image without any pixel that counts adds "
    "nothing and is counted in images_left_out",
}
_ALIGN_TEXT = {
    "none": "Predictions are compared as they are, in metres",
    "scale": "Each prediction is first multiplied by median label / median prediction over the pixels that count, then "
    "cut to the range",
    "scale_shift": "Each prediction is first brought by the scale and shift that fit the label best (least squares in "
    "metres over the pixels that count), then cut to the range",
}


class DepthMetrics(Metric):
    """Errors of depth maps, summed over a data set and over processes in float64.

    abs_rel, sq_rel (m), rmse_m (m), rmse_log, log10, silog (x 100) and the shares delta1 to delta3 of pixels within a
    factor of 1.25, 1.25^2, 1.25^3. Facts sheet 3.2; masks and crops as MDE-Toolbox has them.

    Args:
        min_m: labels at or below do not count, in metres.
        max_m: labels at or above do not count.
        crop: part of the label that counts: none | eigen (NYU, SUN) | garg | garg_eigen (KITTI).
        over: `images`, a mean over images of each one's scores, as published; or `pixels`.
        align: none | scale (medians) | scale_shift (least squares): what relative depth is forgiven, image by image.
        clip_m: predictions beyond are cut to it, in metres (SUN RGB-D: 8); None cuts nothing.
        over_processes: False sums over this process alone.

    Raises:
        UserError: an unknown name, or a range that makes no sense.
    """

    full_state_update = False
    sums: Tensor
    num_images: Tensor
    num_pixels: Tensor
    num_left_out: Tensor

    def __init__(
        self,
        min_m: float = 0.001,
        max_m: float = 10.0,
        crop: str = "none",
        over: str = "images",
        align: str = "none",
        clip_m: float | None = None,
        over_processes: bool = True,
    ) -> None:
        super().__init__(sync_on_compute=over_processes)
        _check(min_m, max_m, crop, over, align, clip_m)
        self.min_m, self.max_m, self.crop, self.over, self.align = min_m, max_m, crop, over, align
        self.clip_m = clip_m
        self.add_state("sums", torch.zeros(len(SCORES), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("num_images", "num_pixels", "num_left_out"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Count one image.

        Args:
            pred: (H, W) metres above 0, at the label's own size.
            target: (H, W) metres; 0 or not finite where there is no measurement.
        """
        assert pred.ndim == 2 and pred.shape == target.shape, f"{tuple(pred.shape)}, label {tuple(target.shape)}"
        top, left, bottom, right = CROPS[self.crop](target.shape[0], target.shape[1])
        pred, target = pred[top:bottom, left:right].double(), target[top:bottom, left:right].double()
        valid = (target > self.min_m) & (target < self.max_m)  # false for nan
        pred, target = pred[valid], target[valid]
        if target.numel() == 0:
            self.num_left_out += 1
            return
        if self.align != "none":
            fit = _scaled if self.align == "scale" else _scaled_and_shifted
            pred = fit(pred, target).clamp(self.min_m, self.max_m)
        if self.clip_m is not None:
            pred = pred.clamp(max=self.clip_m)
        self.num_images += 1
        self.num_pixels += target.numel()
        of_pixels = _of_pixels(pred, target)
        added = of_pixels.sum(dim=1) if self.over == "pixels" else _scores(of_pixels.mean(dim=1))
        self.sums = self.sums.double() + added  # a run in half precision casts states, also those that are reset

    def compute(self) -> Tensor:
        """(10,) float64: `SCORES`, nan without any valid pixel, then the number of images that were left out."""
        if self.over == "pixels":
            values = _scores(self.sums / self.num_pixels)
        else:
            values = self.sums / self.num_images
        return torch.cat([values, self.num_left_out.double()[None]])


def scores(computed: Tensor) -> dict[str, float]:
    """What `DepthMetrics.compute` gave, by name: `SCORES` and `images_left_out`."""
    return dict(zip((*SCORES, "images_left_out"), computed.tolist(), strict=True))


def conventions(
    min_m: float,
    max_m: float,
    crop: str = "none",
    over: str = "images",
    align: str = "none",
    clip_m: float | None = None,
) -> str:
    """What numbers of `DepthMetrics` with the same arguments mean, in words.

    Raises:
        UserError: as `DepthMetrics`.
    """
    _check(min_m, max_m, crop, over, align, clip_m)
    clipped = "" if clip_m is None else f" Predictions beyond {clip_m:g} m are cut to it."
    return (
        f"Depth is compared at the label's own size, where the label is between {min_m:g} and {max_m:g} m (both "
        f"excluded). {_CROP_TEXT[crop]}. {_ALIGN_TEXT[align]}.{clipped} {_OVER_TEXT[over]}. With prediction d, label t "
        "and e = ln d - ln t: abs_rel = mean |d - t| / t, sq_rel = mean (d - t)^2 / t, rmse_m = sqrt(mean (d - t)^2), "
        "rmse_log = sqrt(mean e^2), log10 = mean |log10 d - log10 t|, silog = 100 sqrt(mean e^2 - (mean e)^2), "
        "delta1, 2, 3 = share of pixels with max(d / t, t / d) below 1.25, 1.25^2, 1.25^3."
    )


def _of_pixels(pred: Tensor, target: Tensor) -> Tensor:
    """(9, n): of each pixel what the scores are made of by averaging; see `_scores`."""
    error, log_error = pred - target, pred.log() - target.log()
    ratio = torch.maximum(pred / target, target / pred)
    return torch.stack(
        [
            error.abs() / target,
            error.square() / target,
            error.square(),
            log_error.square(),
            log_error.abs() / math.log(10),
            log_error,
            *((ratio < 1.25**power).double() for power in (1, 2, 3)),
        ]
    )


def _scores(means: Tensor) -> Tensor:
    """(9,) means of `_of_pixels` over some pixels -> `SCORES` of these pixels."""
    abs_rel, sq_rel, square, log_square, log10, log, *deltas = means.unbind()
    variance = (log_square - log.square()).clamp(min=0)  # a rounding error below 0 has no root
    return torch.stack([abs_rel, sq_rel, square.sqrt(), log_square.sqrt(), log10, 100 * variance.sqrt(), *deltas])


def _scaled(pred: Tensor, target: Tensor) -> Tensor:
    return pred * (_median(target) / _median(pred))


def _scaled_and_shifted(pred: Tensor, target: Tensor) -> Tensor:
    mean_pred, mean_target = pred.mean(), target.mean()
    centred = pred - mean_pred
    variance = centred.square().mean()
    # A constant prediction has no scale; the best shift is the label's mean.
    scale = torch.where(variance > 0, (centred * (target - mean_target)).mean() / variance, 0.0)
    return scale * centred + mean_target


def _median(x: Tensor) -> Tensor:
    """Of an even number the mean of the two in the middle, unlike torch.median."""
    ordered = x.sort().values
    return (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2


def _check(min_m: float, max_m: float, crop: str, over: str, align: str, clip_m: float | None) -> None:
    if crop not in CROPS:
        raise unknown_name("evaluation crop", str(crop), CROPS)
    if over not in OVER:
        raise unknown_name("evaluation average", str(over), OVER)
    if align not in ALIGNMENTS:
        raise unknown_name("evaluation alignment", str(align), ALIGNMENTS)
    if not (_is_number(min_m) and _is_number(max_m) and 0 <= min_m < max_m):
        raise UserError(f"Labels from {min_m!r} to {max_m!r} m are to count; expected metres with 0 <= min_m < max_m.")
    if clip_m is not None and not (_is_number(clip_m) and clip_m > min_m):
        raise UserError(f"Predictions are to be cut at {clip_m!r} m; expected metres above {min_m:g}, or null.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
