import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import Dataset

from dense_heads.data.datamodule import DataModule
from dense_heads.data.sampler import StepBatchSampler
from dense_heads.errors import UserError


class Keys(Dataset):
    """Gives back what it was asked for."""

    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, key):
        return key


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained, self.validated, self.tested, self.epoch_ends = [], [], [], 0

    def training_step(self, batch, _):
        self.trained.append(batch)
        return self.weight.sum()

    def validation_step(self, batch, _):
        self.validated.append(batch)

    def test_step(self, batch, _):
        self.tested.append(batch)

    def on_train_epoch_end(self):
        self.epoch_ends += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def as_list(items):
    return list(items)


def make(train=7, val=5, test=3, **options):
    sets = [None if num is None else Keys(num) for num in (train, val, test)]
    settings = {"batch_size": 4, "max_steps": 10, "collate_train": as_list, "collate_eval": as_list, **options}
    return DataModule(*sets, **settings)


def trainer(tmp_path, max_steps=10, **options):
    return Trainer(
        accelerator="cpu", max_steps=max_steps, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=tmp_path,
        enable_checkpointing=False, check_val_every_n_epoch=None, **{"val_check_interval": 5, **options},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def expected(steps=10, n=7, batch=4, seed=0):
    return list(StepBatchSampler(n, batch, seed, max_steps=steps))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_one_epoch_of_all_steps(tmp_path, workers):
    model = Recorder()
    trainer(tmp_path, num_sanity_val_steps=0).fit(model, datamodule=make(num_workers=workers))
    assert model.trained == expected()
    assert model.validated == [[0], [1], [2], [3], [4]] * 2
    assert model.epoch_ends == 1


class StopAt(Callback):
    """Writes a checkpoint after `step` batches and stops the run as a kill would: nothing more is done."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [2, 6, 8])
def test_a_resumed_run_sees_exactly_the_batches_that_were_left(tmp_path, stop, workers, accumulate):
    path = tmp_path / "stopped.ckpt"
    settings = {"max_steps": 10 // accumulate, "accumulate_grad_batches": accumulate, "num_sanity_val_steps": 0}
    first = Recorder()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, **settings, callbacks=[StopAt(stop, path)]).fit(
            first, datamodule=make(max_steps=10 // accumulate)
        )
    assert first.trained == expected()[:stop]

    second = Recorder()
    run = trainer(tmp_path, **settings)
    run.fit(second, datamodule=make(max_steps=10 // accumulate, num_workers=workers), ckpt_path=path)
    assert first.trained + second.trained == expected()
    assert run.global_step == 10 // accumulate and second.epoch_ends == 1
    assert len(second.validated) == 5 * (1 + (stop < 5))


def test_a_finished_run_can_be_trained_longer(tmp_path):
    first, second = Recorder(), Recorder()
    run = trainer(tmp_path)
    run.fit(first, datamodule=make())
    run.save_checkpoint(tmp_path / "done.ckpt")
    trainer(tmp_path, max_steps=15).fit(second, datamodule=make(max_steps=15), ckpt_path=tmp_path / "done.ckpt")
    assert first.trained + second.trained == expected(15)


def test_the_global_random_state_is_left_alone(tmp_path):
    module = make()
    state = torch.get_rng_state()
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_splits_that_are_not_there(tmp_path):
    model = Recorder()
    module = make(val=None, test=None)
    trainer(tmp_path, val_check_interval=None).fit(model, datamodule=module)
    assert model.trained == expected() and model.validated == []
    with pytest.raises(UserError, match="no training split"):
        make(train=None).train_dataloader()


def test_test_and_eval_batches(tmp_path):
    model = Recorder()
    trainer(tmp_path).test(model, datamodule=make(eval_batch_size=2), verbose=False)
    assert model.tested == [[0, 1], [2]]


class TwoProcesses:
    """What the module reads of a Trainer that runs on two processes."""

    world_size, accumulate_grad_batches, global_step = 2, 1, 4

    def __init__(self, rank):
        self.global_rank = rank


def test_processes_share_the_samples():
    train, val = [], []
    for rank in range(2):
        module = make()
        module.trainer = TwoProcesses(rank)
        train.append(list(module.train_dataloader()))
        val += [index for batch in module.val_dataloader() for index in batch]
    assert [a + b for a, b in zip(*train, strict=True)] == expected()[4:]
    assert sorted(val) == list(range(5))


@pytest.mark.parametrize("options", [{"eval_batch_size": 0}, {"num_workers": -1}])
def test_refusals(options):
    with pytest.raises(UserError, match=r"data\."):
        make(**options)
