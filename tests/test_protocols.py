"""The composed ADE20K and VOC2012 protocols against the facts sheet (sections 2.1, 3.1, 6.1), value by value."""

import csv
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dense_heads.__main__ import main
from dense_heads.backbones.weights import load_backbone
from dense_heads.backbones.zoo import get_spec, resolve_blocks
from dense_heads.data.labels import LabelRule
from dense_heads.data.transforms import EvalTransform, TrainPipeline
from dense_heads.models.dense import FrozenBackbone
from dense_heads.models.inference import Inference
from dense_heads.ops.batch_norm import BatchNorm2d
from dense_heads.paths import CONF_DIR, TASKS_DIR
from dense_heads.structures import IGNORE_INDEX
from dense_heads.training.base import Candidate
from dense_heads.training.segmentation import SegmentationModule
from tests.factories import composed, make_ade20k, make_voc

BACKBONES = ("vits14", "vitb14", "vitl14", "vitg14")
WIDTHS = {"vits14": 384, "vitb14": 768, "vitl14": 1024, "vitg14": 1536}
LAST_FOUR = {"vits14": 8, "vitb14": 8, "vitl14": 20, "vitg14": 36}  # the first of them
PUBLISHED = {  # facts 6.1: task -> our head -> S, B, L, g
    "ade20k": {"linear": (44.3, 47.3, 47.7, 49.0), "linear4": (47.2, 51.3, 53.1, 53.0)},
    "voc2012": {"linear": (81.1, 82.5, 82.1, 83.0), "linear4": (82.6, 84.9, 86.0, 86.2)},
    "cityscapes": {"linear": (66.6, 69.4, 70.3, 71.3), "linear4": (77.1, 80.0, 80.9, 81.0)},
}
ROWS = [(task, head, name) for task in ("ade20k", "voc2012") for head in ("linear", "linear4") for name in BACKBONES]
SETS = [(task, head) for task in ("ade20k", "voc2012") for head in ("linear", "linear4")]
NUM_CLASSES = {"ade20k": 150, "voc2012": 21}


def experiment(task, head, backbone="vits14"):
    return composed(f"experiment={task}_{backbone}_{head}")


def crop_size(head):
    return 512 if head == "linear" else 640


def make_head(cfg, backbone="vits14"):
    partial = instantiate(OmegaConf.masked_copy(cfg.head, [key for key in cfg.head if key not in ("weights", "range")]))
    return partial([WIDTHS[backbone]] * len(resolve_blocks(backbone, cfg.head.blocks)), cfg.task.num_classes)


# What does not depend on task or head


@pytest.mark.parametrize(("task", "head", "backbone"), ROWS)
def test_a_rows_experiment_is_its_protocol(task, head, backbone):
    cfg = experiment(task, head, backbone)
    assert (cfg.task.name, cfg.backbone.name, cfg.mode) == (task, backbone, "fit")
    assert cfg.backbone.weights == "official" and cfg.backbone.patch_fit == "pad" and cfg.head.weights is None
    assert cfg.optim.lr == 1e-3 and cfg.optim.weight_decay == 1e-4 and cfg.optim.clip_norm is None
    assert not any("clip" in str(key) and value is not None for key, value in cfg.trainer.items())
    assert dict(cfg.optim.schedule) == {
        "_target_": "dense_heads.training.optim.Schedule",
        "kind": "poly",
        "max_steps": 40_000,
        "power": 1.0,
        "warmup_steps": 1500,
        "warmup_ratio": 1e-6,
        "end": 0.0,
    }
    assert cfg.optim.momentum.kind == "constant"
    assert cfg.optim.optimizer._target_ == "torch.optim.AdamW" and list(cfg.optim.optimizer.betas) == [0.9, 0.999]
    assert cfg.trainer.max_steps == 40_000 and cfg.trainer.val_check_interval == 10_000
    assert cfg.trainer.precision == "32-true" and cfg.trainer.accumulate_grad_batches == 1
    assert cfg.data.batch_size == 16  # 2 images on each of 8 GPUs
    assert cfg.data.image_size == crop_size(head)
    assert cfg.task.protocol.select == "last" and cfg.task.metrics == {"primary": "miou", "direction": "max"}
    assert cfg.task.num_classes == NUM_CLASSES[task]
    assert cfg.task.comparable is True


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("task", "head"), SETS)
def test_blocks_and_channels(task, head, backbone):
    cfg = experiment(task, head, backbone)
    first, width = LAST_FOUR[backbone], WIDTHS[backbone]
    blocks = (first + 3,) if head == "linear" else tuple(range(first, first + 4))
    assert resolve_blocks(backbone, cfg.head.blocks) == blocks
    assert get_spec(backbone).embed_dim == width and cfg.head.norm is True  # the final norm is applied
    made = make_head(cfg, backbone)
    channels = width * len(blocks)
    shapes = {key: tuple(value.shape) for key, value in made.state_dict().items()}
    assert shapes == {
        "bn.weight": (channels,),
        "bn.bias": (channels,),
        "bn.running_mean": (channels,),
        "bn.running_var": (channels,),
        "bn.num_batches_tracked": (),
        "conv_seg.weight": (NUM_CLASSES[task], channels, 1, 1),
        "conv_seg.bias": (NUM_CLASSES[task],),
    }
    assert isinstance(made.bn, BatchNorm2d)  # statistics of all processes, as SyncBatchNorm's
    assert (made.bn.eps, made.bn.momentum, made.bn.affine) == (1e-5, 0.1, True)
    assert made.dropout.p == 0 and made.norm and not made.conv_seg.bias.any()
    assert made.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)


# Training data


@pytest.mark.parametrize(("task", "head"), SETS)
def test_transforms_and_their_order(task, head):
    cfg = experiment(task, head)
    size = crop_size(head)
    steps = instantiate(cfg.task.transforms.train)
    assert [type(step).__name__ for step in steps.values()] == [
        "RandomScale",
        "RandomCrop",
        "HorizontalFlip",
        "PhotoMetricDistortion",
    ]
    scale, crop, flip, photometric = steps.values()
    assert (scale.short_side, scale.ratio) == (size, (0.5, 2.0) if head == "linear" else (1.0, 3.0))
    assert scale.long_side == (2048 if (task, head) == ("voc2012", "linear") else None)
    assert (crop.size, crop.cat_max_ratio, crop.retries) == ((size, size), 0.75, 10)
    assert (scale.p, crop.p, flip.p, photometric.p) == (1.0, 1.0, 0.5, 1.0)
    assert (photometric.brightness, photometric.hue) == (32, 18)
    assert (photometric.contrast, photometric.saturation) == ((0.5, 1.5), (0.5, 1.5))


@pytest.mark.parametrize("head", ["linear", "linear4"])
def test_normalised_then_padded(head):
    """A wide image scaled below the crop: below it zeros, which are the mean colour, and ignored labels."""
    cfg = experiment("ade20k", head)
    size = crop_size(head)
    steps = instantiate(cfg.task.transforms.train)
    steps["scale"].ratio = (0.5, 0.5)
    pipeline = TrainPipeline({**steps, "photometric": None}, cfg.data.image_size)
    pipeline.set_random_seed(0)
    image = np.full((60, 200, 3), (200, 100, 50), np.uint8)
    mask = np.tile(np.arange(200) // 20, (60, 1))
    pixels, labels = pipeline(image, mask)
    assert pixels.shape == (3, size, size) and labels.shape == (size, size)
    values = (np.array([200, 100, 50]) - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    assert pixels[:, : size // 2].amax((1, 2)).numpy() == pytest.approx(values, rel=1e-4)
    assert not pixels[:, size // 2 :].any() and (labels[size // 2 :] == IGNORE_INDEX).all()
    assert (labels[: size // 2] < 10).all()


def test_labels():
    raw = np.array([[0, 1, 150, 255]])
    ade = composed("task=ade20k").task
    rule = LabelRule(ade.num_classes, **OmegaConf.to_container(ade.data.labels))
    assert rule(raw).tolist() == [[255, 0, 149, 255]]  # reduce_zero_label
    voc = composed("task=voc2012").task
    rule = LabelRule(voc.num_classes, **OmegaConf.to_container(voc.data.labels))
    assert rule(np.array([[0, 1, 20, 255]])).tolist() == [[0, 1, 20, 255]]


def test_voc_trains_on_train_and_aug(tmp_path):
    root = make_voc(tmp_path, train=3, val=2, aug=4)
    reader = instantiate(composed("task=voc2012").task.data.format)(root=root)
    assert (len(reader.samples("train")), len(reader.samples("val"))) == (7, 2)
    assert not reader.notices


# Loss


@pytest.mark.parametrize(("task", "head"), SETS)
def test_loss_is_divided_by_all_pixels(task, head):
    cfg = experiment(task, head)
    loss = instantiate(cfg.task.loss)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, cfg.task.num_classes, 4, 6, generator=generator)
    target = torch.randint(0, cfg.task.num_classes, (2, 4, 6), generator=generator)
    target[:, :3] = IGNORE_INDEX
    log_probabilities = logits.log_softmax(1)
    total = -sum(
        log_probabilities[b, target[b, y, x], y, x] for b in range(2) for y in range(4) for x in range(6) if y >= 3
    )
    assert loss(logits, target).item() == pytest.approx(total.item() / 48, rel=1e-5)  # not / 12
    assert loss.class_weights is None and not loss.region_weights and loss.label_smoothing == 0


# Optimiser and schedule


def published_lr(step):
    """mmcv's poly policy with linear warmup: 40,000 steps, power 1, 1,500 of warmup from a ratio of 1e-6."""
    lr = 1e-3 * (1 - step / 40_000)
    return lr * (1 - (1 - step / 1500) * (1 - 1e-6)) if step < 1500 else lr


def make_module(cfg):
    frozen = FrozenBackbone(load_backbone("vitn14_reg", None))
    head = instantiate(OmegaConf.masked_copy(cfg.head, [key for key in cfg.head if key not in ("weights", "range")]))(
        [192] * len(resolve_blocks("vitn14_reg", cfg.head.blocks)), cfg.task.num_classes
    )
    candidate = Candidate(
        "only",
        head,
        instantiate(cfg.task.loss),
        lr=cfg.optim.lr,
        weight_decay=cfg.optim.weight_decay,
        schedule=instantiate(cfg.optim.schedule),
        clip_norm=cfg.optim.clip_norm,
    )
    return SegmentationModule(
        frozen,
        [candidate],
        instantiate(cfg.optim.optimizer),
        primary="miou",
        direction="max",
        seed=0,
        num_classes=cfg.task.num_classes,
        inference=Inference(),
        class_names=[str(i) for i in range(cfg.task.num_classes)],
    )


def test_learning_rate_of_every_step():
    """That every row has this schedule stands above."""
    module = make_module(experiment("ade20k", "linear"))
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert type(optimizer) is torch.optim.AdamW and configured["lr_scheduler"]["interval"] == "step"
    (group,) = optimizer.param_groups
    assert tuple(group["betas"]) == (0.9, 0.999) and group["weight_decay"] == 1e-4 and group["eps"] == 1e-8
    assert not group["amsgrad"]
    assert {id(p) for p in group["params"]} == {id(p) for p in module.heads.parameters()}
    rates = {}
    optimizer.step()  # so that the scheduler does not warn; there are no gradients
    for step in range(40_000):
        if step in (0, 1, 750, 1499, 1500, 1501, 10_000, 20_000, 39_999):
            rates[step] = group["lr"]
        scheduler.step()
    for step, lr in rates.items():
        assert lr == pytest.approx(published_lr(step), rel=1e-9), step
    assert rates[0] == pytest.approx(1e-9) and rates[750] == pytest.approx(1e-3 * 0.98125 * 0.5000005)
    assert rates[1500] == pytest.approx(9.625e-4) and rates[20_000] == pytest.approx(5e-4)
    assert rates[39_999] == pytest.approx(2.5e-8)
    assert group["lr"] == 0


def test_a_real_run_follows_the_schedule(tmp_path):
    """Through the command: what the optimiser really had, from the curves."""
    logging.getLogger("dense_heads").handlers.clear()
    root, run = make_ade20k(tmp_path / "data", train=4, val=2), tmp_path / "run"
    shortened = ["trainer.max_steps=8", "trainer.val_check_interval=8", "task.protocol.warmup_steps=3"]
    tiny = ["data.image_size=28", "data.batch_size=2", "data.num_workers=0", "trainer.log_every_n_steps=1"]
    own = ["backbone=vitn14_reg", "backbone.weights=null", "trainer.accelerator=cpu", f"data.root={root}"]
    assert main(["task=ade20k", *own, *tiny, *shortened, "task.inference.stride=14", f"run_dir={run}"]) == 0
    with (run / "metrics.csv").open(newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file) if row.get("lr")]
    expected = [1e-3 * (1 - t / 8) * (1 - (1 - t / 3) * (1 - 1e-6) if t < 3 else 1) for t in range(8)]
    assert rates == pytest.approx(expected, rel=1e-5)


# Evaluation


@pytest.mark.parametrize(("task", "head"), SETS)
def test_evaluation(task, head):
    cfg = experiment(task, head)
    inference = Inference(**OmegaConf.to_container(cfg.task.inference))
    transform = EvalTransform(**OmegaConf.to_container(cfg.task.transforms.eval))
    size, stride = (512, 341) if head == "linear" else (640, 320)
    lefts = [0, stride, 1100 - size]  # the last window is shifted back inside
    assert inference.boxes((size, 1100)) == [(0, left, size, left + size) for left in lefts]
    assert transform.short_side == cfg.data.image_size == size
    assert transform.long_side == (2048 if (task, head) == ("voc2012", "linear") else None)
    if head == "linear":
        assert transform.scales == (1.0,) and inference.flip is False
    else:  # ten views
        assert transform.scales == (1.0, 1.32, 1.73, 2.28, 3.0) and inference.flip is True


@pytest.mark.parametrize(
    ("task", "head", "sizes"),
    [
        ("ade20k", "linear", [(512, 683)]),
        ("voc2012", "linear", [(512, 683)]),
        ("ade20k", "linear4", [(640, 853), (844, 1125), (1107, 1476), (1459, 1945), (1920, 2560)]),
    ],
)
def test_test_scales_of_a_photograph(task, head, sizes):
    transform = EvalTransform(**OmegaConf.to_container(experiment(task, head).task.transforms.eval))
    assert transform.sizes((480, 640)) == sizes


def test_vocs_long_side_limits_a_strip():
    voc = EvalTransform(**OmegaConf.to_container(experiment("voc2012", "linear").task.transforms.eval))
    ade = EvalTransform(**OmegaConf.to_container(experiment("ade20k", "linear").task.transforms.eval))
    assert voc.sizes((100, 800)) == [(256, 2048)] and ade.sizes((100, 800)) == [(512, 4096)]


# Published numbers


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_numbers_are_those_of_the_facts_sheet(task):
    stated = OmegaConf.load(TASKS_DIR / task / "task.yaml").published
    for head, values in PUBLISHED[task].items():
        assert dict(stated[head]) == dict(zip(BACKBONES, values, strict=True))
    assert set(stated) - {"unit", "images", "source"} == set(PUBLISHED[task]) and stated.unit == "%"


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_cards_table_says_the_same(task):
    card = (TASKS_DIR / task / "README.md").read_text(encoding="utf-8")
    for index, backbone in enumerate(BACKBONES):
        (row,) = re.findall(rf"^\| `?{backbone}`? \|.*$", card, flags=re.MULTILINE)
        numbers = [float(number) for number in re.findall(r"\d+\.\d", row)]
        assert [n for n in numbers if n in (PUBLISHED[task]["linear"][index], PUBLISHED[task]["linear4"][index])] == [
            PUBLISHED[task]["linear"][index],
            PUBLISHED[task]["linear4"][index],
        ]


@pytest.mark.parametrize(("task", "head", "backbone"), ROWS)
def test_every_published_row_has_its_experiment(task, head, backbone):
    path = CONF_DIR / "experiment" / f"{task}_{backbone}_{head}.yaml"
    header = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    value = PUBLISHED[task][head][BACKBONES.index(backbone)]
    assert re.findall(r"Published: (\d+\.\d) mIoU", header) == [f"{value:.1f}"]
    assert f"python -m dense_heads experiment={path.stem}\n" in header
    assert re.search(r"Hardware and time", header)
    cfg = experiment(task, head, backbone)
    assert cfg.task.published[head][backbone] == value


def test_no_experiment_of_these_tasks_is_without_a_published_row():
    stems = {path.stem for task in NUM_CLASSES for path in Path(CONF_DIR, "experiment").glob(f"{task}_*.yaml")}
    assert stems == {f"{task}_{backbone}_{head}" for task, head, backbone in ROWS}


def test_image_counts_of_the_published_sets():
    assert composed("task=ade20k").task.published.images == {"train": 20_210, "val": 2_000}
    assert composed("task=voc2012").task.published.images == {"train": 10_582, "val": 1_449}
    assert composed("task=cityscapes").task.published.images == {"train": 2_975, "val": 500}


def test_cityscapes_takes_ade20ks_recipe_and_is_not_comparable():
    ade, city = composed("task=ade20k").task, composed("task=cityscapes").task
    assert city.protocol == ade.protocol and city.transforms == ade.transforms and city.inference == ade.inference
    assert city.comparable is False and city.num_classes == 19
