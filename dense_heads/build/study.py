"""The study of a sweep: an Optuna study in a file, whose suggestions a kill does not change."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from hydra.utils import instantiate
from omegaconf import DictConfig
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, BruteForceSampler
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from dense_heads.build.space import Space
from dense_heads.errors import UserError
from dense_heads.ops.locks import ProcessLock
from dense_heads.ops.seeding import stable_seed
from dense_heads.report.trials import Sweep, TrialRow

MakeSampler = Callable[..., BaseSampler]

optuna.logging.set_verbosity(optuna.logging.ERROR)  # a sweep has its own words
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class SeededByTrial(BaseSampler):
    """A sampler whose draws are functions of (seed, trial number, parameter) and of the trials that are done.

    Optuna's samplers hold the state of their random numbers in memory: a study that goes on in another process would
    draw other values. Here a new sampler is made for each draw.
    """

    def __init__(self, make: MakeSampler, seed: int) -> None:
        """`make(seed=...)` gives a sampler."""
        self._make, self._seed = make, seed
        self.name = type(make(seed=0)).__name__
        self._joint: BaseSampler | None = None

    def _for(self, *what: object) -> BaseSampler:
        return self._make(seed=stable_seed(self._seed, *what) % 2**32)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What is drawn together."""
        self._joint = self._for(trial.number)
        return self._joint.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw it."""
        assert self._joint is not None
        return self._joint.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one parameter."""
        return self._for(trial.number, param_name).sample_independent(study, trial, param_name, param_distribution)


def open_study(path: Path, cfg: DictConfig, space: Space) -> Study:
    """The study in the file `path`, made where there is none.

    Raises:
        UserError: its file is broken or belongs to another space, or the sampler or pruner cannot be made.
    """
    lock = ProcessLock(path.with_name(f".{path.name}.lock"))  # Optuna's own outlive a killed process by half a minute
    with lock:
        _cut_torn_line(path)
    sampler, pruner = _sampler(cfg), _made(cfg, "pruner", optuna.pruners.BasePruner)
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path), lock))  # type: ignore[arg-type]
        own = {"storage": storage, "sampler": SeededByTrial(sampler, cfg.seed), "pruner": pruner, "study_name": "sweep"}
        if optuna.get_all_study_names(storage):
            study = optuna.load_study(**own)
        else:
            highest = cfg.task.metrics.direction == "max"
            study = optuna.create_study(**own, direction="maximize" if highest else "minimize")
        trials = study.get_trials(deepcopy=False)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{path} cannot be read as a study ({type(error).__name__}: {error}). Was it edited? Start a new sweep."
        ) from error
    for trial in trials:
        for name, distribution in trial.distributions.items():
            if space.distributions.get(name) != distribution:
                raise UserError(
                    f"{path}: trial {trial.number} took {name} from {distribution}, and sweep.space has "
                    f"{space.distributions.get(name, 'no such key')}. Start a new sweep for another space."
                )
    return study


def num_trials(cfg: DictConfig, space: Space) -> int:
    """How many trials there will be.

    Raises:
        UserError: every combination is asked for, of a space that has no end.
    """
    asked = None if cfg.sweep.trials is None else int(cfg.sweep.trials)
    if isinstance(_sampler(cfg)(seed=0), BruteForceSampler):
        endless = [key for key, parameter in space.parameters.items() if parameter.size() is None]
        if endless:
            raise UserError(
                f"sweep/sampler=grid tries every combination, and {', '.join(endless)} has no end of values. Give a "
                "list or a step, or take sweep/sampler=tpe."
            )
        size = space.size()
        assert size is not None
        return size if asked is None else min(asked, size)
    if asked is None:
        raise UserError("sweep.trials is not set. Expected a number; null goes with sweep/sampler=grid only.")
    return asked


def summary(study: Study, score: str, total: int) -> Sweep:
    """The study's trials as plain values; `score` is what its values are called, `total` how many there will be."""
    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    trials = study.get_trials(deepcopy=False)
    rows = [
        TrialRow(
            number=trial.number,
            state=states.get(trial.state, "unfinished"),
            value=trial.value if trial.state in states else None,
            seconds=trial.user_attrs.get("seconds"),
            params=dict(trial.params),
            curve=dict(trial.intermediate_values),
            error=trial.user_attrs.get("error"),
        )
        for trial in trials
    ]
    distributions = {key: described for trial in trials for key, described in trial.distributions.items()}
    logarithmic = [key for key, described in distributions.items() if getattr(described, "log", False)]
    direction = "max" if study.direction == optuna.study.StudyDirection.MAXIMIZE else "min"
    sampler = study.sampler.name if isinstance(study.sampler, SeededByTrial) else type(study.sampler).__name__
    return Sweep(score, direction, total, f"{sampler}, {type(study.pruner).__name__}", rows, logarithmic)


def importances(study: Study) -> dict[str, float]:
    """Each key's share in reaching good scores, the largest first (PED-ANOVA); empty where that cannot be said."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 4 or len(complete[0].params) < 2:
        return {}
    try:
        found = optuna.importance.get_param_importances(study)
    except (ValueError, RuntimeError):  # scores that are all the same
        return {}
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


def _sampler(cfg: DictConfig) -> MakeSampler:
    make: MakeSampler = instantiate(cfg.sweep.sampler)
    try:
        made = make(seed=0)
    except (TypeError, ValueError) as error:
        raise UserError(f"sweep.sampler cannot be made: {error}") from error
    if not isinstance(made, BaseSampler):
        raise UserError(f"sweep.sampler is a {type(made).__name__}; expected a sampler of Optuna's.")
    return make


def _made(cfg: DictConfig, key: str, kind: type) -> Any:
    made = instantiate(cfg.sweep[key])
    if not isinstance(made, kind):
        raise UserError(f"sweep.{key} is a {type(made).__name__}; expected a {key} of Optuna's.")
    return made


def _cut_torn_line(path: Path) -> None:
    """Drop a last line that has no end: its process was killed while writing it."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
