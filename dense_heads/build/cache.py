"""The feature cache of a run: which features, under which identity, and the data sets that read them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch.utils.data import Dataset

from dense_heads.build.config import plain
from dense_heads.build.data import Loaded
from dense_heads.data.feature_store import FORMAT, CachedDataset
from dense_heads.data.part import Part
from dense_heads.data.unaugmented import is_random
from dense_heads.errors import UserError, unknown_name
from dense_heads.models.artefact import MODELS
from dense_heads.models.dense import FrozenBackbone
from dense_heads.structures import FeatureRequest
from dense_heads.training.feature_cache import in_memory, on_disk
from dense_heads.training.feature_pass import DTYPES, FeaturePass

_KINDS = ("off", "memory", "disk")
# Of `task.data`: what says where data are and how they are loaded, not what an item is.
_NOT_OF_ITEMS = (
    "root",
    "how_to_get",
    "format",
    "batch_size",
    "eval_batch_size",
    "num_workers",
    "augment",
    "class_aware",
    "unlabeled",
    "image_size",
    "patients",
    "folds",
    "foreground",
    "keep_mb",
)


def resolve_cache(cfg: DictConfig) -> None:
    """Check the keys of `cache`; `cache.views=0` is said as `data.augment=false`, before the data are read.

    Raises:
        UserError: a value that makes no sense.
    """
    cache = cfg.cache
    if cache.kind not in _KINDS:
        raise unknown_name("cache.kind:", str(cache.kind), _KINDS)
    if cache.kind == "off":
        return
    if cache.dtype not in DTYPES:
        raise unknown_name("cache.dtype:", str(cache.dtype), DTYPES)
    for key, least in (("views", 0), ("batch", 1), ("shard_mb", 0)):
        value = cache[key]
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= least) and not (
            key == "views" and value is None
        ):
            raise UserError(f"cache.{key}={value}: expected a whole number, {least} or above.")
    if cache.views == 0 and "augment" in cfg.task.data:
        cfg.data.augment = False


def with_features(
    cfg: DictConfig, loaded: Loaded, frozen: FrozenBackbone, requests: Sequence[FeatureRequest]
) -> Loaded:
    """The data with features in place of images, computed now where they are not there yet.

    Raises:
        UserError: training transforms are random and `cache.views` does not say what is to be kept of them; or the
            features would not fit.
    """
    if cfg.cache.kind == "off":
        return loaded
    num_views = _num_views(cfg, loaded.train)
    parts: dict[str, Any] = {}
    for split, views in (("train", num_views), ("val", 1), ("test", 1)):
        dataset = getattr(loaded, split)
        if dataset is None or (split == "train" and cfg.mode != "fit"):
            continue
        if isinstance(dataset, Part):  # of a whole that other splits, and other folds, share
            whole = _cached(cfg, loaded, split, dataset.whole, frozen, requests, views)
            parts[split] = Part(whole, dataset.indices)
            if isinstance(loaded.support, Part) and loaded.support.whole is dataset.whole:
                parts["support"] = Part(whole, loaded.support.indices)
        else:
            parts[split] = _cached(cfg, loaded, split, dataset, frozen, requests, views)
    notes = list(loaded.notes)
    if cfg.cache.views == 0:
        notes.append("Trained without augmentation (cache.views=0).")
    elif loaded.train is not None and cfg.mode == "fit":
        notes.append(f"Trained on {num_views} cached view(s) of each image, features in {cfg.cache.dtype}.")
    return dataclasses.replace(loaded, notes=notes, **parts)


def _num_views(cfg: DictConfig, train: Any) -> int:
    """Views of each training image.

    Raises:
        UserError: there is chance in the transforms, and the user has not said what to keep of it.
    """
    random = [] if train is None else [name for name, step in train.transform.steps.items() if is_random(step)]
    if cfg.cache.views is None and random and cfg.mode == "fit":
        raise UserError(
            f"cache={cfg.cache.kind} keeps what the backbone made of an image, and the training transforms are random "
            f"({', '.join(random)}). Say what to keep: cache.views=K keeps K augmented views of each image and cycles "
            "through them; cache.views=0 trains without augmentation."
        )
    return max(1, int(cfg.cache.views or 1)) if random else 1


def _cached(
    cfg: DictConfig,
    loaded: Loaded,
    split: str,
    dataset: Dataset[Any],
    frozen: FrozenBackbone,
    requests: Sequence[FeatureRequest],
    num_views: int,
) -> CachedDataset:
    training = split == "train"
    num_samples = len(dataset)  # type: ignore[arg-type]
    keys: Sequence[Any] = range(num_samples)
    if training:
        keys = [(view, index) for view in range(num_views) for index in range(num_samples)]
    wanted = FeaturePass(
        what=f"{cfg.task.name}, {split}",
        dataset=dataset,
        keys=keys,
        frozen=frozen,
        requests=requests,
        inference=None if training else MODELS[cfg.task.family].inference_type(**plain(cfg.task.inference)),
        dtype=DTYPES[cfg.cache.dtype],
        batch=cfg.cache.batch,
        num_workers=cfg.data.num_workers,
        pooled=MODELS[cfg.task.family].pooled,
    )
    identity = _identity(cfg, loaded, split, dataset, wanted, num_views)
    return kept(cfg, wanted, identity, f"{cfg.task.name}-{cfg.backbone.name}-{split}", num_samples, num_views)


def kept(
    cfg: DictConfig, wanted: FeaturePass, identity: Mapping[str, Any], name: str, num_samples: int, num_views: int
) -> CachedDataset:
    """The features of a pass, from where `cache` keeps them; computed now where they are not there.

    `identity`: everything that they depend on, as plain values; `name`: what its folder's name begins with.
    """
    identity = json.loads(json.dumps(identity))  # as it is read again: tuples are lists
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    if cfg.cache.kind == "memory":
        return CachedDataset(in_memory(wanted, key), num_samples, num_views)
    folder = Path(cfg.cache.dir, f"{name}-{key}").resolve()
    store = on_disk(wanted, folder, identity, cfg.cache.check, cfg.cache.shard_mb * 2**20)
    return CachedDataset(store, num_samples, num_views)


def _identity(
    cfg: DictConfig, loaded: Loaded, split: str, dataset: Any, wanted: FeaturePass, num_views: int
) -> dict[str, Any]:
    """Everything that the cached items depend on, as plain values."""
    training = split == "train"
    identity: dict[str, Any] = {
        **of_backbone(wanted, cfg.backbone.name),
        "split": split,
        "dtype": cfg.cache.dtype,
        "items": {key: value for key, value in plain(cfg.task.data).items() if key not in _NOT_OF_ITEMS},
        "labels": loaded.labels.settings() if loaded.labels else {},
        "transforms": plain(cfg.task.transforms)["train" if training else "eval"],
        "files": files_digest(dataset.samples),
    }
    if wanted.pooled:
        identity["pooled"] = True
    if "masks" in cfg.task:
        identity["masks"] = bool(cfg.task.masks)
    if training:
        random = any(is_random(step) for step in dataset.transform.steps.values())
        identity |= {"image_size": plain(cfg.data)["image_size"], "augment": cfg.data.augment, "views": num_views}
        identity |= {"seed": cfg.seed} if random else {}
    else:
        inference = plain(cfg.task.inference)
        identity["inference"] = {key: inference[key] for key in ("window", "stride", "flip")}
    return identity


def of_backbone(wanted: FeaturePass, name: str) -> dict[str, Any]:
    """Of an identity: which backbone, asked for what, and how it is run."""
    return {
        "format": FORMAT,
        "backbone": {"name": name, "fingerprint": wanted.frozen.fingerprint()},
        "levels": sorted({level for request in wanted.requests for level in request.levels}),
        "patch_fit": wanted.frozen.patch_fit,
        "precision": "streamed" if wanted.frozen.streams else str(wanted.frozen.dtype),
    }


def files_digest(samples: Sequence[Any]) -> str:
    """Of the samples and their files: names, sizes and times of change, so that a file that was replaced is noticed."""
    digest = hashlib.sha256()
    for sample in samples:
        for field in dataclasses.fields(sample):
            digest.update(f"{field.name}={_stated(getattr(sample, field.name))!r};".encode())
    return digest.hexdigest()[:32]


def _stated(value: Any) -> Any:
    """A field of a sample with what its files are in place of where they lie."""
    if isinstance(value, Path):
        stat = value.stat()
        return value.name, stat.st_size, stat.st_mtime_ns
    if isinstance(value, tuple):
        return tuple(map(_stated, value))
    return files_digest([value]) if dataclasses.is_dataclass(value) else value
