from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from dense_heads.build.support import chosen_support
from dense_heads.data.part import Part


def dataset(shown):
    """Images of which it is known what they show, or None."""
    samples = [SimpleNamespace(image_id=f"image{index}") for index in range(len(shown or range(8)))]
    whole = SimpleNamespace(samples=samples, **({} if shown is None else {"shown": lambda: shown}))
    return Part(whole, range(len(samples)))


def drawn(data, num, seed):
    return chosen_support(OmegaConf.create({"support": num, "seed": seed}), data, [])


@pytest.mark.parametrize("seed", range(5))
def test_few_images_show_all_classes_where_they_can(seed):
    shown = [{1}, {1}, set(), {2}, {1}, {1, 2}, {1}, {1}]
    assert drawn(dataset(shown), 1, seed) == [5]
    three = drawn(dataset(shown), 3, seed)
    assert 5 in three and 2 not in three and len(set(three)) == 3
    apart = [{1}, {1}, set(), {2}, {1}, {3}, {1}, {1}]
    assert {3, 5} < set(drawn(dataset(apart), 3, seed)) and 2 not in drawn(dataset(apart), 7, seed)


@pytest.mark.parametrize("seed", range(5))
def test_every_class_is_shown_first_and_then_twice(seed):
    """Twice, so that one image can tell what was learnt from another; a class of one image is no obstacle."""
    shown = [{1}, {1}, {2}, {1}, {3}, {1}, {2}, {1}, {1}]
    assert {4} < set(drawn(dataset(shown), 3, seed)) and {2, 6} & set(drawn(dataset(shown), 3, seed))
    five = drawn(dataset(shown), 5, seed)
    assert {2, 4, 6} < set(five) and len(set(five)) == 5
    assert len(drawn(dataset(shown), 9, seed)) == 9


def test_draws_are_of_the_seed_and_differ():
    for shown in (None, [{1}] * 8):
        draws = [tuple(drawn(dataset(shown), 3, seed)) for seed in range(6)]
        assert draws == [tuple(drawn(dataset(shown), 3, seed)) for seed in range(6)]
        assert len(set(draws)) > 2
