"""Composition: every option of every group composes, and every key is an argument of what it configures."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from dense_heads.backbones.zoo import get_spec, resolve_blocks
from dense_heads.build.backbone_training import BACKBONE_FAMILIES, recipe
from dense_heads.build.heads import HOW_IT_RUNS
from dense_heads.command import GROUPS, options
from dense_heads.data.labels import LabelRule
from dense_heads.data.transforms import EvalTransform
from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.models.inference import Inference
from dense_heads.paths import CONF_DIR, TASKS_DIR
from dense_heads.ray_launcher import register_launcher
from dense_heads.registry import register_tasks
from dense_heads.training.backbone import Collapse
from dense_heads.training.distillation import FeatureObjective
from dense_heads.training.pretraining import Objective
from tests.factories import composed

REPO = Path(__file__).resolve().parents[1]
OPTIONS = [(group, option) for group in GROUPS for option in options(group)]
TASKS = sorted(path.parent.name for path in TASKS_DIR.glob("*/task.yaml"))
# What build adds to a node that is `_partial_`, by the end of its address in the config.
COMPLETED = {
    "head": (([192], 3), {}),
    "optim.optimizer": (([torch.zeros(1)],), {}),
    "task.data.format": ((), {"root": "data", "hint": ""}),
    "callbacks.checkpoints": ((), {"folder": "run"}),
    "callbacks.pictures": ((), {"folder": "run", "panel": print, "label_key": "mask"}),
    "logger.tensorboard": ((), {"save_dir": "run"}),
    "logger.wandb": ((), {"folder": Path("run"), "config": {}}),
    "sweep.sampler": ((), {"seed": 0}),
}


def family_of(task):
    """A benchmark's file starts with its family."""
    return OmegaConf.load(TASKS_DIR / task / "task.yaml").defaults[0]


def with_option(group, option):
    needed = (
        ["task.num_classes=3", "data.root=data"] if group == "task" and option in ("segmentation", "medical") else []
    )
    if (group, option) in (("head", "none"), ("optim", "backbone")):  # of families that train a whole backbone
        needed = ["task=pretraining"]
    return composed(f"{group}={option}", *needed)


def targets(node, address=""):
    """(address, node) of everything that names a `_target_`."""
    if OmegaConf.is_dict(node):
        if "_target_" in node:
            yield address, node
        for key in node:
            yield from targets(node[key], f"{address}.{key}".strip("."))
    elif OmegaConf.is_list(node):
        for index, item in enumerate(node):
            yield from targets(item, f"{address}.{index}")


def arguments(node):
    plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    return {key: value for key, value in plain.items() if key not in ("_target_", "_partial_", "_convert_")}


def test_every_folder_of_conf_is_a_known_group():
    folders = {path.name for path in CONF_DIR.iterdir() if path.is_dir()} - {"hydra"}  # Hydra's own group of launchers
    assert folders == set(GROUPS)
    assert all(options(group) for group in GROUPS)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_key_is_an_argument_of_its_target(group, option):
    cfg = with_option(group, option)
    OmegaConf.to_container(cfg, throw_on_missing=True)
    found = dict(targets(cfg))
    wanted = {"backbone", "trainer", "optim.optimizer"}
    if cfg.task.family not in BACKBONE_FAMILIES:
        wanted |= {"optim.schedule", "task.loss", "task.data.format"}
    assert wanted <= set(found)
    for address, node in found.items():
        signature = inspect.signature(get_object(node["_target_"]))
        keywords = arguments(node)
        if address == "head":
            for key in (
                "weights",
                "range",
            ):  # taken out before: which weights to load is no matter of the constructor's
                keywords.pop(key, None)
        if address in ("backbone", "teacher"):
            for key in HOW_IT_RUNS:
                keywords.pop(key)
        known = signature.parameters
        assert keywords.keys() <= known.keys(), f"{address}: {keywords.keys() - known.keys()}"
        assert bool(node.get("_partial_")) == (address in COMPLETED), address
        positional, more = COMPLETED.get(address, ((), {}))
        signature.bind(*positional, **keywords, **more)
    if cfg.task.family == "segmentation":
        inspect.signature(EvalTransform).bind(**arguments(cfg.task.transforms.eval))
        inspect.signature(Inference).bind(**arguments(cfg.task.inference))
        inspect.signature(LabelRule).bind(cfg.task.num_classes, **arguments(cfg.task.data.labels))


@pytest.mark.parametrize("option", [o for o in options("head") if o not in ("grid", "knn", "none")])
def test_heads_are_made(option):
    node = with_option("head", option).head
    make = instantiate(OmegaConf.masked_copy(node, [key for key in node if key not in ("weights", "range")]))
    in_channels = [192] * len(resolve_blocks("vitn14_reg", node.blocks))
    try:
        head = make(in_channels, 3)  # classes
    except UserError:
        head = make(in_channels, 1)  # one depth for each pixel
    assert isinstance(head, Head) and head.blocks == node.blocks and head.norm == node.norm


@pytest.mark.parametrize(
    ("option", "task"), [("grid", "nuclei"), ("grid", "classification"), ("knn", "classification")]
)
def test_a_grid_holds_options_of_its_own_group(option, task):
    grid = composed(f"task={task}", f"head={option}").head
    assert set(grid.heads) <= set(options("head")) - {"grid", "knn"}
    varied = grid.k if option == "knn" else grid.lr
    assert len(set(varied)) == len(varied) > 1


def test_the_published_grid_of_linear_classifiers():
    grid = composed("task=classification", "head=grid").head
    assert len(grid.heads) * len(grid.blocks) * len(grid.lr) == 52 and list(grid.blocks) == ["last", "last4"]


def test_a_teacher_is_written_as_a_backbone():
    cfg = composed("task=distillation", "backbone=vits14_reg", "teacher=vitg14_reg", "teacher.weights=null")
    assert (cfg.teacher.name, cfg.teacher.weights, cfg.teacher.precision) == ("vitg14_reg", None, "streamed")
    assert set(cfg.teacher) == set(cfg.backbone) and options("teacher") == options("backbone")
    assert FeatureObjective(**cfg.task.features).blocks == "last"
    assert "teacher" not in composed()


@pytest.mark.parametrize(
    "run", ["task=pretraining", "task=distillation", "experiment=inhouse_vitn14_reg", "experiment=distill_vitp14_reg"]
)
def test_recipes_that_train_a_backbone_are_made(run):
    cfg = composed(run)
    assert recipe(cfg).schedules["lr"](cfg.trainer.max_steps) == pytest.approx(cfg.optim.min_lr)
    for made, node in ((Objective, cfg.task.objective), (Collapse, cfg.task.collapse)):
        assert made(**OmegaConf.to_container(node)) is not None


@pytest.mark.parametrize("option", [o for o in options("optim") if o != "backbone"])
def test_optimisers_are_made(option):
    cfg = with_option("optim", option)
    optimizer = instantiate(cfg.optim.optimizer)([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim.lr)
    assert optimizer.param_groups[0]["lr"] == cfg.task.protocol.lr
    assert 0 <= instantiate(cfg.optim.schedule)(0) <= 1


@pytest.mark.parametrize("option", options("trainer"))
def test_trainers_are_made(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = with_option("trainer", option)
    trainer = instantiate(cfg.trainer, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert trainer.max_steps == cfg.task.protocol.max_steps


@pytest.mark.parametrize("kind", ["sampler", "pruner"])
def test_samplers_and_pruners_are_made(kind):
    for option in options(f"sweep/{kind}"):
        node = composed("sweep=lr", f"sweep/{kind}={option}").sweep[kind]
        signature = inspect.signature(get_object(node["_target_"]))
        assert arguments(node).keys() <= signature.parameters.keys(), option
        base = get_object({"sampler": "optuna.samplers.BaseSampler", "pruner": "optuna.pruners.BasePruner"}[kind])
        made = instantiate(node)
        assert isinstance(made(seed=0) if kind == "sampler" else made, base), option


def test_launchers_name_what_hydra_has():
    """Each option chooses a launcher whose every key is an argument of its class, and turns multirun on."""
    from hydra import compose, initialize_config_dir
    from hydra.core.plugins import Plugins

    register_launcher()
    classes = Plugins.instance().class_name_to_class
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for option in options("launcher"):
            node = compose("config", [f"launcher={option}"], return_hydra_config=True).hydra
            assert str(node.mode) == "RunMode.MULTIRUN"
            known = inspect.signature(classes[node.launcher._target_]).parameters
            keys = {str(key) for key in node.launcher} - {"_target_"}
            assert keys <= known.keys() or any(one.kind == one.VAR_KEYWORD for one in known.values()), option


@pytest.mark.parametrize("option", options("callbacks"))
def test_callbacks_are_made(option, tmp_path):
    import lightning.pytorch as pl

    for name, node in with_option("callbacks", option).callbacks.items():
        made = instantiate(node)
        _, more = COMPLETED.get(f"callbacks.{name}", ((), {}))
        more = {**more, "folder": tmp_path} if "folder" in more else more
        assert isinstance(made(**more) if node.get("_partial_") else made, pl.Callback)


def test_the_tensorboard_logger_is_made(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    made = instantiate(with_option("logger", "tensorboard").logger.tensorboard)(save_dir=str(tmp_path))
    assert isinstance(made, TensorBoardLogger) and Path(made.log_dir).is_relative_to(tmp_path)


@pytest.mark.parametrize("option", options("backbone"))
def test_a_backbones_option_bears_its_name(option):
    node = with_option("backbone", option).backbone
    assert node.name == option == get_spec(option).name
    official = re.fullmatch(r"vit[sblg]14(_reg)?", option)
    in_house = "in-house" if option == "vitn14_reg" else None
    assert node.weights == ("official" if official else in_house)


@pytest.mark.parametrize("task", ["segmentation", *(t for t in TASKS if family_of(t) == "segmentation")])
def test_what_a_task_holds_is_made(task):
    cfg = with_option("task", task)
    steps = instantiate(cfg.task.transforms.train)
    assert list(steps)[:3] == ["scale", "crop", "flip"]
    logits = torch.zeros(1, cfg.task.num_classes, 2, 2, requires_grad=True)
    assert torch.isfinite(instantiate(cfg.task.loss)(logits, torch.zeros(1, 2, 2, dtype=torch.long)))
    EvalTransform(**arguments(cfg.task.transforms.eval))
    Inference(**arguments(cfg.task.inference))
    LabelRule(cfg.task.num_classes, **arguments(cfg.task.data.labels))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_folder_is_whole(task):
    folder = TASKS_DIR / task
    cfg = composed(f"task={task}")
    assert cfg.task.name == task and Path(cfg.task.folder) == folder
    assert cfg.task.family == family_of(task)
    assert cfg.task.version >= 1 and cfg.task.title and cfg.task.licence and cfg.task.data.how_to_get
    if "num_classes" in cfg.task:
        lines = (folder / "classes.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
        assert len(lines) == cfg.task.num_classes
        names = [line.split("\t")[0] for line in lines]
        assert all(name == name.strip() and name for name in names) and len(set(names)) == len(names)
    card = (folder / "README.md").read_text(encoding="utf-8")
    for said in ("| source |", "| licence |", "| images |", "## On disk", "## How to get it", "## Protocol"):
        assert said in card, said
    assert not list(folder.rglob("*.py"))


def test_the_default_job():
    cfg = composed()
    assert (cfg.mode, cfg.task.name, cfg.backbone.name, cfg.head.blocks) == ("fit", "nuclei", "vitn14_reg", "last4")
    assert Path(cfg.data.root).is_dir() and cfg.backbone.weights == "in-house"


def test_data_keys_default_to_the_tasks_own_and_can_be_typed():
    assert composed("task=camvid").data.image_size == composed("task=camvid").task.data.image_size == 224
    cfg = composed("task=camvid", "data.image_size=56")
    assert cfg.data.image_size == cfg.task.transforms.train.crop.size == 56


def test_debug_wins_over_an_experiment():
    cfg = composed("experiment=ade20k_vits14_linear", "debug=fast")
    assert (cfg.trainer.max_steps, cfg.data.num_workers, cfg.task.name) == (2, 0, "ade20k")


def test_the_typed_head_wins_over_the_tasks_and_the_experiments():
    assert composed("task=ade20k").head.blocks == "last"
    assert composed("task=ade20k", "head=linear4").head.blocks == "last4"
    assert composed("experiment=ade20k_vits14_linear", "backbone=vitb14").backbone.name == "vitb14"


# The registry


def task_file(folder, text):
    path = folder / "commented" / "task.yaml"  # a name of its own: Hydra's store outlives the test
    path.parent.mkdir()
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text", ["# @package _global_\nnum_classes: 3\n", "\n# My task\n#@package task\nnum_classes: 3\n"]
)
def test_a_task_with_a_package_header_is_refused(tmp_path, text):
    path = task_file(tmp_path, text)
    with pytest.raises(UserError, match="@package") as error:
        register_tasks(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["- segmentation\n- 3\n", "[]"])
def test_a_task_that_is_no_mapping_is_refused(tmp_path, text):
    path = task_file(tmp_path, text)
    with pytest.raises(UserError, match="must be a mapping") as error:
        register_tasks(tmp_path)
    assert str(path) in str(error.value)


def test_a_comment_is_no_header(tmp_path):
    path = task_file(
        tmp_path, "# mine; see @package in Hydra's manual\ndefaults: [segmentation, _self_]\nnum_classes: 9\n"
    )
    register_tasks(tmp_path)
    cfg = composed("task=commented")
    assert (cfg.task.name, cfg.task.folder, cfg.task.num_classes) == ("commented", str(path.parent), 9)


# Another working directory


def test_what_lies_in_the_working_directory_is_not_used(tmp_path):
    marker = tmp_path / "marker"
    trap = f"open({str(marker)!r}, 'w').close()\nraise SystemExit('a stranger ran')\n"
    for name in ("tasks.py", "conf.py", "registry.py"):
        (tmp_path / name).write_text(trap)
    evil = {"_target_": "os.system", "command": f"touch {marker}"}
    for group, option in (("task", "nuclei"), ("backbone", "vitn14_reg"), ("head", "linear4")):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / f"{option}.yaml").write_text(yaml.safe_dump(evil))
    (tmp_path / "conf" / "config.yaml").write_text(yaml.safe_dump({"mode": evil}))
    (tmp_path / "tasks" / "stranger").mkdir(parents=True)
    (tmp_path / "tasks" / "stranger" / "task.yaml").write_text("num_classes: 3\n")
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "dense_heads", "--cfg", "job", "--resolve"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout) == OmegaConf.to_container(composed())
    command = [sys.executable, "-m", "dense_heads", "task=stranger"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60)
    assert refused.returncode == 2 and "Unknown task 'stranger'" in refused.stderr
    assert not marker.exists()
