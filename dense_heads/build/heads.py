"""The frozen backbone and the heads that a config asks for."""

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from dense_heads.backbones.download import fetch
from dense_heads.backbones.pixels import WITHOUT_NETWORK
from dense_heads.build.config import plain, recomposed
from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.base import Head
from dense_heads.heads.classification import ClassificationHead
from dense_heads.heads.depth_range import hub_range, published_range, range_notice
from dense_heads.heads.detection import DetectionHead
from dense_heads.heads.official import load_head_weights, official_head_url
from dense_heads.models.artefact import own_backbone
from dense_heads.models.dense import FrozenBackbone
from dense_heads.models.trained import TrainedBackbone
from dense_heads.ops.precision import is_native
from dense_heads.ops.seeding import forked_rng, stable_seed
from dense_heads.training.base import Candidate

log = logging.getLogger("dense_heads")

# Of a backbone's config: not the backbone's, but of how it is run.
HOW_IT_RUNS = ("precision", "pass_size", "compile", "trainable")
TRAINABLE_FAMILIES = ("segmentation", "depth")  # whose backbone may learn with the head
_NOT_ARGUMENTS = ("_target_", "_partial_", "weights", "range", "criterion")  # of a head's config: Hydra's keys and ours
_KINDS = {  # families whose heads are of a kind of their own; those of all others predict maps
    "detection": (DetectionHead, "finds objects"),
    "classification": (ClassificationHead, "names an image's class"),
}
_OF_HEADS = ("blocks", "k")  # of a grid's lists: what becomes an argument of the heads


def backbone(cfg: DictConfig) -> FrozenBackbone:
    """The backbone: of a run that trained its own, that one; to be trained, where `backbone.trainable` asks for it."""
    learning = cfg.mode in ("fit", "sweep")
    if learning and cfg.backbone.trainable:
        return _trained_backbone(cfg)
    if not learning and cfg.model is not None and (own := own_backbone(Path(cfg.model), cfg.backbone.name)) is not None:
        cfg.backbone.weights = str(own)  # also for what is said of it
    return frozen_backbone(cfg.backbone)


def frozen_backbone(node: DictConfig) -> FrozenBackbone:
    """The frozen backbone that an option of group `backbone`, or `teacher`, describes."""
    arguments, how = _split(node)
    del how["trainable"]
    if how["precision"] == "streamed" and node.name not in WITHOUT_NETWORK and not is_native():
        arguments["streamed"] = True
    return FrozenBackbone(instantiate(arguments), arguments.get("patch_fit", "pad"), **how)


def _trained_backbone(cfg: DictConfig) -> TrainedBackbone:
    if cfg.task.family not in TRAINABLE_FAMILIES:
        raise UserError(
            f"backbone.trainable=true: of task={cfg.task.name} ({cfg.task.family}) only the head is trained. A "
            f"backbone learns with the heads of {' and '.join(TRAINABLE_FAMILIES)}; on images with task=pretraining."
        )
    for wrong, why in (
        (
            cfg.cache.kind != "off",
            f"cache={cfg.cache.kind}: features of a backbone that learns change. Use cache=off",
        ),
        ("heads" in cfg.head, "head=grid: several heads cannot train one backbone. Choose one head"),
    ):
        if wrong:
            raise UserError(f"backbone.trainable=true with {why}, or backbone.trainable=false.")
    arguments, how = _split(cfg.backbone)
    if how["precision"] in ("bfloat16", "streamed"):
        raise UserError(
            f"backbone.precision={how['precision']} with backbone.trainable=true: weights that learn are float32. Set "
            "trainer.precision=bf16-mixed to compute in bfloat16."
        )
    return TrainedBackbone(
        instantiate(arguments),
        arguments.get("patch_fit", "pad"),
        how["pass_size"],
        how["compile"],
        lr=float(cfg.optim.backbone_lr),
        weight_decay=float(cfg.optim.weight_decay),
    )


def _split(node: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the backbone itself, and how it is run."""
    arguments = plain(node)
    return arguments, {key: arguments.pop(key) for key in HOW_IT_RUNS}


def make_candidates(cfg: DictConfig, frozen: FrozenBackbone, num_outputs: int | None) -> list[Candidate]:
    """The heads to train: the composed one, or with `head=grid` every combination of its lists."""
    if "heads" in cfg.head:
        return [_candidate(cfg, frozen, num_outputs, head, settings) for head, settings in _grid(cfg)]
    return [_candidate(cfg, frozen, num_outputs, cfg.head, {})]


def _candidate(
    cfg: DictConfig, frozen: FrozenBackbone, num_outputs: int | None, head_cfg: DictConfig, settings: dict[str, Any]
) -> Candidate:
    name = " ".join(f"{key}={value}" for key, value in settings.items()) or HydraConfig.get().runtime.choices["head"]
    option = str(settings.get("head", HydraConfig.get().runtime.choices["head"]))
    origin = f"{option} {json.dumps(head_arguments(head_cfg), sort_keys=True)}"  # alone and in any grid the same
    with forked_rng(stable_seed(cfg.seed, origin, "init")):
        head = make_head(cfg, head_cfg, option, frozen, num_outputs)
    return Candidate(
        name=name,
        head=head,
        loss=instantiate(cfg.task.loss),
        lr=float(settings.get("lr", cfg.optim.lr)) * _rate_scale(cfg),
        weight_decay=float(settings.get("weight_decay", cfg.optim.weight_decay)),
        schedule=instantiate(cfg.optim.schedule),
        clip_norm=cfg.optim.clip_norm,
        momentum=instantiate(cfg.optim.momentum),
        settings=settings,
        origin=origin,
    )


def _rate_scale(cfg: DictConfig) -> float:
    """Where a protocol states its learning rates for a batch of some size, what they are times for this one."""
    stated = cfg.task.protocol.get("lr_batch")
    return 1.0 if stated is None else cfg.data.batch_size * cfg.trainer.accumulate_grad_batches / stated


def _grid(cfg: DictConfig) -> list[tuple[DictConfig, dict[str, Any]]]:
    """(head config, settings) of each combination; a list that is empty leaves the task's own value."""
    combinations: list[dict[str, Any]] = [{}]
    for key in ("heads", "blocks", "k", "lr", "weight_decay"):
        name = "head" if key == "heads" else key
        if values := _as_list(cfg.head.get(key)):
            combinations = [{**before, name: value} for before in combinations for value in values]
    if len({json.dumps(c) for c in combinations}) < len(combinations):
        raise UserError("head=grid: a value stands twice in one of its lists; each combination is trained once.")
    options = {
        name: _option(name) for name in {str(settings["head"]) for settings in combinations}
    }  # composing is slow
    return [(_varied(cfg, options[str(settings["head"])], settings), settings) for settings in combinations]


def _as_list(value: Any) -> list[Any]:
    """One value is a list of one, null an empty one."""
    if OmegaConf.is_list(value):
        return list(value)
    return [] if value is None else [value]


def option_of_grid(cfg: DictConfig, settings: Mapping[str, Any]) -> DictConfig:
    """The config of one head of a grid: its own option, with the grid's arguments on top."""
    return _varied(cfg, _option(str(settings["head"])), settings)


def _option(name: str) -> dict[str, Any]:
    return plain(recomposed("head", name).head)


def _varied(cfg: DictConfig, option: Mapping[str, Any], settings: Mapping[str, Any]) -> DictConfig:
    head_cfg = OmegaConf.create(dict(option))
    varied = {key: settings[key] for key in _OF_HEADS if key in settings}
    for key, value in {**plain(cfg.head.arguments), **varied}.items():
        if key not in head_cfg:
            raise unknown_name(f"argument of head={settings['head']}:", key, [str(known) for known in head_cfg])
        head_cfg[key] = value
    return head_cfg


def make_head(
    cfg: DictConfig, head_cfg: DictConfig, option: str, frozen: FrozenBackbone, num_outputs: int | None
) -> Head:
    """The head that an option of group `head` describes, with its weights where `head.weights` names some.

    Raises:
        UserError: a head of another kind than the task's family, classes that are not known, weights that do not fit.
    """
    if num_outputs is None:
        raise UserError(f"task={cfg.task.name}: how many classes there are is not known here. Set task.num_classes=K.")
    target = get_class(head_cfg._target_)
    families = [family for family, (kind, _) in _KINDS.items() if issubclass(target, kind)]
    if families != [family for family in _KINDS if family == cfg.task.family]:
        kind = _KINDS[families[0]][1] if families else "predicts maps"
        raise UserError(f"head={option} {kind}, which task={cfg.task.name} ({cfg.task.family}) has no use for. --help")
    _set_range(cfg, head_cfg, option)
    # Resolved as a whole: a copy of some keys would lose its parent, and with it what interpolations point to.
    partial: functools.partial[Head] = instantiate(
        {**head_arguments(head_cfg), **_criterion(head_cfg), "_target_": head_cfg._target_, "_partial_": True}
    )
    head = partial(frozen.widths(partial.keywords), num_outputs)
    weights = head_cfg.get("weights")
    if weights == "official":
        if cfg.task.released is None:
            raise UserError(f"head.weights=official: no heads were released for task={cfg.task.name}. Give a path.")
        url = official_head_url(cfg.backbone.name, cfg.task.released, option)
        load_head_weights(head, fetch(url, url.rsplit("/", 1)[-1]), cfg.backbone.name, cfg.task.released)
    elif weights is not None:
        load_head_weights(head, weights, cfg.backbone.name)
    return head


def _set_range(cfg: DictConfig, head_cfg: DictConfig, option: str) -> None:
    """`head.range=hub`, and a word where a released head's published range is not the hub's."""
    asked = head_cfg.get("range")
    if asked is not None and asked != "hub":
        raise unknown_name("head.range:", str(asked), ["hub"])
    if "min_m" not in head_cfg or cfg.task.get("released") not in ("nyu", "kitti"):
        if asked is not None:
            raise UserError(f"head.range=hub: task={cfg.task.name} has no released depth heads. Set task.depth_range.")
        return
    if asked == "hub":
        head_cfg.min_m, head_cfg.max_m = hub_range(cfg.task.released, option)
    elif head_cfg.get("weights") is not None and head_cfg.max_m == published_range(cfg.task.released)[1]:
        _tell_of_range(range_notice(cfg.task.released, option))


@functools.cache
def _tell_of_range(notice: str | None) -> None:
    """Once in a process; a warning, since a program without our logging shows nothing less."""
    if notice is not None:
        log.warning(notice)


def measured_only(cfg: DictConfig, head: Head) -> Candidate:
    """A trained head as a candidate that is measured only."""
    return Candidate("trained", head, instantiate(cfg.task.loss), 0.0, 0.0, instantiate(cfg.optim.schedule))


def _criterion(head_cfg: DictConfig) -> dict[str, Any]:
    """Matching and losses of a head that brings none; of training alone, so a card does not name it."""
    return {"criterion": plain(head_cfg.criterion)} if head_cfg.get("criterion") is not None else {}


def head_arguments(head_cfg: DictConfig) -> dict[str, Any]:
    """The plain arguments of a head, without Hydra's keys and ours."""
    return {key: value for key, value in plain(head_cfg).items() if key not in _NOT_ARGUMENTS}
