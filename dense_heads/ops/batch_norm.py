"""Batch normalisation over all processes of a run, on any device."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of the total batch of all processes.

    The published heads were trained with synchronised statistics. PyTorch's SyncBatchNorm runs on GPUs alone; this one
    runs everywhere, so that two processes on a CPU train what one does. Parameter names and defaults are those of
    `nn.BatchNorm2d`; without a process group the two are the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape, normalised for each channel."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        x = input.float()
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        sums = torch.cat([x.sum(dim=(0, 2, 3)), count])
        if x.requires_grad:  # the statistics depend on the input of every process
            total: Tensor = differentiable.all_reduce(sums)  # type: ignore[no-untyped-call]
            mean = total[:-1] / total[-1]
            own = (x - mean[:, None, None]).square().sum(dim=(0, 2, 3))
            squares: Tensor = differentiable.all_reduce(own)  # type: ignore[no-untyped-call]
        else:
            total = sums
            dist.all_reduce(total)
            mean = total[:-1] / total[-1]
            squares = (x - mean[:, None, None]).square().sum(dim=(0, 2, 3))
            dist.all_reduce(squares)
        number = total[-1]
        variance = squares / number
        with torch.no_grad():
            assert self.num_batches_tracked is not None and self.momentum is not None
            assert self.running_mean is not None and self.running_var is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * number / (number - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normalised: Tensor = x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        return normalised.to(input.dtype)
