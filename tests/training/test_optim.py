"""Learning-rate schedules against the formula written out."""

import pytest

from dense_heads.errors import UserError
from dense_heads.training.optim import Schedule


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


def test_impossible_schedules_are_refused():
    with pytest.raises(UserError, match="poly"):
        Schedule("polly", 100)
    with pytest.raises(UserError, match="does not end"):
        Schedule("poly", 100, warmup_steps=100)
