"""`mode=sweep`: search config values with an Optuna study; what a kill leaves goes on with `resume`."""

import logging
import os
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dense_heads.build.data import keep_split
from dense_heads.build.parts import family_of
from dense_heads.build.space import Space, check_space, read_space
from dense_heads.build.study import num_trials, open_study
from dense_heads.errors import UserError
from dense_heads.modes.conclusion import conclude
from dense_heads.modes.folder import STUDY_FILE, run_folder
from dense_heads.modes.search import Search
from dense_heads.modes.trial import Trials
from dense_heads.modes.workers import Workers, is_worker
from dense_heads.paths import CONF_DIR
from dense_heads.recompose import key_of, own_overrides
from dense_heads.report.trials import counted

log = logging.getLogger("dense_heads.sweep")


def main(cfg: DictConfig) -> float | None:
    """Run the study to its end and write what it found; returns the best validation score.

    A process that another sweep started as a worker runs trials only, and returns None.

    Raises:
        UserError: what is asked for makes no sense, or not one trial could be completed.
    """
    if cfg.get("sweep") is None:
        options = sorted(path.stem for path in (CONF_DIR / "sweep").glob("[!_]*.yaml"))
        raise UserError(f"mode=sweep needs sweep=OPTION, the space to search. There are: {', '.join(options)}.")
    _refuse_ranks(cfg)
    if cfg.resume is None and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0:
        cfg.resume = "auto"  # the cluster started this job again
    space = read_space(cfg)
    total = num_trials(cfg, space)
    trials = Trials(_base(cfg, space), cfg.output_dir)
    started = time.monotonic()
    if is_worker():
        trials.begin(Path(cfg.run_dir), with_bar=False)
    else:
        _prepare(cfg, space, trials)
    search = Search(
        study=open_study(trials.folder / STUDY_FILE, cfg, space),
        space=space,
        trials=trials,
        total=total,
        score=f"val/{cfg.task.metrics.primary}",
        workers=cfg.sweep.workers,
        keep_checkpoints=cfg.sweep.keep_checkpoints,
        deadline=None if cfg.sweep.timeout is None else started + cfg.sweep.timeout,
    )
    if is_worker():
        while search.run_one():
            pass
        return None
    _run_all(search)
    return conclude(cfg, search, time.monotonic() - started)


def _prepare(cfg: DictConfig, space: Space, trials: Trials) -> None:
    """Find mistakes that show cheaply; then make the folder. Of a sweep that goes on only the data are looked at."""
    goes_on = cfg.resume is not None and Path(cfg.run_dir or cfg.resume, STUDY_FILE).is_file()
    if not goes_on:
        check_space(space, trials.base)
    with trials.composed([parameter.probes()[0] for parameter in space.parameters.values()]) as example:
        loaded = family_of(example).load(example, False) if goes_on else trials.parts(example).loaded
    folder = run_folder(cfg)
    if not goes_on:
        keep_split(folder, cfg, loaded)
    trials.begin(folder, with_bar=sys.stdout.isatty())


def _run_all(search: Search) -> None:
    """Run trials here and in the other workers, until all have ended."""
    folder, before = search.trials.folder, search.found()
    log.info("sweep folder %s", folder)
    keys = ", ".join(search.space.parameters)
    log.info("%d trials (so far %s) of %s; %s", search.total, counted(before), keys, before.method)
    try:
        with Workers(search.workers - 1, folder) as workers:
            there_may_be_more = True
            while there_may_be_more:
                there_may_be_more = workers.alive()  # asked first: what a worker leaves is taken up below
                while search.run_one():
                    pass
                if there_may_be_more:
                    time.sleep(0.3)
    except BaseException:
        log.info("the sweep was stopped; go on with mode=sweep resume=%s", folder)
        raise


def _base(cfg: DictConfig, space: Space) -> list[str]:
    """What was typed for every trial.

    Raises:
        UserError: a key is typed and swept.
    """
    typed = own_overrides(HydraConfig.get().overrides.task)
    of_trials = [o for o in typed if not key_of(o).split(".")[0].split("/")[0] == "sweep"]
    swept = {key_of(key) for key in space.parameters}
    both = [o for o in of_trials if key_of(o) in swept]
    if both and cfg.resume is None and not is_worker():
        raise UserError(f"{both[0]} is typed, and {key_of(both[0])} is searched by sweep.space. Leave one of them out.")
    return [o for o in of_trials if o not in both]  # a sweep's folder keeps the best trial's values


def _refuse_ranks(cfg: DictConfig) -> None:
    devices = cfg.trainer.devices
    several = (isinstance(devices, int) and devices > 1) or (not isinstance(devices, int | str) and len(devices) > 1)
    if several or int(os.environ.get("WORLD_SIZE", "1")) > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UserError(
            "mode=sweep trains each trial on one device and is started once on a machine. Several trials at a time, "
            "each on its own GPU, are sweep.workers=N."
        )
