"""Models to use: from a run, from a composed head with its weights, or a released head by name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dense_heads.build.config import plain
from dense_heads.build.heads import HOW_IT_RUNS, backbone, head_arguments, make_head, option_of_grid
from dense_heads.build.parts import Parts, family_of, settings_of
from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.models.artefact import BACKBONE_FILE, assemble, head_target, trained_head
from dense_heads.models.card import Card, read_card
from dense_heads.models.dense import DenseModel, FrozenBackbone
from dense_heads.training.base import Candidate


def run_card(cfg: DictConfig, made: Parts, candidate: Candidate) -> Card:
    """What the artefact of a trained candidate must say to be used again."""
    in_grid = "heads" in cfg.head
    head_cfg = option_of_grid(cfg, candidate.settings) if in_grid else cfg.head
    name = candidate.settings["head"] if in_grid else HydraConfig.get().runtime.choices["head"]
    labels = made.loaded.labels.settings() if made.loaded.labels else {}
    card = make_card(cfg, made.module.backbone, candidate.head, name, head_arguments(head_cfg))
    return dataclasses.replace(
        card,
        labels=labels,
        settings={**card.settings, **made.loaded.settings},
        overrides=list(HydraConfig.get().overrides.task),
    )


def make_card(cfg: DictConfig, frozen: FrozenBackbone, head: Head, name: str, arguments: Mapping[str, Any]) -> Card:
    """The card of `head`, an option `name` with its own `arguments`, under the config's task."""
    described = {key: v for key, v in plain(cfg.backbone).items() if key not in ("_target_", *HOW_IT_RUNS)}
    if frozen.learns:
        described["weights"] = BACKBONE_FILE  # beside the card
    elif Path(str(described["weights"])).exists():
        described["weights"] = str(Path(str(described["weights"])).resolve())
    family = family_of(cfg)
    classes = family.classes(cfg)
    return Card(
        family=cfg.task.family,
        task=cfg.task.name,
        backbone={**described, "fingerprint": frozen.fingerprint()},
        head={"name": str(name), "target": head_target(type(head)), "arguments": dict(arguments)},
        num_outputs=family.num_outputs(cfg),
        classes=list(classes.names),
        colours=classes.colours.tolist(),
        labels=family.labels(cfg),
        preprocessing=_preprocessing(cfg, frozen),
        inference=plain(cfg.task.inference),
        settings=settings_of(cfg),
        licence={"code": "Apache-2.0", "data": cfg.task.licence},
    )


def make_model(cfg: DictConfig) -> DenseModel:
    """The model of `model=RUN`, or of the composed head with `head.weights`; windows and flips may be typed anew.

    Raises:
        UserError: neither is given, or what is there does not fit.
    """
    if cfg.model is None and cfg.head.get("weights") is None:
        raise UserError(
            f"mode={cfg.mode} needs a trained head: model=RUN (the folder of a finished run), or a head with "
            "head.weights=official or a path."
        )
    frozen = backbone(cfg)
    if cfg.model is None:
        name = HydraConfig.get().runtime.choices["head"]
        head = make_head(cfg, cfg.head, name, frozen, family_of(cfg).num_outputs(cfg))
        return assemble(make_card(cfg, frozen, head, name, head_arguments(cfg.head)), frozen, head)
    kept = read_card(Path(cfg.model))
    card = dataclasses.replace(
        kept,
        settings={**kept.settings, **settings_of(cfg)},
        inference=plain(cfg.task.inference),
        preprocessing=_preprocessing(cfg, frozen),
    )
    return assemble(card, frozen, trained_head(Path(cfg.model), frozen))


def _preprocessing(cfg: DictConfig, frozen: FrozenBackbone) -> dict[str, Any]:
    return {**plain(cfg.task.transforms.eval), "patch_fit": frozen.patch_fit, "precision": frozen.precision}
