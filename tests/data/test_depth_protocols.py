"""The composed NYU, KITTI and SUN RGB-D protocols against the facts sheet (sections 3.2 and 6.1), value by value."""

import functools
import inspect
import re

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dense_heads.data.datasets.kitti import KITTIEigen
from dense_heads.data.datasets.nyu import NYUDepth
from dense_heads.data.datasets.sun_rgbd import SUNRGBD
from dense_heads.data.depth_maps import DepthRule
from dense_heads.data.depth_transforms import (
    ColorAug,
    DepthEvalTransform,
    DepthTrainPipeline,
    FixedCrop,
    KBCrop,
    RandomRotate,
)
from dense_heads.data.transforms import RandomCrop
from dense_heads.paths import CONF_DIR, TASKS_DIR
from dense_heads.registry import register_tasks

BACKBONES = ("vits14", "vitb14", "vitl14", "vitg14")
HEADS = ("linear_depth", "linear4_depth", "dpt")
PUBLISHED = {  # facts 6.1: task -> head -> S, B, L, g
    "nyu_depth": ((0.449, 0.399, 0.384, 0.344), (0.417, 0.362, 0.333, 0.298), (0.356, 0.317, 0.293, 0.279)),
    "kitti_depth": ((3.10, 2.90, 2.78, 2.62), (2.86, 2.59, 2.50, 2.35), (2.34, 2.23, 2.14, 2.11)),
    "sun_rgbd": ((0.477, 0.448, 0.429, 0.402), (0.431, 0.400, 0.396, 0.362), (0.409, 0.377, 0.360, 0.338)),
}
ROWS = [
    (task, head, name, PUBLISHED[task][h][b])
    for task in ("nyu_depth", "kitti_depth")
    for h, head in enumerate(HEADS)
    for b, name in enumerate(BACKBONES)
]
DEPTH_TASKS = ("nyu_depth", "kitti_depth", "sun_rgbd", "nyu_scenes", "rgbd_scenes")


@functools.cache
def composed(*overrides):
    register_tasks()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", list(overrides))
    OmegaConf.resolve(cfg)
    return cfg


def train_steps(cfg):
    return DepthTrainPipeline(instantiate(cfg.task.transforms.train), list(cfg.data.image_size)).steps


@pytest.mark.parametrize(
    ("task", "border", "size", "brightness"),
    [("nyu_depth", FixedCrop, (416, 544), (0.75, 1.25)), ("kitti_depth", KBCrop, (352, 704), (0.9, 1.1))],
)
def test_train_steps_in_the_published_order(task, border, size, brightness):
    cfg = composed(f"task={task}")
    steps = train_steps(cfg)
    assert list(steps) == ["border", "rotate", "flip", "crop", "colour"]
    assert type(steps["border"]) is border
    assert isinstance(steps["rotate"], RandomRotate) and (steps["rotate"].degrees, steps["rotate"].p) == (2.5, 0.5)
    assert type(steps["flip"]).__name__ == "HorizontalFlip" and steps["flip"].p == 0.5
    assert isinstance(steps["crop"], RandomCrop) and steps["crop"].size == size and steps["crop"].cat_max_ratio >= 1
    colour = steps["colour"]
    assert isinstance(colour, ColorAug) and colour.p == 0.5
    assert (colour.gamma, colour.brightness, colour.color) == ((0.9, 1.1), brightness, (0.9, 1.1))
    assert tuple(cfg.data.image_size) == size and cfg.data.batch_size == 16


def test_borders_by_hand():
    nyu = train_steps(composed("task=nyu_depth"))["border"]
    assert nyu.window((480, 640)) == (45, 43, 472, 608)
    assert train_steps(composed("task=kitti_depth"))["border"].window((375, 1242)) == (23, 13, 375, 1229)


@pytest.mark.parametrize(("task", "max_m", "val_interval"), [("nyu_depth", 10, 800), ("kitti_depth", 80, 6400)])
def test_optimisation(task, max_m, val_interval):
    cfg = composed(f"task={task}")
    protocol = cfg.task.protocol
    assert (cfg.trainer.max_steps, protocol.warmup_steps, protocol.warmup_ratio) == (38400, 12800, 1e-3)
    assert (protocol.lr, protocol.weight_decay, protocol.clip_norm, protocol.schedule) == (1e-4, 0.01, 35, "cosine")
    assert cfg.trainer.val_check_interval == val_interval and protocol.select == "best"
    assert cfg.task.metrics == {"primary": "abs_rel", "direction": "min"}
    assert cfg.task.depth_range == {"min_m": 0.001, "max_m": max_m} and cfg.head.max_m == max_m
    assert cfg.head.min_m == 0.001
    weights = {key: value for key, value in cfg.task.loss.items() if isinstance(value, float)}
    assert {key: value for key, value in weights.items() if value} == {"sig": 1.0, "gradient": 0.5}
    factors = [instantiate(cfg.optim.schedule)(step) for step in (0, 12800, 38400)]
    assert factors == pytest.approx([1e-3, 0.75, 1e-8])  # the cosine runs on under the warmup: (1 + cos 60 deg) / 2
    momentum = instantiate(cfg.optim.momentum)
    assert [momentum(step) for step in (0, 11519, 38399)] == pytest.approx([0.95, 0.85, 0.95])  # 0.3 x 38,400
    assert cfg.optim.optimizer._target_ == "torch.optim.AdamW" and cfg.optim.optimizer.betas == [0.9, 0.999]


@pytest.mark.parametrize(("task", "crop"), [("nyu_depth", "eigen"), ("kitti_depth", "garg"), ("sun_rgbd", "eigen")])
def test_evaluation(task, crop):
    cfg = composed(f"task={task}")
    evaluation, inference = cfg.task.evaluation, cfg.task.inference
    assert (evaluation.crop, evaluation.over, evaluation.align) == (crop, "images", "none")
    assert inference.window is None and inference.flip is True
    transform = DepthEvalTransform(**cfg.task.transforms.eval)
    if task == "kitti_depth":
        assert transform.window((375, 1242)) == (23, 13, 375, 1229)
    else:
        assert transform.window((480, 640)) == (0, 0, 480, 640)
    if task == "sun_rgbd":
        assert transform.sizes((427, 561)) == [(480, 640)] and evaluation.clip_m == 8
    else:
        assert transform.sizes((480, 640)) == [(480, 640)]


@pytest.mark.parametrize(
    ("task", "reader", "rule"),
    [
        ("nyu_depth", NYUDepth, DepthRule(1000)),
        ("kitti_depth", KITTIEigen, DepthRule(256)),
        ("sun_rgbd", SUNRGBD, DepthRule(1000, 0, "sun_rgbd")),
    ],
)
def test_files(task, reader, rule):
    cfg = composed(f"task={task}")
    assert (
        instantiate(cfg.task.data.format).func is reader
        and DepthRule(cfg.data.depth_scale, **cfg.task.data.depth) == rule
    )


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_numbers(task):
    published = composed(f"task={task}").task.published
    for head, values in zip(HEADS, PUBLISHED[task], strict=True):
        assert published[head] == dict(zip(BACKBONES, values, strict=True))
    images = {"nyu_depth": {"train": 24231, "val": 654}, "kitti_depth": {"train": 23158, "val": 652}}
    assert published["images"] == images.get(task, {"test": 5050})


@pytest.mark.parametrize(("task", "head", "backbone", "value"), ROWS)
def test_each_published_row_has_its_experiment(task, head, backbone, value):
    name = f"{task}_{backbone}_{head}"
    cfg = composed(f"experiment={name}")
    assert (cfg.task.name, cfg.backbone.name) == (task, backbone)
    own = composed(f"task={task}", f"head={head}")
    assert cfg.head == own.head and cfg.task == own.task and cfg.optim == own.optim  # the task's protocol, untouched
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    assert f"experiment={name}\n" in text
    assert float(re.search(r"Published: (\S+) m RMSE", text)[1]) == value


@pytest.mark.parametrize(("head", "backbone"), [(h, b) for h in range(3) for b in range(4)])
def test_each_zero_shot_row_has_its_experiment(head, backbone):
    name = f"sun_rgbd_{BACKBONES[backbone]}_{HEADS[head]}"
    cfg = composed(f"experiment={name}")
    own = composed("task=sun_rgbd", f"head={HEADS[head]}", f"backbone={BACKBONES[backbone]}", "head.weights=official")
    assert cfg.mode == "evaluate" and (cfg.task, cfg.head, cfg.backbone) == (own.task, own.head, own.backbone)
    assert (cfg.head.min_m, cfg.head.max_m, cfg.task.released, cfg.backbone.weights) == (0.001, 10, "nyu", "official")
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    assert f"experiment={name}\n" in text
    assert float(re.search(r"Published: (\S+) m RMSE", text)[1]) == PUBLISHED["sun_rgbd"][head][backbone]


@pytest.mark.parametrize("task", DEPTH_TASKS)
def test_every_key_is_an_argument_and_the_card_says_where_data_come_from(task):
    cfg = composed(f"task={task}")
    assert cfg.task.family == "depth" and set(cfg.task.transforms.eval) <= set(
        inspect.signature(DepthEvalTransform).parameters
    )
    train_steps(cfg)
    format = instantiate(cfg.task.data.format)
    inspect.signature(format.func).bind("root", **format.keywords, hint="")
    card = (TASKS_DIR / task / "README.md").read_text()
    for heading in ("## On disk", "## How to get it", "## Protocol", "## Published and ours", "## What is comparable"):
        assert heading in card
    for values in PUBLISHED.get(task, ()):
        for value in values:
            assert re.search(rf"\| {value:.3f} \|" if task != "kitti_depth" else rf"\| {value:.2f} \|", card)
