"""What a sweep comes to: its best trial, measured like any run, and the report over all of them."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from safetensors.torch import load_file

from dense_heads.build.study import importances
from dense_heads.build.training import make_trainer
from dense_heads.errors import UserError
from dense_heads.models.artefact import BACKBONE_FILE, HEAD_FILE, trained_head
from dense_heads.models.card import CARD_FILE, read_card
from dense_heads.modes.learning import measure
from dense_heads.modes.outcome import Measured, trained_steps, untrained, write_outcome
from dense_heads.modes.search import Search
from dense_heads.ops.files import write_atomically
from dense_heads.recompose import keep_overrides, key_of
from dense_heads.report.html import write_report
from dense_heads.report.tables import print_tables
from dense_heads.report.trials import Sweep, TrialRow, counted, print_trials, settings_text, write_sweep

log = logging.getLogger("dense_heads.sweep")


def conclude(cfg: DictConfig, search: Search, seconds: float) -> float:
    """Make the sweep's folder a run's folder, that of the best trial; returns its validation score.

    The test split, where there is one, is measured here for the first time, and of this one trial.

    Raises:
        UserError: no trial was completed.
    """
    sweep = dataclasses.replace(search.found(), importances=importances(search.study))
    folder = search.trials.folder
    write_sweep(folder, sweep)
    if not sweep.of("complete"):
        raise _nothing_completed(sweep, folder)
    best = sweep.best_first()[0]
    assert best.value is not None
    overrides = search.space.overrides(best.params)
    finals = _measure_best(search, best, overrides, sweep, seconds)
    typed = [o for o in HydraConfig.get().overrides.task if key_of(o) not in map(key_of, overrides)]
    keep_overrides(
        folder, [*typed, *overrides]
    )  # so that model= and resume= find the folder composed as its best trial
    write_report(folder)
    print_trials(sweep)
    print_tables(finals)
    left = sweep.total - len(sweep.of("complete", "pruned", "failed"))
    if left:
        log.info("%d trials are left; go on with mode=sweep resume=%s", left, folder)
    if offline := list(folder.glob("trials/*/wandb/offline-run-*")):
        log.info("To upload the %d offline runs: wandb sync %s", len(offline), folder / "trials/*/wandb/offline-run-*")
    log.info("best: trial %d, %s", best.number, settings_text(best.params))
    log.info("report %s", folder / "report.html")
    return best.value


def _measure_best(search: Search, best: TrialRow, overrides: list[str], sweep: Sweep, seconds: float) -> dict[str, Any]:
    folder, own = search.trials.folder, search.trials.folder_of(best.number)
    for name in (HEAD_FILE, CARD_FILE, "metrics.csv", BACKBONE_FILE):
        if (own / name).is_file():  # the backbone, where it was trained
            write_atomically(folder / name, (own / name).read_bytes())
    with search.trials.composed(overrides, pictures=True) as cfg:
        cfg.model = str(own)
        frozen = search.trials.frozen(cfg)
        if frozen.learns:
            frozen.backbone.load_state_dict(load_file(own / BACKBONE_FILE))
        parts = search.trials.parts(cfg, frozen, heads=[trained_head(own, frozen)])
        parts.notes.append(f"The best of a sweep's trials ({counted(sweep)}) by {sweep.score}: trial {best.number}.")
        stage = measure(make_trainer(cfg, folder, parts, []), parts)
        choices = {**HydraConfig.get().runtime.choices, "head": read_card(own).head["name"]}
        steps = trained_steps(own)
        took, beside = {"total": seconds}, untrained(cfg, parts, stage)
        measured = Measured(cfg, parts, stage, steps, took, choices, trials=len(sweep.rows), **beside)
        return write_outcome(folder, measured)


def _nothing_completed(sweep: Sweep, folder: Path) -> UserError:
    failed = sweep.of("failed")
    if not failed:
        return UserError(
            f"No trial was completed ({counted(sweep)}). Raise sweep.timeout or sweep.trials, or take "
            f"sweep/pruner=none, and go on with mode=sweep resume={folder}."
        )
    named = "\n".join(f"- trial {row.number} ({settings_text(row.params)}): {row.error}" for row in failed[:5])
    more = f"\n... and {len(failed) - 5} more" if len(failed) > 5 else ""
    return UserError(
        f"No trial was completed, {len(failed)} failed:\n{named}{more}\nEach one's log is {folder}/trials/*/log.txt. "
        "Correct sweep.space or what the trials share, and start a new sweep."
    )
