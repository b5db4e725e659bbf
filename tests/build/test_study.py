"""A study in a file: suggestions that hang on the seed and on what is done, and a file that survives a kill."""

import json

import optuna
import pytest
from omegaconf import OmegaConf
from optuna.trial import Trial, TrialState

from dense_heads.build.space import read_space
from dense_heads.build.study import importances, num_trials, open_study, summary
from dense_heads.errors import UserError
from tests.factories import composed

SPACE = {
    "optim.lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "head": ["linear", "linear4"],
    "optim.weight_decay": {"low": 0.0, "high": 1.0},
}


def config(*overrides, space=SPACE):
    cfg = OmegaConf.create(OmegaConf.to_container(composed("sweep=own", *overrides)))
    cfg.sweep.space = space
    return cfg


def score(params):
    return params["optim.lr"] * 3 - params["optim.weight_decay"] + (params["head"] == "linear4")


def run(path, cfg, until):
    """Trials until there are so many, the study opened anew for each: nothing is kept in memory."""
    space = read_space(cfg)
    while len(open_study(path, cfg, space).trials) < until:
        study = open_study(path, cfg, space)
        trial = study.ask()
        space.suggest(trial)
        trial.report(score(trial.params) / 2, 1)
        if trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, score(trial.params))
    return open_study(path, cfg, space)


def run_in_one_process(path, cfg, until):
    space = read_space(cfg)
    study = open_study(path, cfg, space)
    while len(study.trials) < until:
        trial = study.ask()
        space.suggest(trial)
        trial.report(score(trial.params) / 2, 1)
        pruned = trial.should_prune()
        study.tell(trial, None if pruned else score(trial.params), TrialState.PRUNED if pruned else None)
    return study


def facts(study):
    return [(t.number, t.state, t.params, t.values, t.intermediate_values) for t in study.trials]


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_suggestions_do_not_hang_on_the_process(tmp_path, sampler):
    finite = {"optim.lr": [1e-3, 1e-2, 1e-1], "head": ["linear", "linear4"], "optim.weight_decay": [0.0, 1.0]}
    cfg = config(f"sweep/sampler={sampler}", space=finite if sampler == "grid" else SPACE)
    if sampler == "tpe":
        cfg.sweep.sampler.n_startup_trials = 3  # so that most trials learn from others
    one, many = run_in_one_process(tmp_path / "one", cfg, 12), run(tmp_path / "many", cfg, 12)
    assert facts(one) == facts(many)
    assert len({json.dumps(trial.params) for trial in one.trials}) == 12
    assert sampler == "grid" or {t.state for t in one.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    cfg.seed = 1
    assert facts(run(tmp_path / "other", cfg, 12)) != facts(one)


@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_a_trial_that_has_taken_some_values_takes_the_same_others(tmp_path, taken):
    cfg = config()
    cfg.sweep.sampler.n_startup_trials = 3
    expected = facts(run(tmp_path / "whole", cfg, 6))[5][2]
    space = read_space(cfg)
    study = run(tmp_path / "left", cfg, 5)
    trial = study.ask()
    for key in list(space.parameters)[:taken]:  # and then its process is killed
        read_space(config(space={key: SPACE[key]})).suggest(trial)
    again = open_study(tmp_path / "left", cfg, space)
    left = again.trials[5]
    assert left.state == TrialState.RUNNING and len(left.params) == taken
    resumed = Trial(again, left._trial_id)
    space.suggest(resumed)
    assert resumed.params == expected


def test_a_line_that_was_not_written_to_its_end(tmp_path):
    path = tmp_path / "study.log"
    cfg = config("sweep/sampler=random")
    whole = facts(run(path, cfg, 3))
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for length in range(last + 1, len(content)):  # cut anywhere within the last line, its end included
        path.write_bytes(content[:length])
        study = open_study(path, cfg, read_space(cfg))
        assert path.read_bytes() == content[:last]
        assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING]
    path.write_bytes(content)
    assert facts(open_study(path, cfg, read_space(cfg))) == whole


@pytest.mark.parametrize(
    "content", [b"no json\n{}\n", b"\x00\xff\n\x00\n", b'{"op_code":99}\n', b"[1]\n", b"{}\n", b"3\n"]
)
def test_a_file_that_is_no_study(tmp_path, content):
    path = tmp_path / "study.log"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a study"):
        open_study(path, config(), read_space(config()))


def test_another_space_is_refused(tmp_path):
    path = tmp_path / "study.log"
    run(path, config(), 2)
    for space in (
        {**SPACE, "head": ["linear", "dpt"]},
        {key: SPACE[key] for key in ("optim.lr", "head")},
        {**SPACE, "optim.lr": {"low": 1e-5, "high": 1e-1, "log": True}},
    ):
        with pytest.raises(UserError, match="Start a new sweep for another space"):
            open_study(path, config(space=space), read_space(config(space=space)))


def test_how_many_trials_there_will_be():
    assert num_trials(config(), read_space(config())) == 30
    finite = config("sweep/sampler=grid", space={"a": [1, 2], "b": {"low": 1, "high": 3}})
    assert num_trials(finite, read_space(finite)) == 6
    finite.sweep.trials = 4
    assert num_trials(finite, read_space(finite)) == 4
    endless = config("sweep/sampler=grid")
    with pytest.raises(UserError, match=r"optim\.lr, optim\.weight_decay"):
        num_trials(endless, read_space(endless))
    unset = config("sweep.trials=null")
    with pytest.raises(UserError, match=r"sweep\.trials"):
        num_trials(unset, read_space(unset))


@pytest.mark.parametrize(
    ("key", "node"),
    [
        ("sampler", {"_target_": "optuna.samplers.TPESampler", "_partial_": True, "nonsense": 1}),
        ("sampler", {"_target_": "builtins.dict", "_partial_": True}),
        ("pruner", {"_target_": "optuna.samplers.RandomSampler"}),
    ],
)
def test_a_sampler_or_pruner_that_is_none(tmp_path, key, node):
    cfg = config()
    cfg.sweep[key] = node
    with pytest.raises(UserError, match=f"sweep.{key}"):
        open_study(tmp_path / "study.log", cfg, read_space(cfg))


def test_what_a_study_found_in_plain_values(tmp_path):
    cfg = config()
    study = run(tmp_path / "study.log", cfg, 8)
    left = study.ask()
    read_space(cfg).suggest(left)
    failed = study.ask()
    failed.set_user_attr("error", "too fast")
    study.tell(failed, state=TrialState.FAIL)
    found = summary(study, "val/miou", total=20)
    assert (found.direction, found.total, found.logarithmic) == ("max", 20, ["optim.lr"])
    assert "TPESampler" in found.method and "MedianPruner" in found.method
    assert [row.state for row in found.rows][8:] == ["unfinished", "failed"] and found.rows[9].error == "too fast"
    best = found.best_first()[0]
    assert best.number == study.best_trial.number and best.value == study.best_value
    assert best.curve == {1: best.value / 2}


def test_importances_find_what_the_score_hangs_on(tmp_path):
    cfg = config("sweep/sampler=random", "sweep/pruner=none")
    space = read_space(cfg)
    study = open_study(tmp_path / "study.log", cfg, space)
    for _ in range(30):
        trial = study.ask()
        space.suggest(trial)
        study.tell(trial, -abs(trial.params["optim.weight_decay"] - 0.5))
        if len(study.trials) == 3:
            assert importances(study) == {}  # of three trials nothing can be said
    found = importances(study)
    assert next(iter(found)) == "optim.weight_decay" and found["optim.weight_decay"] > 0.5
    assert sum(found.values()) == pytest.approx(1)


def test_optuna_itself_agrees_on_the_best(tmp_path):
    cfg = config("sweep/pruner=none")
    cfg.task.metrics.direction = "min"
    study = run(tmp_path / "study.log", cfg, 6)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    assert summary(study, "val/rmse_m", 6).best_first()[0].number == study.best_trial.number
