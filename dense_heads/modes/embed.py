"""`mode=embed`: features of a folder of images, written as the feature cache writes them."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from dense_heads.build.cache import files_digest
from dense_heads.build.config import plain
from dense_heads.build.heads import backbone
from dense_heads.data.feature_store import FORMAT, CachedDataset
from dense_heads.data.image_files import ImageFile, UnlabelledImages
from dense_heads.data.inputs import Pictures
from dense_heads.errors import UserError, unknown_name
from dense_heads.models.artefact import MODELS
from dense_heads.models.inference import Inference
from dense_heads.ops.files import replacing, write_atomically
from dense_heads.training.feature_cache import on_disk
from dense_heads.training.feature_pass import DTYPES, FeaturePass

log = logging.getLogger("dense_heads")


def main(cfg: DictConfig) -> None:
    """Write the features that the composed head would see, of whole images, into `output`.

    Beside the shards: `images.txt`, the images' names in order, and `cls_tokens.npy`, the cls token of each image's
    last level as float32 (N, D); of a file that could not be read it is nan.

    Raises:
        UserError: a key is missing, there is nothing to read, or not one file could be read.
    """
    if cfg.input is None or cfg.output is None:
        raise UserError("mode=embed needs input=FILE_OR_FOLDER and output=FOLDER.")
    if "blocks" not in cfg.head or "heads" in cfg.head:
        raise UserError("mode=embed writes what one head would see. Choose one, such as head=linear4.")
    dtype = cfg.cache.dtype or "bfloat16"
    if dtype not in DTYPES:
        raise unknown_name("cache.dtype:", str(dtype), DTYPES)
    names = Pictures().find(Path(cfg.input))
    samples = [ImageFile(name, path) for path, name in names]
    frozen = backbone(cfg)
    request = frozen.requested(cfg.head.blocks, cfg.head.norm, cfg.head.get("windows", 1))
    preparation = plain(cfg.task.transforms.eval)
    wanted = FeaturePass(
        what=str(cfg.input),
        dataset=UnlabelledImages(samples, MODELS[cfg.task.family].transform_type(**preparation)),
        keys=range(len(samples)),
        frozen=frozen,
        requests=[request],
        inference=Inference(),
        dtype=DTYPES[dtype],
        batch=cfg.cache.batch,
        num_workers=cfg.data.num_workers,
    )
    identity = {
        "format": FORMAT,
        "backbone": {"name": cfg.backbone.name, "fingerprint": frozen.fingerprint()},
        "levels": request.levels,
        "patch_fit": frozen.patch_fit,
        "precision": str(frozen.dtype),
        "dtype": dtype,
        "transforms": preparation,
        "files": files_digest(samples),
    }
    folder = Path(cfg.output).resolve()
    store = on_disk(wanted, folder, json.loads(json.dumps(identity)), cfg.cache.check, cfg.cache.shard_mb * 2**20)
    features = CachedDataset(store, len(samples))
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        _write_index(features, folder, frozen.backbone.embed_dim)


def _write_index(features: CachedDataset, folder: Path, width: int) -> None:
    cls_tokens = np.full((len(features), width), np.nan, dtype=np.float32)
    names, failed = [], []
    for index in range(len(features)):
        item: dict[str, Any] = features[index]
        names.append(item["image_id"])
        if "error" in item:
            failed.append(item["error"])
        else:
            (first, *_) = item["views"][0].windows
            cls_tokens[index] = first.cls_tokens[max(first.cls_tokens)].float().numpy()
    write_atomically(folder / "images.txt", "".join(f"{name}\n" for name in names))
    with replacing(folder / "cls_tokens.npy") as file:
        np.save(file, cls_tokens)
    log.info("features of %d of %d images in %s", len(names) - len(failed), len(names), folder)
    if failed:
        log.warning("%d could not be read:\n%s", len(failed), "\n".join(failed))
        if len(failed) == len(names):
            raise UserError("None of the files could be read:\n" + "\n".join(failed[:5]))
