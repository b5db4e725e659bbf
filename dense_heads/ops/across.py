"""Sums and gathers over the processes of a run; with one process they change nothing."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather, all_reduce


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def total(value: Tensor) -> Tensor:
    """The sum over the processes, as a new tensor; without gradient."""
    value = value.clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def summed(value: Tensor) -> Tensor:
    """The sum over the processes; gradients flow back to each."""
    if world_size() == 1:
        return value
    out: Tensor = all_reduce(value)  # type: ignore[no-untyped-call]
    return out


def mean_count(mask: Tensor) -> Tensor:
    """How many entries of a mask are true on a process's average, at least one in all.

    A process's own sum divided by it becomes the mean over the entries of all processes where DDP averages.
    """
    return total(mask.sum()).clamp(min=1) / world_size()


@torch.no_grad()
def logsumexp(value: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """`torch.logsumexp(value, dim, keepdim=True)` as if the processes' tensors were joined along `dim`."""
    if world_size() == 1:
        return value.logsumexp(dim, keepdim=True)
    if value.numel():
        most = value.amax(dim, keepdim=True)
    else:  # a process without a row takes part all the same
        dims = {dim % value.ndim} if isinstance(dim, int) else {d % value.ndim for d in dim}
        most = value.new_full([1 if d in dims else size for d, size in enumerate(value.shape)], -torch.inf)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    sums = (value - most).exp().sum(dim, keepdim=True)
    dist.all_reduce(sums)
    return sums.log() + most


def gathered(value: Tensor) -> Tensor:
    """The processes' tensors of equal shape, joined along the first dimension in rank order; gradients flow back."""
    if world_size() == 1:
        return value
    return torch.cat(all_gather(value))  # type: ignore[no-untyped-call]


def gathered_rows(value: Tensor) -> Tensor:
    """The processes' tensors joined along the first dimension, whose lengths may differ; without gradient."""
    if world_size() == 1:
        return value
    parts: list[Tensor | None] = [None] * world_size()
    dist.all_gather_object(parts, value)
    return torch.cat([part for part in parts if part is not None])
