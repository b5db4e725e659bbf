"""The space of a sweep: what a person writes, what a study suggests, what is typed for a trial."""

import math

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from dense_heads.build.space import read_space
from dense_heads.command import options
from dense_heads.errors import UserError
from tests.factories import composed


def space(described):
    return read_space(OmegaConf.create({"sweep": {"space": described}}))


def parsed(overrides):
    """What Hydra reads in them: key -> value."""
    return {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(overrides)}


CHOICES = [
    None, True, 3, -1.5e-7, "linear4", "two words", "a=b", "it's", "", "null", "1e-3", "C:\\x\\", "ünï", "{x}", "a,b",
    [1.0, 0.5], ["a b", None], {"a": 1, "b": [2]}, [],
]  # fmt: skip


def test_every_kind_of_choice_arrives_as_it_was_written():
    read = space({"some.key": CHOICES})
    names = read.distributions["some.key"].choices
    assert len(names) == len(CHOICES)
    for name, value in zip(names, CHOICES, strict=True):
        assert parsed(read.overrides({"some.key": name})) == {"some.key": value}


def test_numbers_arrive_to_the_last_bit():
    read = space({"a": {"low": 1e-9, "high": 1e9, "log": True}, "b": {"low": 2, "high": 9}})
    for value in (1e-9, 0.1 + 0.2, 1 / 3, 123456789.123456789):
        assert parsed(read.overrides({"a": value, "b": 7})) == {"a": value, "b": 7}


def test_ranges_become_distributions():
    read = space(
        {
            "lr": {"low": 1e-4, "high": 1e-1, "log": True},
            "dropout": {"low": 0, "high": 0.5},
            "steps": {"low": 10, "high": 30, "step": 10},
            "share": {"low": 0.0, "high": 1.0, "step": 0.25},
            "width": {"low": 1, "high": 64, "log": True},
        }
    )
    of = optuna.distributions
    assert read.distributions == {
        "lr": of.FloatDistribution(1e-4, 1e-1, log=True),
        "dropout": of.FloatDistribution(0, 0.5),
        "steps": of.IntDistribution(10, 30, step=10),
        "share": of.FloatDistribution(0, 1, step=0.25),
        "width": of.IntDistribution(1, 64, log=True),
    }
    sizes = {key: parameter.size() for key, parameter in read.parameters.items()}
    assert sizes == {"lr": None, "dropout": None, "steps": 3, "share": 5, "width": 64}
    assert read.size() is None and space({"a": [1, 2], "b": {"low": 1, "high": 3}}).size() == 6
    assert parsed(read.parameters["lr"].probes()[:1]) == {"lr": 1e-4}
    assert len(read.parameters["lr"].probes()) == 2


def test_what_a_study_suggests_is_inside():
    read = space({"a": [[1], [2]], "b": {"low": 1, "high": 3}, "c": {"low": 0.0, "high": 1.0}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = []
    for _ in range(20):
        trial = study.ask()
        read.suggest(trial)
        seen.append(parsed(read.overrides(trial.params)))
    assert {value["b"] for value in seen} == {1, 2, 3} and {value["a"][0] for value in seen} == {1, 2}
    assert all(0 <= value["c"] <= 1 for value in seen)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (None, "sweep.space is None"),
        ({}, "sweep.space"),
        ([1], "sweep.space is"),
        ({"optim.lr": 0.1}, "a list of values, or {low: A, high: B}"),
        ({"optim.lr": []}, "a list of values"),
        ({"optim.lr": {"low": 1}}, "{low: A, high: B}"),
        ({"optim.lr": {"low": 1, "high": 2, "lag": True}}, "Did you mean"),
        ({"optim.lr": {"low": 1, "high": 2, "log": "yes"}}, "true or false"),
        ({"optim.lr": {"low": "1", "high": 2}}, "low='1'"),
        ({"optim.lr": {"low": 2, "high": 1}}, "above"),
        ({"optim.lr": {"low": 0, "high": math.inf}}, "high=inf"),
        ({"optim.lr": {"low": 0.0, "high": 1.0, "log": True}}, "low > 0"),
        ({"optim.lr": {"low": 0.1, "high": 1.0, "log": True, "step": 0.1}}, "step"),
        ({"optim.lr": [1, 1]}, "twice"),
        ({"task": ["nuclei", "camvid"]}, "cannot be swept"),
        ({"task.metrics.direction": ["max", "min"]}, "cannot be swept"),
        ({"run_dir": ["a", "b"]}, "cannot be swept"),
        ({"+hydra.job.name": ["a", "b"]}, "cannot be swept"),
        ({"sweep.trials": [1, 2]}, "cannot be swept"),
    ],
)
def test_what_makes_no_sense(described, said):
    with pytest.raises(UserError) as error:
        space(described)
    assert said in str(error.value)


@pytest.mark.parametrize("option", [option for option in options("sweep") if option != "own"])
def test_shipped_spaces_are_read(option):
    assert len(read_space(composed(f"sweep={option}")).parameters) > 1
