"""From a composed config to objects: backbone, candidates, data, module, trainer.

The only place where configs meet constructors; constructors take plain values.
"""

import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

from dense_heads.backbones.download import fetch
from dense_heads.backbones.zoo import resolve_blocks
from dense_heads.data.checks import check_segmentation
from dense_heads.data.classes import Classes, read_classes
from dense_heads.data.datamodule import DataModule
from dense_heads.data.labels import LabelRule
from dense_heads.data.segmentation import SegmentationDataset, collate_eval, collate_train
from dense_heads.data.transforms import EvalTransform, TrainPipeline
from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.base import Head
from dense_heads.heads.official import load_head_weights, official_head_url
from dense_heads.metrics.segmentation import CONVENTIONS
from dense_heads.models.artefact import Card, head_target, read_card
from dense_heads.models.dense import FrozenBackbone
from dense_heads.models.inference import Inference
from dense_heads.ops.seeding import forked_rng, stable_seed
from dense_heads.training.base import Candidate, DenseModule
from dense_heads.training.checkpoints import AtomicCheckpointIO
from dense_heads.training.loggers import MetricsCsv
from dense_heads.training.segmentation import SegmentationModule

log = logging.getLogger("dense_heads")

BACKBONE_TITLES = {"pixels": "raw pixels"}
SPLIT_FILE = "split.json"


@dataclass
class Parts:
    """What a run is made of, before the trainer."""

    module: DenseModule
    data: DataModule
    classes: Classes
    labels: LabelRule
    conventions: str
    notes: list[str]  # said in the report
    made_split: dict[str, list[str]] | None  # drawn because the data had none; kept with the run


def parts(cfg: DictConfig, check: bool = True, heads: Sequence[Head] | None = None) -> Parts:
    """Everything but the trainer; finds a user's mistakes cheaply, the cheapest first.

    `heads`: trained heads to measure, in place of those that the config describes. Resolves `trainer.max_steps` and
    `trainer.val_check_interval` in `cfg` where they follow from the data.
    """
    if cfg.task.family != "segmentation":
        raise UserError(f"task.family={cfg.task.family} is planned, but not there yet. There is: segmentation.")
    classes = _classes(cfg)
    reader = _reader(cfg)
    needed = ("train", "val") if cfg.mode == "fit" else ("val",)
    samples = {s: reader.samples(s) if s in (*needed, *reader.available()) else [] for s in ("train", "val", "test")}
    labels = _labels(cfg, classes)
    if check:
        check_segmentation(samples, labels)
    _resolve_length(cfg, len(samples["train"]))
    train = None
    if samples["train"]:
        steps = instantiate(cfg.task.transforms.train)
        train = SegmentationDataset(samples["train"], labels, TrainPipeline(steps, cfg.data.image_size), seed=cfg.seed)
    transform = EvalTransform(**plain(cfg.task.transforms.eval))
    labelled_test = bool(samples["test"]) and all(sample.mask is not None for sample in samples["test"])
    data = DataModule(
        train=train,
        val=SegmentationDataset(samples["val"], labels, transform, seed=cfg.seed) if samples["val"] else None,
        test=SegmentationDataset(samples["test"], labels, transform, seed=cfg.seed) if labelled_test else None,
        batch_size=cfg.data.batch_size,
        num_workers=cfg.data.num_workers,
        seed=cfg.seed,
        collate_train=collate_train,
        collate_eval=collate_eval,
        max_steps=cfg.trainer.max_steps,
    )
    frozen = backbone(cfg)
    own_heads = candidates(cfg, frozen) if heads is None else [_measured(cfg, head) for head in heads]
    module = SegmentationModule(
        frozen,
        own_heads,
        instantiate(cfg.optim.optimizer),
        primary=cfg.task.metrics.primary,
        direction=cfg.task.metrics.direction,
        seed=cfg.seed,
        num_classes=cfg.task.num_classes,
        inference=Inference(**plain(cfg.task.inference)),
        class_names=classes.names,
    )
    notes = [*reader.notices, *labels.notices]
    if is_random(cfg.backbone):
        notes.append("The backbone's weights are random: it has learnt nothing.")
    return Parts(module, data, classes, labels, CONVENTIONS, notes, getattr(reader, "made_split", None))


def _reader(cfg: DictConfig) -> Any:
    """The reader of the task's on-disk format; a split that a run drew for itself is drawn no second time."""
    if cfg.data.root is None:
        raise UserError(f"data.root is not set, and task={cfg.task.name} knows no place. Set data.root=FOLDER.")
    arguments: dict[str, Any] = {"root": cfg.data.root, "hint": cfg.task.data.how_to_get}
    kept = Path(_own_run(cfg) or "", SPLIT_FILE)
    if _own_run(cfg) and kept.is_file():
        arguments["split"] = json.loads(kept.read_text(encoding="utf-8"))
    return instantiate(cfg.task.data.format, _partial_=True)(**arguments)


def _own_run(cfg: DictConfig) -> str | None:
    """The run that this command goes on with or measures, if it is of the same task."""
    run: str | None = cfg.model or (cfg.resume if cfg.resume != "auto" else cfg.run_dir)
    if cfg.model and read_card(Path(cfg.model)).task != cfg.task.name:
        return None
    return run


def _labels(cfg: DictConfig, classes: Classes) -> LabelRule:
    """How masks are read; what a run decided from its training masks holds when it is measured."""
    run = _own_run(cfg)
    if cfg.model and run:
        return LabelRule(**read_card(Path(run)).labels)
    colours = classes.colours if classes.own_colours else None
    return LabelRule(cfg.task.num_classes, colours=colours, **plain(cfg.task.data.labels))


def _classes(cfg: DictConfig) -> Classes:
    """From the benchmark's folder, else from the data's own `classes.txt`, else numbered."""
    places = [Path(place, "classes.txt") for place in (cfg.task.folder, cfg.data.root) if place]
    return read_classes(next((path for path in places if path.is_file()), None), cfg.task.num_classes)


def _resolve_length(cfg: DictConfig, num_images: int) -> None:
    """Own data without a stated length: about 50 epochs, at most 10,000 steps; validated ten times."""
    if cfg.trainer.max_steps is None:
        cfg.trainer.max_steps = min(10_000, math.ceil(50 * max(num_images, 1) / cfg.data.batch_size))
        log.info("trainer.max_steps=%d: about 50 epochs, at most 10,000 steps", cfg.trainer.max_steps)
    if cfg.trainer.max_steps < 1:
        raise UserError(f"trainer.max_steps={cfg.trainer.max_steps}; expected at least 1.")
    if cfg.task.protocol.warmup_steps >= cfg.trainer.max_steps:  # a shortened run keeps the shape of its schedule
        cfg.task.protocol.warmup_steps = cfg.trainer.max_steps // 25
        log.info(
            "task.protocol.warmup_steps=%d, so that the warmup ends within the run", cfg.task.protocol.warmup_steps
        )
    interval = cfg.trainer.val_check_interval or math.ceil(cfg.trainer.max_steps / 10)
    cfg.trainer.val_check_interval = min(int(interval), cfg.trainer.max_steps)


def backbone(cfg: DictConfig) -> FrozenBackbone:
    """The frozen backbone."""
    return FrozenBackbone(instantiate(cfg.backbone), cfg.backbone.get("patch_fit", "pad"))


def is_random(backbone_cfg: DictConfig) -> bool:
    """Whether the weights are random; raw pixels have none."""
    return backbone_cfg.weights is None and backbone_cfg.name != "pixels"


def candidates(cfg: DictConfig, frozen: FrozenBackbone) -> list[Candidate]:
    """The heads to train: the composed one, or with `head=grid` every combination of its lists."""
    if "heads" in cfg.head:
        return [c for head, settings in _grid(cfg) for c in [_candidate(cfg, frozen, head, settings)]]
    return [_candidate(cfg, frozen, cfg.head, {})]


def _candidate(cfg: DictConfig, frozen: FrozenBackbone, head_cfg: DictConfig, settings: dict[str, Any]) -> Candidate:
    name = " ".join(f"{key}={value}" for key, value in settings.items()) or HydraConfig.get().runtime.choices["head"]
    weights = head_cfg.get("weights")
    partial: functools.partial[Head] = instantiate(
        OmegaConf.masked_copy(head_cfg, [str(k) for k in head_cfg if k != "weights"])
    )
    blocks = resolve_blocks(frozen.backbone.name, partial.keywords.get("blocks", "last"))
    with forked_rng(stable_seed(cfg.seed, name, "init")):  # a function of seed and name alone: the same in any grid
        head = partial([frozen.backbone.embed_dim] * len(blocks), cfg.task.num_classes)
    if weights is not None:
        _load_head(cfg, head, weights, str(settings.get("head", HydraConfig.get().runtime.choices["head"])))
    return Candidate(
        name=name,
        head=head,
        loss=instantiate(cfg.task.loss),
        lr=float(settings.get("lr", cfg.optim.lr)),
        weight_decay=float(settings.get("weight_decay", cfg.optim.weight_decay)),
        schedule=instantiate(cfg.optim.schedule),
        clip_norm=cfg.optim.clip_norm,
        settings=settings,
    )


def _grid(cfg: DictConfig) -> list[tuple[DictConfig, dict[str, Any]]]:
    """(head config, settings) of each combination; a list that is empty leaves the task's own value."""
    combinations: list[dict[str, Any]] = [{}]
    for key, name in (("heads", "head"), ("blocks", "blocks"), ("lr", "lr"), ("weight_decay", "weight_decay")):
        if values := list(cfg.head[key] or []):
            combinations = [{**before, name: value} for before in combinations for value in values]
    if len({json.dumps(c) for c in combinations}) < len(combinations):
        raise UserError("head=grid: a value stands twice in one of its lists; each combination is trained once.")
    result = []
    for settings in combinations:
        head_cfg = _option_of_grid(cfg, settings)
        result.append((head_cfg, settings))
    return result


def _option_of_grid(cfg: DictConfig, settings: Mapping[str, Any]) -> DictConfig:
    """The config of one head of a grid: its own option, with the grid's arguments on top."""
    head_cfg: DictConfig = composed([f"head={settings['head']}"]).head
    blocks = {"blocks": settings["blocks"]} if "blocks" in settings else {}
    for key, value in {**plain(cfg.head.arguments), **blocks}.items():
        if key not in head_cfg:
            raise unknown_name(f"argument of head={settings['head']}:", key, [str(known) for known in head_cfg])
        head_cfg[key] = value
    return head_cfg


def _load_head(cfg: DictConfig, head: Head, weights: str, option: str) -> None:
    dataset = cfg.task.name if weights == "official" else None
    path: str | Path = weights
    if weights == "official":
        url = official_head_url(cfg.backbone.name, cfg.task.name, option)
        path = fetch(url, url.rsplit("/", 1)[-1])
    load_head_weights(head, path, cfg.backbone.name, dataset)


def _measured(cfg: DictConfig, head: Head) -> Candidate:
    """A trained head as a candidate that is measured only."""
    return Candidate("trained", head, instantiate(cfg.task.loss), 0.0, 0.0, instantiate(cfg.optim.schedule))


def card(cfg: DictConfig, made: Parts, candidate: Candidate) -> Card:
    """What the artefact of `candidate` must say to be used again."""
    arguments = _arguments(cfg.head)
    if "heads" in cfg.head:  # a grid: the arguments are those of the winner's own option
        arguments = _arguments(_option_of_grid(cfg, candidate.settings))
    backbone_arguments = {key: value for key, value in plain(cfg.backbone).items() if key != "_target_"}
    weights = backbone_arguments.get("weights")
    if weights not in (None, "official", "in-house") and Path(str(weights)).exists():
        backbone_arguments["weights"] = str(Path(str(weights)).resolve())
    return Card(
        family=cfg.task.family,
        task=cfg.task.name,
        backbone={**backbone_arguments, "fingerprint": made.module.backbone.backbone.fingerprint()},
        head={
            "name": str(candidate.settings.get("head", HydraConfig.get().runtime.choices["head"])),
            "target": head_target(type(candidate.head)),
            "arguments": arguments,
        },
        num_outputs=cfg.task.num_classes,
        classes=list(made.classes.names),
        colours=made.classes.colours.tolist(),
        labels=made.labels.settings(),
        preprocessing={**plain(cfg.task.transforms.eval), "patch_fit": made.module.backbone.patch_fit},
        inference=plain(cfg.task.inference),
        licence={"code": "Apache-2.0", "data": cfg.task.licence},
        overrides=list(HydraConfig.get().overrides.task),
    )


def _arguments(head_cfg: DictConfig) -> dict[str, Any]:
    """The plain arguments of a head, without Hydra's keys and ours."""
    return {key: value for key, value in plain(head_cfg).items() if key not in ("_target_", "_partial_", "weights")}


def loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """`metrics.csv` first, then those that were chosen; each knows the folder, W&B the config too."""
    made: list[Logger] = [MetricsCsv(folder / "metrics.csv")]
    for name, node in (cfg.logger or {}).items():
        partial = instantiate(node)
        if name == "wandb":
            made.append(partial(folder=folder, config=OmegaConf.to_container(cfg, resolve=True)))
        else:
            made.append(partial(save_dir=str(folder)))
    return made


def trainer(cfg: DictConfig, folder: Path | None, made: Parts, run_loggers: list[Logger]) -> pl.Trainer:
    """The trainer; without a folder it leaves nothing behind (a baseline)."""
    callbacks = _callbacks(cfg, folder, made) if folder is not None else []
    options = dict(plain(cfg.trainer))
    options.pop("_target_")
    if options["strategy"] == "ddp" or (options["strategy"] == "auto" and _several_devices(options)):
        # Batch norm keeps its own statistics equal; DDP's broadcast of buffers would hang on uneven validation shares.
        options["strategy"] = DDPStrategy(broadcast_buffers=False)
    if options["strategy"] == "auto" and torch.cuda.device_count() <= 1 and options["devices"] == "auto":
        options["devices"] = 1
    return pl.Trainer(
        **options,
        logger=run_loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=folder is not None,
        enable_progress_bar=folder is not None,
        default_root_dir=str(folder) if folder else None,
    )


def _several_devices(options: Mapping[str, Any]) -> bool:
    devices = options["devices"]
    if devices == "auto":
        return options["accelerator"] != "cpu" and torch.cuda.device_count() > 1
    return (isinstance(devices, int) and devices > 1) or (isinstance(devices, list) and len(devices) > 1)


def _callbacks(cfg: DictConfig, folder: Path, made: Parts) -> list[pl.Callback]:
    completed: dict[str, dict[str, Any]] = {
        "checkpoints": {"folder": folder / "checkpoints"},
        "pictures": {"folder": folder, "class_names": made.classes.names, "palette": made.classes.colours},
    }
    made_callbacks = []
    for name, node in (cfg.callbacks or {}).items():
        if node is not None:
            callback = instantiate(node)
            made_callbacks.append(callback(**completed[name]) if name in completed else callback)
    return made_callbacks


def composed(overrides: list[str]) -> DictConfig:
    """Another composition of the same config, inside a running command."""
    return compose(config_name="config", overrides=overrides)


def recomposed(cfg: DictConfig, changes: list[str]) -> DictConfig:
    """This run's own composition with `changes` on top, and without what belongs to another backbone."""
    kept = [o for o in HydraConfig.get().overrides.task if not o.startswith(("backbone", "resume", "model"))]
    other = composed([*kept, *changes])
    other.trainer.max_steps, other.data.root = cfg.trainer.max_steps, cfg.data.root
    return other


def plain(node: Any) -> dict[str, Any]:
    """A config node as a resolved dict of plain values."""
    container = OmegaConf.to_container(node, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
