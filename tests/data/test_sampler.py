from collections import Counter

import pytest

from dense_heads.data.sampler import EvalSampler, StepBatchSampler
from dense_heads.errors import UserError


def flat(sampler):
    return [key for batch in sampler for key in batch]


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (3, 16), (7, 7), (1, 2)])
def test_every_epoch_holds_every_index_once(n, batch):
    keys = flat(StepBatchSampler(n, batch, seed=1, max_steps=21))
    assert len(keys) == 21 * batch
    epochs = Counter(epoch for epoch, _ in keys)
    assert list(epochs) == sorted(epochs)
    for epoch in list(epochs)[:-1]:
        assert sorted(index for e, index in keys if e == epoch) == list(range(n))
    last = [index for e, index in keys if e == max(epochs)]
    assert len(set(last)) == len(last)


def test_orders_differ_by_epoch_and_seed_and_repeat():
    keys = flat(StepBatchSampler(50, 50, seed=0, max_steps=2))
    first, second = [i for e, i in keys if e == 0], [i for e, i in keys if e == 1]
    assert first != second and first != list(range(50))
    assert flat(StepBatchSampler(50, 50, seed=0, max_steps=2)) == keys
    assert flat(StepBatchSampler(50, 50, seed=1, max_steps=2)) != keys


@pytest.mark.parametrize("start", [0, 1, 5, 12])
def test_starting_late_gives_what_the_whole_would_have_given(start):
    whole = list(StepBatchSampler(7, 4, seed=3, max_steps=12))
    late = StepBatchSampler(7, 4, seed=3, max_steps=12, start_step=start)
    assert list(late) == whole[start:] and len(late) == 12 - start
    assert list(late) == whole[start:]  # also when iterated again
    longer = list(StepBatchSampler(7, 4, seed=3, max_steps=20))
    assert longer[:12] == whole  # training longer does not change what came before


def test_a_start_past_the_end_is_empty():
    sampler = StepBatchSampler(7, 4, seed=3, max_steps=3, start_step=9)
    assert len(sampler) == 0 and list(sampler) == []


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_each_batch(world):
    whole = list(StepBatchSampler(9, 8, seed=5, max_steps=6))
    shares = [list(StepBatchSampler(9, 8, seed=5, max_steps=6, rank=r, world_size=world)) for r in range(world)]
    for step, batch in enumerate(whole):
        assert [key for share in shares for key in share[step]] == batch
        assert {len(share[step]) for share in shares} == {8 // world}


def test_refusals():
    with pytest.raises(UserError, match=r"data\.batch_size is 16.*3 processes.*Set data\.batch_size=15"):
        StepBatchSampler(9, 16, seed=0, max_steps=1, world_size=3)
    with pytest.raises(UserError, match=r"Set data\.batch_size=4"):
        StepBatchSampler(9, 1, seed=0, max_steps=1, world_size=4)
    with pytest.raises(UserError, match="batch_size is 0"):
        StepBatchSampler(9, 0, seed=0, max_steps=1)
    with pytest.raises(UserError, match="0 training samples"):
        StepBatchSampler(0, 4, seed=0, max_steps=1)


@pytest.mark.parametrize(("n", "world"), [(7, 2), (1, 3), (0, 2), (6, 3)])
def test_eval_sees_every_index_once(n, world):
    samplers = [EvalSampler(n, rank, world) for rank in range(world)]
    seen = [index for sampler in samplers for index in sampler]
    assert sorted(seen) == list(range(n)) and sum(len(s) for s in samplers) == n
    assert list(samplers[0]) == list(range(0, n, world))
