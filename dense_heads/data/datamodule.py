"""Loaders for any task family: what is trained by steps and measured once."""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from dense_heads.data.sampler import EvalSampler, StepBatchSampler
from dense_heads.errors import UserError
from dense_heads.ops.seeding import stable_seed

Collate = Callable[[list[Any]], Any]


class DataModule(LightningDataModule):
    """Train, validation and test loaders over data sets of one family.

    The Trainer must run with `use_distributed_sampler=False`: the samplers here share the samples out themselves. The
    training loader starts where the Trainer's `global_step` says, so that a resumed run sees the batches that the
    stopped one did not. All of training is one Lightning epoch of `max_steps` optimiser steps.

    Args:
        train, val, test: data sets; the training one is asked by (epoch, index), the others by index. None where
            there is none.
        batch_size: of training, over all processes, for each forward pass.
        max_steps: optimiser steps of the whole training.
        collate_train, collate_eval: items -> batch.
        eval_batch_size: images at a time, for each process.
        num_workers: processes that load, for each loader.
        seed: of the order of the samples.
        groups: for each training sample its classes, to draw by; see StepBatchSampler.
        shares: how often each class is drawn; see StepBatchSampler.
    """

    def __init__(
        self,
        train: Dataset[Any] | None,
        val: Dataset[Any] | None,
        test: Dataset[Any] | None,
        batch_size: int,
        max_steps: int,
        collate_train: Collate,
        collate_eval: Collate,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        groups: Sequence[Sequence[int]] | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if eval_batch_size < 1 or num_workers < 0:
            raise UserError(
                f"data.eval_batch_size is {eval_batch_size} and data.num_workers {num_workers}; "
                "expected at least 1 and at least 0."
            )
        self.train, self.val, self.test = train, val, test
        self.batch_size, self.max_steps = batch_size, max_steps
        self.collate_train, self.collate_eval = collate_train, collate_eval
        self.eval_batch_size, self.num_workers, self.seed = eval_batch_size, num_workers, seed
        self.groups, self.shares = groups, shares

    def train_dataloader(self) -> DataLoader[Any]:
        """The rest of the training, from the Trainer's step on."""
        if self.train is None:
            raise UserError("This task has no training split here; it can be evaluated and predicted, not trained.")
        rank, world_size = self._rank()
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        sampler = StepBatchSampler(
            len(self.train),  # type: ignore[arg-type]
            self.batch_size,
            self.seed,
            max_steps=self.max_steps * accumulate,
            start_step=(self.trainer.global_step if self.trainer else 0) * accumulate,
            rank=rank,
            world_size=world_size,
            groups=self.groups,
            shares=self.shares,
        )
        return _StepLoader(self.train, batch_sampler=sampler, collate_fn=self.collate_train, **self._loading("train"))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Every validation sample once."""
        return self._eval_loader(self.val, "val")

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Every test sample once."""
        return self._eval_loader(self.test, "test")

    def _eval_loader(self, dataset: Dataset[Any] | None, name: str) -> DataLoader[Any] | list[Any]:
        if dataset is None:
            return []
        sampler = EvalSampler(len(dataset), *self._rank())  # type: ignore[arg-type]
        return DataLoader(
            dataset,
            batch_size=self.eval_batch_size,
            sampler=sampler,
            collate_fn=self.collate_eval,
            **self._loading(name),
        )

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loading(self, name: str) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": one_thread,
            # A generator of its own: a loader without one draws from the global one whenever it is iterated, and what
            # training draws afterwards would depend on how often it was resumed and validated.
            "generator": torch.Generator().manual_seed(stable_seed("loader", self.seed, name)),
        }


class _StepLoader(DataLoader[Any]):
    """A loader that yields the remaining batches and says how many there are in all.

    Lightning counts the batches done before a resume as fetched from this loader; with the remaining number as its
    length the epoch would end too early.
    """

    def __len__(self) -> int:
        sampler = self.batch_sampler
        assert isinstance(sampler, StepBatchSampler)
        return sampler.max_steps


def one_thread(worker: int) -> None:
    """Workers share the processor's cores by being several, not by threads of their own."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
