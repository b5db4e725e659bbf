"""`mode=sweep` through the command: what a study finds, keeps, and loses when it is killed (nothing)."""

import csv
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from optuna.storages.journal import JournalFileBackend
from safetensors.torch import load_file

import dense_heads
import dense_heads.backbones.weights
from dense_heads.__main__ import main
from tests.factories import make_ade20k

REPO = Path(__file__).resolve().parents[1]
# Few random trials, and few that run to their end in any case: most learn from others, and some are ended early (with
# this seed learning rates begin high, which is good for a head that has six steps).
SEARCH = ["mode=sweep", "sweep=linear", "sweep.trials=6", "seed=5", "sweep.sampler.n_startup_trials=3",
          "sweep.pruner.n_startup_trials=1", "callbacks.checkpoints.every=1"]  # fmt: skip


@pytest.fixture(autouse=True)
def _handlers():
    logging.getLogger("dense_heads").handlers.clear()
    yield
    logging.getLogger("dense_heads").handlers.clear()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The overrides of a run that takes a second, with three validations."""
    root = make_ade20k(tmp_path_factory.mktemp("ade"), train=4, val=2)
    return [
        "task=segmentation",
        "task.num_classes=3",
        f"data.root={root}",
        "+task.data.format.masks='annotations/{split}'",
        "task.data.labels.reduce_zero=true",
        "backbone=vitn14_reg",
        "debug=fast",
        "data.image_size=42",
        "data.batch_size=2",
        "trainer.accelerator=cpu",
        "trainer.max_steps=6",
        "trainer.val_check_interval=2",
    ]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A sweep that was never stopped, and how often a backbone was made for it."""
    run = tmp_path_factory.mktemp("sweeps") / "whole"
    made, load = [], dense_heads.backbones.weights.load_backbone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_heads.backbones.weights, "load_backbone", lambda **kw: made.append(kw) or load(**kw))
        assert main([*SEARCH, *tiny, f"run_dir={run}"]) == 0
    return run, len(made)


@pytest.fixture
def refused(capsys):
    """Run a command that must end with exit code 2 and one message; returns the message."""

    def run(*argv):
        capsys.readouterr()
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err and err.count("dense_heads: ") == 1, err
        return err.partition("dense_heads: ")[2]

    return run


def study_of(run):
    """What a study holds but for times."""
    rows = json.loads((run / "sweep.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def equal_heads(run, other):
    equal_weights(run, other, "head.safetensors")


def equal_weights(run, other, name, expected=True):
    ours, theirs = load_file(run / name), load_file(other / name)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours) == expected


def same(run, other):
    """Whether two sweeps found the same, to the last bit."""
    assert study_of(run) == study_of(other)
    equal_heads(run, other)
    for name in ("metrics.csv", "overrides.yaml"):
        keep = [line for line in (run / name).read_text().splitlines() if "sweep.trials" not in line]
        assert keep == [line for line in (other / name).read_text().splitlines() if "sweep.trials" not in line], name
    metrics = [json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (run, other)]
    assert metrics[0] == metrics[1]


# What it finds


def test_the_best_trial_is_the_sweeps_own_model(whole):
    run, _ = whole
    rows = list(csv.DictReader((run / "trials.csv").open()))
    assert [int(row["trial"]) for row in rows] == list(range(6))
    assert {row["state"] for row in rows} == {"complete", "pruned"}
    assert all(int(row["steps"]) == 6 if row["state"] == "complete" else int(row["steps"]) < 6 for row in rows)
    best = max((row for row in rows if row["state"] == "complete"), key=lambda row: float(row["val/miou"]))
    own = run / "trials" / f"{int(best['trial']):04d}"
    equal_heads(run, own)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["metrics"]["val/miou"] == pytest.approx(float(best["val/miou"]), abs=1e-12)
    assert "best of 6 trials" in metrics["selected_on"] and "optimistic" in metrics["selected_on"]
    assert metrics["head"]["name"] == best["head"]
    assert list((run / "pictures" / "val").glob("*.png"))
    page = (run / "report.html").read_text()
    assert "Trials in their order" in page and "<script" not in page and "optim.weight_decay" in page


def test_it_is_measured_and_used_like_any_run(whole, tiny, tmp_path):
    run, _ = whole
    assert main(["mode=evaluate", f"model={run}"]) == 0
    again = json.loads(next(run.glob("evaluate/*/metrics.json")).read_text())
    assert again["metrics"] == json.loads((run / "metrics.json").read_text())["metrics"]
    images = Path(next(item for item in tiny if item.startswith("data.root=")).partition("=")[2]) / "images/validation"
    assert main(["mode=predict", f"model={run}", f"input={images}", f"output={tmp_path / 'out'}"]) == 0
    assert len(list((tmp_path / "out" / "labels").glob("*.png"))) == 2
    assert dense_heads.load_model(run).predict(next(images.iterdir())).shape == (48, 64)


def test_a_trial_is_the_run_that_its_overrides_describe(whole, tmp_path):
    run, _ = whole
    number = next(row["number"] for row in study_of(run) if row["state"] == "complete")
    trial = run / "trials" / f"{number:04d}"
    typed = yaml.safe_load((trial / "overrides.yaml").read_text())
    assert not [item for item in typed if "sweep" in item or "run_dir" in item]
    assert main([*typed, f"run_dir={tmp_path / 'alone'}"]) == 0
    equal_heads(trial, tmp_path / "alone")
    assert (trial / "metrics.csv").read_text() == (tmp_path / "alone" / "metrics.csv").read_text()
    assert not (trial / "checkpoints").exists()  # a finished trial keeps its head alone


def test_one_backbone_serves_all_trials(whole):
    assert whole[1] == 1


def test_another_backbone_is_made_where_it_changes(tiny, tmp_path, monkeypatch):
    made, load = [], dense_heads.backbones.weights.load_backbone
    monkeypatch.setattr(dense_heads.backbones.weights, "load_backbone", lambda **kw: made.append(kw) or load(**kw))
    space = "sweep.space={backbone.seed: [0, 1]}"
    typed = ["mode=sweep", "sweep=own", space, "sweep/sampler=grid", "sweep.trials=null", *tiny]
    assert main([*typed, "trainer.max_steps=2", f"run_dir={tmp_path / 'run'}"]) == 0
    assert {kw["seed"] for kw in made} == {0, 1} and 2 <= len(made) <= 4
    assert {row["params"]["backbone.seed"] for row in study_of(tmp_path / "run")} == {0, 1}


def test_each_trial_trains_a_backbone_of_its_own(tiny, tmp_path):
    """From the same start, as the run that its overrides describe; the best one's is the sweep's."""
    run = tmp_path / "run"
    space = "sweep.space={optim.backbone_lr: [1e-4, 1e-2]}"
    typed = ["mode=sweep", "sweep=own", space, "sweep/sampler=grid", "sweep.trials=null", "backbone.trainable=true"]
    assert main([*typed, *tiny, "backbone.weights=null", "trainer.max_steps=2", f"run_dir={run}"]) == 0
    best = max(study_of(run), key=lambda row: row["value"])["number"]
    for number in (0, 1):
        trial, alone = run / "trials" / f"{number:04d}", tmp_path / str(number)
        assert main([*yaml.safe_load((trial / "overrides.yaml").read_text()), f"run_dir={alone}"]) == 0
        equal_weights(trial, alone, "backbone.safetensors")
        equal_weights(trial, run, "backbone.safetensors", number == best)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["backbone"]["trained"] and metrics["metrics"]["val/miou"] == study_of(run)[best]["value"]
    assert main(["mode=evaluate", f"model={run}"]) == 0
    again = json.loads(next(run.glob("evaluate/*/metrics.json")).read_text())
    assert again["metrics"] == pytest.approx(metrics["metrics"], abs=1e-6)


def test_a_test_split_is_measured_once_and_of_the_best_trial_only(tmp_path):
    for split, first in (("train", 0), ("val", 100), ("test", 200)):
        from tests.factories import make_pairs

        make_pairs(tmp_path / "data" / "images" / split, tmp_path / "data" / "masks" / split, 3, first)
    run = tmp_path / "run"
    typed = ["task=segmentation", "task.num_classes=3", f"data.root={tmp_path / 'data'}", "backbone=vitn14_reg",
             "debug=fast", "data.image_size=42", "data.batch_size=2", "trainer.accelerator=cpu"]  # fmt: skip
    assert main(["mode=sweep", "sweep=lr", "sweep.trials=2", *typed, f"run_dir={run}"]) == 0
    assert set(json.loads((run / "metrics.json").read_text())["metrics"]) >= {"test/miou"}
    for trial in (run / "trials").iterdir():
        names = json.loads((trial / "metrics.json").read_text())["metrics"]
        assert names and all(name.startswith("val/") for name in names)


# What a kill loses


class Killed(BaseException):
    """Nothing on the way catches it, as nothing catches SIGKILL."""


@pytest.mark.slow
def test_killed_at_every_write_to_the_study(tiny, tmp_path, monkeypatch):
    """A write or two further at each start; then, before a write, within it, or after it, the process is gone."""
    space = "sweep.space={optim.lr: {low: 1e-4, high: 1e-1, log: true}}"
    typed = ["mode=sweep", "sweep=own", space, "sweep.trials=2", "sweep.sampler.n_startup_trials=1",
             "sweep.pruner.n_startup_trials=1", *tiny, "trainer.max_steps=2", "trainer.val_check_interval=1",
             "callbacks.checkpoints.every=1"]  # fmt: skip
    run, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*typed, f"run_dir={run}"]) == 0
    append = JournalFileBackend.append_logs
    deaths, written = 0, 0

    def dying(self, logs):
        nonlocal written
        written += 1
        if written == 1:
            return append(self, logs)
        if deaths % 3 == 1:
            line = json.dumps(logs[0]).encode()
            with open(self._file_path, "ab") as file:
                file.write(line[: len(line) // 2])
        elif deaths % 3 == 2:
            append(self, logs)
        raise Killed

    monkeypatch.setattr(JournalFileBackend, "append_logs", dying)
    while deaths < 50:
        written = 0
        try:
            assert main([*typed, f"run_dir={killed}", "resume=auto"]) == 0
            break
        except Killed:
            deaths += 1
    assert 6 < deaths < 50
    same(run, killed)


def start(arguments):
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.Popen(
        [sys.executable, "-m", "dense_heads", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def test_killed_by_the_system_at_random_moments(whole, tiny, tmp_path):
    """At a random place of the first and of the second half of the study, whatever the machine's speed."""
    killed, size = tmp_path / "killed", (whole[0] / "study.log").stat().st_size
    log = killed / "study.log"
    for first, last in ((0.02, 0.4), (0.45, 0.85)):
        until = random.uniform(first, last) * size
        process = start([*SEARCH, *tiny, f"run_dir={killed}", "resume=auto"])
        while not log.exists() or log.stat().st_size < until:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was under way
    assert not (killed / "head.safetensors").exists()
    assert main([*SEARCH, *tiny, f"run_dir={killed}", "resume=auto"]) == 0
    same(whole[0], killed)


@pytest.mark.slow
def test_workers_killed_at_random_moments(tiny, tmp_path):
    """With several the order of trials is not fixed, so no two sweeps are alike; but none is lost or run twice."""
    run = tmp_path / "run"
    typed = [*SEARCH, *tiny, "sweep.trials=16", "sweep.workers=2", "trainer.max_steps=40", f"run_dir={run}"]
    rng = random.Random()
    for _ in range(4):
        process = start([*typed, "resume=auto"])
        time.sleep(rng.uniform(12, 25))
        process.send_signal(signal.SIGKILL)  # its worker is left, ends its trial and then itself
        process.communicate()
    last = start([*typed, "resume=auto"])
    output = last.communicate(timeout=600)[0]
    assert last.returncode == 0, output
    rows = study_of(run)
    assert len(rows) == 16 and {row["state"] for row in rows} <= {"complete", "pruned"}
    for row in rows:  # each is what a run with its overrides alone would have been
        curve = (run / "trials" / f"{row['number']:04d}" / "metrics.csv").read_text()
        assert len([line for line in curve.splitlines()[1:]]) == len(
            {line.split(",")[0] for line in curve.splitlines()[1:]}
        )
    complete = next(row for row in rows if row["state"] == "complete")
    trial = run / "trials" / f"{complete['number']:04d}"
    alone = yaml.safe_load((trial / "overrides.yaml").read_text())
    assert main([*alone, f"run_dir={tmp_path / 'alone'}"]) == 0
    equal_heads(trial, tmp_path / "alone")


def test_more_trials_later_are_the_trials_of_a_longer_sweep(whole, tiny, tmp_path):
    run = tmp_path / "run"
    typed = [item for item in SEARCH if not item.startswith("sweep.trials")]
    assert main([*typed, "sweep.trials=4", *tiny, f"run_dir={run}"]) == 0
    assert len(study_of(run)) == 4
    assert main(["mode=sweep", f"resume={run}", "sweep.trials=6"]) == 0
    same(whole[0], run)
    assert main(["mode=sweep", f"resume={run}"]) == 0  # nothing is left to do: it concludes once more
    same(whole[0], run)


def test_a_timeout_begins_no_trial_and_says_how_to_go_on(refused, tiny, tmp_path):
    run = tmp_path / "run"
    message = refused(*SEARCH, *tiny, "sweep.timeout=0", f"run_dir={run}")
    assert "No trial was completed (none)" in message and f"mode=sweep resume={run}" in message


# Trials that fail


def test_failed_trials_are_named_and_the_rest_goes_on(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    space = "sweep.space={optim.lr: [1e-3, 1e30], head.dropout: [0.1, 1]}"
    typed = ["mode=sweep", "sweep=own", space, "sweep/sampler=grid", "sweep.trials=null", *tiny, f"run_dir={run}"]
    assert main(typed) == 0
    rows = {(row["params"]["optim.lr"], row["params"]["head.dropout"]): row for row in study_of(run)}
    assert [row["state"] for row in rows.values()].count("failed") == 3
    assert rows[1e-3, 0.1]["state"] == "complete"
    assert "not finite" in rows[1e30, 0.1]["error"] and "head.dropout=1" in rows[1e-3, 1]["error"]
    said = capsys.readouterr()
    assert "head.dropout=1" in said.out and "Traceback" not in said.out + said.err
    log = run / "trials" / f"{rows[1e30, 0.1]['number']:04d}" / "log.txt"
    assert "Traceback" in log.read_text() and "not finite" in log.read_text()


def test_where_all_fail_it_says_so(refused, tiny, tmp_path):
    run = tmp_path / "run"
    space = "sweep.space={optim.lr: [1e30, 1e31]}"
    message = refused("mode=sweep", "sweep=own", space, "sweep.trials=2", *tiny, f"run_dir={run}")
    assert "2 failed" in message and "optim.lr=1e+30" in message and "log.txt" in message
    assert not (run / "head.safetensors").exists()
    assert [row["state"] for row in csv.DictReader((run / "trials.csv").open())] == ["failed", "failed"]


def test_a_full_disk_is_not_the_trials_fault(tiny, tmp_path, monkeypatch):
    import dense_heads.modes.trial as trial

    run, keep = tmp_path / "run", trial.keep
    typed = ["mode=sweep", "sweep=lr", "sweep.trials=2", *tiny, "trainer.max_steps=2", f"run_dir={run}"]

    def full(*_):
        raise OSError(28, "No space left on device", str(run))

    monkeypatch.setattr(trial, "keep", full)
    assert main(typed) == 2
    monkeypatch.setattr(trial, "keep", keep)
    assert main([*typed, "resume=auto"]) == 0
    assert [row["state"] for row in study_of(run)] == ["complete", "complete"]


def test_data_that_are_gone_are_not_the_trials_fault(refused, tiny, tmp_path):
    """Trials that were not run yet do not fail for it: the sweep does not go on."""
    root, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(next(item for item in tiny if item.startswith("data.root=")).partition("=")[2], root)
    typed = [item for item in tiny if not item.startswith("data.root=")]
    typed = ["mode=sweep", "sweep=lr", "sweep.trials=1", *typed, f"data.root={root}", "trainer.max_steps=2"]
    assert main([*typed, f"run_dir={run}"]) == 0
    root.rename(tmp_path / "elsewhere")
    assert str(root) in refused("mode=sweep", f"resume={run}", "sweep.trials=2")
    (tmp_path / "elsewhere").rename(root)
    assert main(["mode=sweep", f"resume={run}", "sweep.trials=2"]) == 0
    assert [row["state"] for row in study_of(run)] == ["complete", "complete"]


# What is refused before the first trial


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "sweep=OPTION"),
        (["sweep=lrr"], "Did you mean 'lr'?"),
        (["sweep=own", "sweep.space={head: [linear, linearx]}"], "Unknown head 'linearx'"),
        (["sweep=own", "sweep.space={optim.lr: [fast, 0.1]}"], "optim.lr=fast"),
        (["sweep=own", "sweep.space={head.dropout: [1.5, 0.1]}"], "head.dropout=1.5"),
        (["sweep=own", "sweep.space={task.name: [mine, yours]}"], "changes what is measured"),
        (["sweep=lr", "optim.lr=0.1"], "Leave one of them out"),
        (["sweep=lr", "sweep/sampler=grid"], "no end of values"),
        (["sweep=lr", "sweep/pruner=medium"], "Did you mean 'median'?"),
        (["sweep=lr", "sweep.trials=few"], "sweep.trials=few"),
        (["sweep=lr", "trainer.devices=2"], "sweep.workers=N"),
        (["sweep=lr", "data.root=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_show_before_the_first_trial(refused, tiny, tmp_path, typed, said):
    run = tmp_path / "run"
    assert said in refused("mode=sweep", *tiny, *typed, f"run_dir={run}")
    assert not run.exists()


def test_a_sweep_and_a_run_are_not_taken_for_each_other(refused, whole, tmp_path):
    run, _ = whole
    assert f"mode=sweep resume={run}" in refused(f"resume={run}")
    alone = run / "trials" / f"{next(r['number'] for r in study_of(run) if r['state'] == 'complete'):04d}"
    assert "holds a single run" in refused("mode=sweep", "sweep=lr", f"resume={alone}")


def test_a_resumed_sweep_is_the_sweep_that_it_was(refused, whole, tiny):
    run, _ = whole
    assert "data.batch_size" in refused("mode=sweep", f"resume={run}", "data.batch_size=3")
    assert "sweep.space" in refused("mode=sweep", f"resume={run}", "sweep.space={head: [linear]}")
    assert "holds a run already" in refused(*SEARCH, *tiny, f"run_dir={run}")


# Around it


def test_wandb_puts_the_trials_into_one_group(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "nuclei-by-lr"
    typed = ["mode=sweep", "sweep=lr", "sweep.trials=2", *tiny, "trainer.max_steps=2", "logger=wandb"]
    assert main([*typed, f"run_dir={run}"]) == 0
    files = [next((run / "trials" / f"000{i}").glob("wandb/offline-run-*/run-*.wandb")) for i in range(2)]
    assert len({file.name for file in files}) == 2
    group = f"{tmp_path.name}-{run.name}".encode()
    assert all(group in file.read_bytes() for file in files)


def test_the_study_opens_with_optunas_own_tools(whole):
    run, _ = whole
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(run / "study.log")))
    study = optuna.load_study(study_name="sweep", storage=storage)
    assert [trial.number for trial in study.trials] == list(range(6))
    assert study.best_value == max(row["value"] for row in study_of(run) if row["state"] == "complete")
