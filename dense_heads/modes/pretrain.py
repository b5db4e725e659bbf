"""`mode=fit` of the families that train a backbone: train, write the weights and their card."""

import json
import logging
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from safetensors.torch import save

from dense_heads.backbones.weights import save_backbone
from dense_heads.build.backbone_training import BackboneParts, make_backbone_parts
from dense_heads.build.training import make_loggers, make_trainer
from dense_heads.errors import unknown_name
from dense_heads.heads.dino import HEADS_FILE
from dense_heads.modes.folder import run_folder
from dense_heads.modes.outcome import commit, hardware
from dense_heads.modes.resume import checkpoint_to_resume
from dense_heads.ops.files import write_atomically
from dense_heads.report.curves import save_curves
from dense_heads.training.loggers import finish_loggers

log = logging.getLogger("dense_heads")

FILES = {
    "own": "backbone.safetensors",
    "official": "backbone.pth",
    "huggingface": "huggingface",
    "timm": "backbone_timm.safetensors",
}


def main(cfg: DictConfig) -> float | None:
    """Train and write the run folder; returns the probe's first accuracy where there is a probe."""
    started = time.monotonic()
    for name in cfg.task.formats:
        if name not in FILES:
            raise unknown_name("task.formats:", str(name), FILES)
    parts = make_backbone_parts(cfg)
    folder = run_folder(cfg)
    log.info("run folder %s", folder)
    loggers = make_loggers(cfg, folder)
    trainer = make_trainer(cfg, folder, None, loggers)
    checkpoint = checkpoint_to_resume(cfg, folder, loggers[0])
    trainer.fit(parts.module, parts.data, ckpt_path=checkpoint, weights_only=True)
    seconds = time.monotonic() - started
    found = parts.module.results.get("val", {})
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        write_result(folder, cfg, parts, trainer.global_step, seconds)
        finish_loggers(loggers, {f"val/{name}": value for name, value in found.items()})
        save_curves(folder / "metrics.csv", folder / "pictures")
        log.info("curves %s", folder / "pictures")
    return next(iter(found.values()), None)


def write_result(folder: Path, cfg: DictConfig, parts: BackboneParts, step: int, seconds: float) -> None:
    """`backbone.safetensors` (and other formats), `card.json` and `metrics.json`; `heads.safetensors` of a teacher.

    Of several students each has a folder of its own, `students/NAME`, with weights and card.
    """
    started_from = cfg.backbone.weights if cfg.students is None else None
    shared = {
        "kind": "backbone",
        "task": cfg.task.name,
        "started_from": started_from,
        "images": {"root": str(cfg.data.root), "number": parts.num_images, "licence": cfg.task.licence},
        "steps": step,
        "batch_size": cfg.data.batch_size,
        "seconds": round(seconds, 1),
        "seed": cfg.seed,
        "hardware": hardware(),
        "commit": commit(),
        "overrides": list(HydraConfig.get().overrides.task),
        **parts.facts,
    }
    found = parts.module.results.get("val", {})
    for student, backbone in parts.module.backbones().items():
        place = folder / "students" / student if student else folder
        place.mkdir(parents=True, exist_ok=True)
        for name in dict.fromkeys(["own", *cfg.task.formats]):
            log.info("weights %s", save_backbone(backbone, place / FILES[name], name))
        start = f"{student}/" if student else ""
        probe = {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}
        own = {"backbone": backbone.name, "fingerprint": backbone.fingerprint(), "probe": probe}
        write_atomically(place / "card.json", json.dumps({**shared, **own}, indent=2) + "\n")
    if heads := parts.module.kept_heads():
        write_atomically(folder / HEADS_FILE, save({name: value.contiguous().cpu() for name, value in heads.items()}))
    write_atomically(folder / "metrics.json", json.dumps({"metrics": found, **shared}, indent=2) + "\n")
