"""What pre-training and distillation are made of: data, probe, module."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.data import Dataset

from dense_heads.backbones.pixels import WITHOUT_NETWORK
from dense_heads.backbones.vit import VisionTransformer
from dense_heads.backbones.whitening import start_whitened
from dense_heads.build import distillation, pretraining
from dense_heads.build.cache import resolve_cache
from dense_heads.build.config import plain, recomposed
from dense_heads.build.heads import HOW_IT_RUNS
from dense_heads.data.classification import ClassificationDataset, check_classification, collate_train
from dense_heads.data.classification_transforms import CentreEvalTransform
from dense_heads.data.crops import centre_crop, published_crops
from dense_heads.data.datasets.class_folders import ClassFolders
from dense_heads.data.selfsupervised import SelfSupervisedData
from dense_heads.data.unlabelled import CropDataset, ImageSource, InMemory, collate_crops, find_images, sample_patches
from dense_heads.errors import UserError, unknown_name
from dense_heads.metrics.neighbours import NeighbourProbe
from dense_heads.training.backbone import BackboneTraining, Collapse, Recipe

log = logging.getLogger("dense_heads")

STARTS = ("published", "whitened")  # of random weights

# A family here is a module with `module(cfg, students, recipe, collapse, probe)`, `crops` and `facts`.
BACKBONE_FAMILIES: dict[str, ModuleType] = {"pretraining": pretraining, "distillation": distillation}


@dataclass
class BackboneParts:
    """What a run that trains a backbone is made of, before the trainer."""

    module: BackboneTraining
    data: SelfSupervisedData
    num_images: int
    facts: dict[str, Any]  # for the card


def make_backbone_parts(cfg: DictConfig) -> BackboneParts:
    """Everything but the trainer; finds a user's mistakes cheaply, the cheapest first."""
    if cfg.data.root is None:
        raise UserError(f"data.root is not set. task={cfg.task.name} needs images: a folder, a .txt list, or a .tar.")
    family = BACKBONE_FAMILIES[cfg.task.family]
    found = find_images(cfg.data.root)
    resolve_cache(cfg)
    if cfg.cache.kind != "off" and family is not distillation:
        raise UserError(f"cache={cfg.cache.kind}: task={cfg.task.name} changes its backbone with every step. cache=off")
    crops = published_crops(cfg.seed, cfg.data.image_size, **{**_crops(cfg), **family.crops(cfg)})
    if cfg.cache.kind != "off" and cfg.cache.views == 0:
        crops = centre_crop(cfg.data.image_size)
    bank, queries = _probe_data(cfg)
    source: ImageSource = found if cfg.data.in_memory is None else InMemory(found, cfg.data.in_memory)
    students = make_students(cfg, source)
    probe = NeighbourProbe(cfg.task.probe.ks) if bank is not None else None
    module = family.module(cfg, students, recipe(cfg), Collapse(**plain(cfg.task.collapse)), probe)
    cut = CropDataset(source, crops, cfg.task.crops.fast)
    dataset: Dataset[Any] = cut
    if cfg.cache.kind != "off":
        dataset = distillation.with_features(cfg, module, cut, found)
    data = SelfSupervisedData(
        dataset,
        bank,
        queries,
        batch_size=cfg.data.batch_size,
        max_steps=cfg.trainer.max_steps,
        collate_train=collate_crops,
        collate_eval=collate_train,
        eval_batch_size=cfg.data.eval_batch_size,
        num_workers=cfg.data.num_workers,
        seed=cfg.seed,
    )
    return BackboneParts(module, data, len(found), family.facts(cfg, module))


def recipe(cfg: DictConfig) -> Recipe:
    """How the student is optimised; the rate follows the batch as in the original unless it is said."""
    options = {key: value for key, value in plain(cfg.optim).items() if key not in ("optimizer", "base_lr", "lr")}
    batch = cfg.data.batch_size * cfg.trainer.accumulate_grad_batches
    lr = cfg.optim.lr if cfg.optim.lr is not None else cfg.optim.base_lr * math.sqrt(batch / 1024)
    options |= {key: tuple(options[key]) for key in ("weight_decay", "momentum")}
    return Recipe(max_steps=cfg.trainer.max_steps, lr=float(lr), **options)


def make_students(cfg: DictConfig, images: ImageSource) -> dict[str, VisionTransformer]:
    """What learns, by the ending of its parts' names: `backbone`, or in its place the `students`, from random weights.

    Raises:
        UserError: one twice, or one that has nothing to train.
    """
    if cfg.students is None:
        return {"": make_student(cfg, cfg.backbone, images)}
    names = [str(name) for name in cfg.students]
    if not names or len(set(names)) < len(names):
        raise UserError(f"students=[{','.join(names)}]; expected different backbones. One alone is backbone=NAME.")
    nodes = {name: recomposed("backbone", name).backbone for name in names}
    for node in nodes.values():
        node.weights = None
    return {f"/{name}": make_student(cfg, node, images) for name, node in nodes.items()}


def make_student(cfg: DictConfig, node: DictConfig, images: ImageSource) -> VisionTransformer:
    """A backbone that learns; from its `weights`, or random with the recipe's LayerScale and `start`."""
    start = cfg.task.backbone.start
    if start not in STARTS:
        raise unknown_name("task.backbone.start", str(start), STARTS)
    arguments = {key: value for key, value in plain(node).items() if key not in HOW_IT_RUNS}
    if node.name not in WITHOUT_NETWORK:
        arguments["drop_path"] = cfg.task.backbone.drop_path
    student = instantiate(arguments)
    if not isinstance(student, VisionTransformer):
        raise UserError(f"backbone={node.name} has nothing to train. Choose a ViT.")
    if cfg.data.image_size % student.patch_size:
        raise UserError(f"data.image_size={cfg.data.image_size}; expected a multiple of {student.patch_size}.")
    if node.weights is None:
        student.init_weights(node.seed, cfg.task.backbone.layer_scale)
        if start == "whitened":
            start_whitened(student, sample_patches(images, student.patch_size, node.seed), node.seed)
    return student


def _crops(cfg: DictConfig) -> dict[str, Any]:
    return {key: value for key, value in plain(cfg.task.crops).items() if key != "fast"}


def _probe_data(cfg: DictConfig) -> tuple[ClassificationDataset | None, ClassificationDataset | None]:
    """Bank and queries of the k-NN probe: training images of `task.probe.root`, and test or validation images."""
    options = cfg.task.probe
    if options.root is None:
        return None, None
    root = Path(options.root).expanduser()
    queries = next((name for name in ("test", "val", "validation") if (root / name).exists()), "test")
    hint = "task.probe.root=FOLDER, or null for no probe"
    reader = ClassFolders(root, splits={"train": "train", "val": queries}, hint=hint)
    samples = {"train": reader.samples("train"), "val": reader.samples("val")}
    check_classification(samples, reader.categories)
    transform = CentreEvalTransform(options.resize, options.crop)
    bank, query = (ClassificationDataset(found, reader.categories, transform) for found in samples.values())
    return bank, query
