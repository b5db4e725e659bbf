"""The distillation family: teacher, method and module."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import load_file

from dense_heads.backbones.vit import VisionTransformer
from dense_heads.build.cache import files_digest, kept, of_backbone
from dense_heads.build.config import is_random, plain
from dense_heads.build.heads import frozen_backbone
from dense_heads.build.pretraining import objective
from dense_heads.data.taught_crops import CropViews, TaughtCrops
from dense_heads.data.unlabelled import CropDataset, ImageFiles, TarShards
from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.dino import HEADS_FILE, DINOHead
from dense_heads.metrics.neighbours import NeighbourProbe
from dense_heads.models.inference import Inference
from dense_heads.training.backbone import BackboneTraining, Collapse, Recipe
from dense_heads.training.distillation import FeatureDistillation, FeatureObjective, HeadDistillation
from dense_heads.training.feature_pass import DTYPES, FeaturePass

METHODS = ("auto", "features", "heads")
WHY_FEATURES = (
    "The teacher comes without the heads that it was trained with (those of the official weights were never "
    "published). A frozen teacher with random prototypes teaches nothing, so its features are matched."
)


def method(cfg: DictConfig) -> str:
    """`features` or `heads`.

    Raises:
        UserError: no teacher, an unknown method, or heads are asked for that the teacher has not.
    """
    if "teacher" not in cfg:
        raise UserError(
            "task=distillation needs a teacher: teacher=vitg14_reg, and teacher.weights=... for its weights."
        )
    if cfg.task.method not in METHODS:
        raise unknown_name("task.method:", str(cfg.task.method), METHODS)
    has_heads = _heads_file(cfg).is_file()
    if cfg.task.method == "heads" and not has_heads:
        raise UserError(
            f"task.method=heads needs a teacher with its heads: teacher.weights={cfg.teacher.weights} is no run of "
            f"task=pretraining that kept them ({HEADS_FILE}). Use task.method=features."
        )
    if cfg.task.method == "auto":
        return "heads" if has_heads else "features"
    return str(cfg.task.method)


def crops(cfg: DictConfig) -> dict[str, Any]:
    """What differs from `task.crops`: features are matched on global crops alone."""
    return {"num_local": 0} if method(cfg) == "features" else {}


def module(
    cfg: DictConfig,
    students: Mapping[str, VisionTransformer],
    recipe: Recipe,
    collapse: Collapse,
    probe: NeighbourProbe | None,
) -> BackboneTraining:
    """The LightningModule."""
    chosen = method(cfg)
    matched = FeatureObjective(**plain(cfg.task.features))
    teacher = frozen_backbone(cfg.teacher)
    for student in students.values():
        if student.patch_size != teacher.backbone.patch_size:
            raise UserError(
                f"{student.name} has patches of {student.patch_size} pixels, the teacher {teacher.backbone.name} of "
                f"{teacher.backbone.patch_size}; expected equal ones."
            )
    optimizer = instantiate(cfg.optim.optimizer)
    if chosen == "features":
        return FeatureDistillation(students, teacher, matched, optimizer, recipe, collapse, probe, cfg.seed)
    arguments = _heads_of_run(Path(cfg.teacher.weights))
    heads = {name: DINOHead(teacher.backbone.embed_dim, **options) for name, options in arguments.items()}
    _load_heads(heads, _heads_file(cfg))
    terms = objective(cfg, heads=arguments)
    return HeadDistillation(students, teacher, heads, terms, optimizer, recipe, collapse, probe, cfg.seed)


def with_features(
    cfg: DictConfig, made: BackboneTraining, crops: CropDataset, found: ImageFiles | TarShards
) -> TaughtCrops:
    """The crops with the teacher's features, computed now where the cache has them not; the teacher then rests.

    Raises:
        UserError: a method that asks the teacher's heads, or `cache.views` does not say what is to be kept.
    """
    if not isinstance(made, FeatureDistillation):
        raise UserError(f"cache={cfg.cache.kind} keeps a teacher's features. Set task.method=features, or cache=off.")
    if cfg.cache.views is None:
        raise UserError(
            f"cache={cfg.cache.kind} keeps what the teacher made of an image, and crops are random. Say what to keep: "
            "cache.views=K keeps the crops of K epochs and cycles through them; cache.views=0 the middle of each image."
        )
    num_views, num_images = max(1, cfg.cache.views), len(crops)
    made.num_views = 2 if cfg.cache.views else 1
    wanted = FeaturePass(
        what=f"the teacher {cfg.teacher.name}",
        dataset=CropViews(crops),
        keys=[(view, index) for view in range(num_views) for index in range(num_images)],
        frozen=made.teacher,
        requests=[made.request],
        inference=Inference(),
        dtype=DTYPES[cfg.cache.dtype],
        batch=cfg.cache.batch,
        num_workers=cfg.data.num_workers,
    )
    identity = {
        **of_backbone(wanted, cfg.teacher.name),
        "dtype": cfg.cache.dtype,
        "views": cfg.cache.views,
        "image_size": cfg.data.image_size,
        "in_memory": cfg.data.in_memory,
        "fast": cfg.task.crops.fast,
        "files": files_digest(found.files()),
    }
    if cfg.cache.views:
        identity |= {"crops": plain(cfg.task.crops), "seed": cfg.seed}
    name = f"{cfg.task.name}-{cfg.teacher.name}-train"
    return TaughtCrops(crops, kept(cfg, wanted, identity, name, num_images, num_views))


def facts(cfg: DictConfig, made: BackboneTraining) -> dict[str, Any]:
    """What the card says of the objective and the teacher."""
    assert isinstance(made, FeatureDistillation | HeadDistillation)
    by_features = isinstance(made, FeatureDistillation)
    return {
        "teacher": {
            "name": cfg.teacher.name,
            "weights": cfg.teacher.weights,
            "fingerprint": made.teacher.fingerprint(),
            "precision": made.teacher.precision,
            "random": is_random(cfg.teacher),
        },
        "method": "features" if by_features else "heads",
        "cache": {key: cfg.cache[key] for key in ("kind", "views", "dtype")},
        "reason": WHY_FEATURES if by_features and not _heads_file(cfg).is_file() else None,
        "objective": plain(cfg.task.features) if by_features else {**vars(made.objective)},
    }


def _heads_file(cfg: DictConfig) -> Path:
    return Path(str(cfg.teacher.weights), HEADS_FILE)


def _heads_of_run(run: Path) -> dict[str, dict[str, int]]:
    """How the heads of a pre-training run are made; whole numbers only, whatever the card says.

    Raises:
        UserError: there is no card, or it says something else.
    """
    path = run / "card.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))["objective"]["heads"]
        keys = ("num_prototypes", "hidden_dim", "bottleneck_dim")
        return {
            name: {key: int(described[name][key]) for key in keys if key in described[name]}
            for name in ("dino", "ibot")
            if described.get(name) is not None
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not say how the teacher's heads are made ({error}).") from error


def _load_heads(heads: Mapping[str, DINOHead], path: Path) -> None:
    state = load_file(path)
    for name, head in heads.items():
        own = {
            key.removeprefix(f"{name}_head."): tensor
            for key, tensor in state.items()
            if key.startswith(f"{name}_head.")
        }
        try:
            head.load_state_dict(own)
        except RuntimeError as error:
            raise UserError(f"{path} does not fit its card: {' '.join(str(error).split())[:400]}") from error
