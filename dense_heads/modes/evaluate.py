"""`mode=evaluate`: measure a trained head, on its own task or on another one."""

import logging
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from dense_heads.build.heads import backbone
from dense_heads.build.parts import family_of, make_parts
from dense_heads.build.training import make_trainer
from dense_heads.errors import UserError
from dense_heads.models.artefact import trained_head
from dense_heads.models.card import read_card
from dense_heads.modes.folder import evaluation_folder, run_folder
from dense_heads.modes.learning import measure
from dense_heads.modes.outcome import Measured, trained_steps, untrained, write_outcome
from dense_heads.report.html import write_report
from dense_heads.report.tables import print_tables

log = logging.getLogger("dense_heads")


def main(cfg: DictConfig) -> float:
    """Measure; writes `RUN/evaluate/<time>/`. Returns the primary metric."""
    started = time.monotonic()
    if cfg.model is None and cfg.head.get("weights") is None:
        raise UserError(
            "mode=evaluate needs a trained head: model=RUN (the folder of a finished run), or a head with "
            "head.weights=official or a path."
        )
    heads, choices, steps = None, dict(HydraConfig.get().runtime.choices), 0
    frozen = backbone(cfg)
    if cfg.model is not None:
        choices["head"], steps = read_card(Path(cfg.model)).head["name"], trained_steps(Path(cfg.model))
        heads = [trained_head(Path(cfg.model), frozen, family_of(cfg).num_outputs(cfg))]
    parts = make_parts(cfg, heads=heads, frozen=frozen)
    folder = run_folder(cfg) if cfg.model is None else evaluation_folder(cfg)
    trainer = make_trainer(cfg, folder, parts, [])
    stage = measure(trainer, parts)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        beside = untrained(cfg, parts, stage)
        seconds = {"total": time.monotonic() - started}
        finals = write_outcome(folder, Measured(cfg, parts, stage, steps, seconds, choices, **beside))
        write_report(folder)
        print_tables(finals)
        log.info("report %s", folder / "report.html")
    leader = parts.module.leader()
    return parts.module.results[stage].scores[leader][parts.module.primary]
