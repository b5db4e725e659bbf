"""The loss of depth: SigLoss, multi-scale gradients, scale-and-shift-invariant, L1, relative L1, Huber, or a sum."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense_heads.errors import UserError
from dense_heads.losses.weights import checked_weights, is_number
from dense_heads.ops.across import mean_count, summed, total

_EPS_M = 1e-3  # added to depths before a logarithm
_MEAN_WEIGHT = 0.15  # of the squared mean in SigLoss
_STRIDES = (1, 2, 4, 6)  # of the gradient loss's scales
_TRIMMED = 0.2  # share of the largest residuals that the invariant loss leaves out
_SMALLEST_SPREAD_M = 1e-3  # a map flatter than the files' own resolution has no shape to compare


class DepthLoss(nn.Module):
    """Weighted sum of losses over the pixels that have a measurement.

    `sig` (published with weight 1) is the root of Var(g) + 0.15 mean(g)^2 over all valid pixels of the batch,
    g = ln(depth + 0.001) - ln(target + 0.001), the variance unbiased; its first calls in training leave the variance
    out. `gradient` (published with 0.5) sums, at strides 1, 2, 4 and 6, the absolute differences of g between pixels
    two steps apart in y and in x where both are valid, divided by the valid pixels at that stride. The original
    differenced over batch and channel instead of y and x, which is 0 for the 2 images per GPU that it trained with:
    the published heads were in effect trained by `sig` alone. `ssi` is MiDaS' trimmed scale-and-shift-invariant loss
    (arXiv 1907.01341, eq. 5-7), on depth: of each image, depth and target are freed of median and mean absolute
    deviation, and half the mean absolute residual is taken, without the largest fifth of residuals; then the mean over
    images. `l1` and `huber` are means over valid pixels, in metres; `relative` is the mean of |depth - target| / target
    over them, which is what abs_rel measures.

    With several processes the batch is that of all of them; the original took each GPU's two images by themselves.
    Pixels without a measurement reach no loss and no gradient, whatever is predicted there. A batch without any
    measurement gives a loss of 0 with gradients of 0.
    Sources: DINOv2 eval/depth/models/losses/{sigloss,gradientloss}.py.

    Args:
        sig: weight of SigLoss.
        gradient: weight of the multi-scale gradient loss.
        ssi: weight of the scale-and-shift-invariant loss, for relative depth.
        l1: weight of the mean absolute error.
        huber: weight of the Huber loss.
        relative: weight of the mean absolute error as a share of the target.
        sig_warmup: for so many calls in training SigLoss is without its variance. Counted in a buffer, so that a
            resumed run goes on counting.
        huber_delta: metres from which on the Huber loss is linear.
        max_m: targets beyond are left out; None, as published, takes every target above 0.

    Raises:
        UserError: weights that are negative, not finite or all 0; `sig_warmup` below 0; `huber_delta` or `max_m` not
            above 0.
    """

    calls: Tensor

    def __init__(
        self,
        sig: float = 1.0,
        gradient: float = 0.5,
        ssi: float = 0.0,
        l1: float = 0.0,
        huber: float = 0.0,
        relative: float = 0.0,
        sig_warmup: int = 100,
        huber_delta: float = 1.0,
        max_m: float | None = None,
    ) -> None:
        super().__init__()
        weights = {"sig": sig, "gradient": gradient, "ssi": ssi, "l1": l1, "huber": huber, "relative": relative}
        self.weights = {name: weight for name, weight in checked_weights(weights, "loss").items() if weight > 0}
        if not isinstance(sig_warmup, int) or isinstance(sig_warmup, bool) or sig_warmup < 0:
            raise UserError(f"loss.sig_warmup={sig_warmup!r}: expected a whole number of calls, 0 or above.")
        for name, metres in (("huber_delta", huber_delta), ("max_m", max_m)):
            if metres is not None and not (is_number(metres) and math.isfinite(metres) and metres > 0):
                raise UserError(f"loss.{name}={metres!r}: expected metres above 0.")
        self.sig_warmup, self.huber_delta, self.max_m = sig_warmup, huber_delta, max_m
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, depth: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            depth: (B, H, W) or (B, 1, H, W) metres, above -0.001, at the label's size.
            target: (B, H, W) metres; 0, negative or not finite where there is no measurement.

        Returns:
            Scalar, float32.
        """
        if depth.ndim == target.ndim + 1:
            depth = depth.squeeze(1)
        assert depth.shape == target.shape, (tuple(depth.shape), tuple(target.shape))
        valid = torch.isfinite(target) & (target > 0)
        if self.max_m is not None:
            valid &= target <= self.max_m
        # Sums over a batch's pixels need more digits than half precision has. Replaced, not multiplied by 0: a
        # prediction that is not finite where nothing was measured would poison sum and gradient.
        loss = depth[:0].sum().float()  # 0, with gradients of 0
        depth = torch.where(valid, depth.float(), 1.0)
        target = torch.where(valid, target.float(), 1.0)
        for name, weight in self.weights.items():
            loss = loss + weight * getattr(self, f"_{name}")(depth, target, valid)
        return loss

    def _sig(self, depth: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        log_ratio = _log(depth) - _log(target)
        number = total(valid.sum())
        mean = summed((log_ratio * valid).sum()) / number.clamp(min=1)
        variance = summed(((log_ratio - mean).square() * valid).sum()) / (number - 1).clamp(min=1)
        if self.training:
            variance = variance * (self.calls >= self.sig_warmup)
            self.calls += 1
        return _sqrt(variance + _MEAN_WEIGHT * mean.square())

    def _gradient(self, depth: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        log_ratio = _log(depth) - _log(target)
        loss = log_ratio.new_zeros(())
        for stride in _STRIDES:
            g, m = log_ratio[:, ::stride, ::stride], valid[:, ::stride, ::stride]
            down = (g[:, 2:] - g[:, :-2]).abs() * (m[:, 2:] & m[:, :-2])
            right = (g[:, :, 2:] - g[:, :, :-2]).abs() * (m[:, :, 2:] & m[:, :, :-2])
            loss = loss + (down.sum() + right.sum()) / mean_count(m)
        return loss

    def _ssi(self, depth: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        losses = []
        for own_depth, own_target, own_valid in zip(depth, target, valid, strict=True):
            if bool(own_valid.any()):
                residual = (_normalised(own_depth[own_valid]) - _normalised(own_target[own_valid])).abs()
                kept = residual.sort().values[: math.floor(len(residual) * (1 - _TRIMMED))]
                losses.append(kept.sum() / (2 * len(residual)))
        total_loss = torch.stack(losses).sum() if losses else depth.new_zeros(())
        return total_loss / mean_count(valid.flatten(1).any(dim=1))

    def _l1(self, depth: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return ((depth - target).abs() * valid).sum() / mean_count(valid)

    def _relative(self, depth: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return ((depth - target).abs() / target * valid).sum() / mean_count(valid)

    def _huber(self, depth: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        each = F.huber_loss(depth, target, reduction="none", delta=self.huber_delta)
        return (each * valid).sum() / mean_count(valid)


def _log(metres: Tensor) -> Tensor:
    return (metres + _EPS_M).log()


def _sqrt(x: Tensor) -> Tensor:
    """The root; its gradient, infinite at 0, is 0 there."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _normalised(metres: Tensor) -> Tensor:
    """(n,) less its median, divided by the mean absolute deviation from it."""
    centred = metres - metres.median()
    return centred / centred.abs().mean().clamp(min=_SMALLEST_SPREAD_M)
