"""Schedules of learning rate and momentum against the formula written out, and against torch's own one cycle."""

import math

import pytest
import torch

from dense_heads.errors import UserError
from dense_heads.training.optim import Momentum, Schedule


def test_poly_with_warmup_follows_mmcv():
    schedule = Schedule("poly", max_steps=40_000, power=1.0, warmup_steps=1500, warmup_ratio=1e-6)
    for step in (0, 1, 700, 1499):
        expected = (1 - step / 40_000) * (1 - (1 - step / 1500) * (1 - 1e-6))
        assert schedule(step) == pytest.approx(expected, rel=1e-12)
    for step in (1500, 20_000, 39_999):
        assert schedule(step) == pytest.approx(1 - step / 40_000, rel=1e-12)
    assert schedule(40_000) == schedule(50_000) == 0


def test_cosine_and_constant():
    assert Schedule("cosine", 100)(50) == pytest.approx(0.5)
    assert Schedule("cosine", 100)(100) == pytest.approx(0)
    assert Schedule("constant", 100, warmup_steps=10, warmup_ratio=0.1)(5) == pytest.approx(0.55)


@pytest.mark.parametrize("kind", ["poly", "cosine"])
def test_the_end_is_a_share_of_the_learning_rate(kind):
    """mmcv's min_lr_ratio: the decay runs between the learning rate and the end, and warmup multiplies the result."""
    schedule = Schedule(kind, max_steps=200, warmup_steps=50, warmup_ratio=1e-3, end=0.1)
    for step in (0, 20, 49, 50, 117, 199):
        falls = 1 - step / 200 if kind == "poly" else (1 + math.cos(math.pi * step / 200)) / 2
        warm = 1 - (1 - step / 50) * (1 - 1e-3) if step < 50 else 1
        assert schedule(step) == pytest.approx((0.9 * falls + 0.1) * warm, rel=1e-12)
    assert schedule(200) == schedule(1000) == pytest.approx(0.1)
    assert Schedule("cosine", 38_400, end=1e-8)(38_400) == pytest.approx(1e-8)
    assert Schedule("constant", 10, end=0.1)(9) == 1


@pytest.mark.parametrize("max_steps", [38_400, 97, 10])
@pytest.mark.parametrize("turn", [0.3, 0.5])
def test_one_cycle_of_momentum_is_torchs(max_steps, turn):
    parameter = torch.zeros(1, requires_grad=True)
    theirs = torch.optim.AdamW([parameter], lr=1e-4, betas=(0.9, 0.999))
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        theirs, max_lr=1e-4, total_steps=max_steps, pct_start=turn, base_momentum=0.85, max_momentum=0.95
    )
    ours = Momentum("one_cycle", max_steps, high=0.95, low=0.85, turn=turn)
    theirs.step()  # so that the scheduler does not warn; there are no gradients
    values = []
    for step in range(max_steps):
        values.append(ours(step))
        assert ours(step) == pytest.approx(theirs.param_groups[0]["betas"][0], rel=1e-9), step
        if step < max_steps - 1:
            cycle.step()
    assert values[0] == values[-1] == pytest.approx(0.95)
    lowest = values.index(min(values))
    assert lowest == pytest.approx(turn * max_steps - 1, abs=1) and values[lowest] == pytest.approx(0.85, abs=0.005)


def test_momentum_goes_where_the_optimiser_keeps_it():
    parameter = torch.zeros(1, requires_grad=True)
    cycle = Momentum("one_cycle", 100)
    for optimizer in (torch.optim.AdamW([parameter]), torch.optim.SGD([parameter], lr=0.1, momentum=0.9)):
        (group,) = optimizer.param_groups
        Momentum("constant", 100).apply(group, 29)
        assert group.get("momentum", group.get("betas", (0,))[0]) == 0.9
        cycle.apply(group, 29)
        assert group.get("momentum", group.get("betas", (0,))[0]) == pytest.approx(0.85)
        assert "betas" not in group or group["betas"][1] == 0.999
    with pytest.raises(UserError, match="has no momentum"):
        cycle.apply(torch.optim.Adagrad([parameter]).param_groups[0], 0)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4])
def test_a_run_of_a_few_steps_has_a_momentum_too(max_steps):
    assert all(0.85 <= Momentum("one_cycle", max_steps)(step) <= 0.95 for step in range(max_steps))


def test_impossible_schedules_are_refused():
    with pytest.raises(UserError, match="poly"):
        Schedule("polly", 100)
    with pytest.raises(UserError, match="does not end"):
        Schedule("poly", 100, warmup_steps=100)
    with pytest.raises(UserError, match=r"end=2"):
        Schedule("cosine", 100, end=2)
    with pytest.raises(UserError, match="one_cycle"):
        Momentum("onecycle", 100)
    for wrong in ({"high": 1.0}, {"low": 0.96}, {"turn": 0.0}, {"turn": 1.0}):
        with pytest.raises(UserError, match="low <= high"):
            Momentum("one_cycle", 100, **wrong)
