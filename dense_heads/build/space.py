"""The space of a sweep: which config values, what each may be, and the override that sets it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from dense_heads.build.config import composed, plain
from dense_heads.build.values import refuse_bad_values
from dense_heads.errors import UserError, unknown_name
from dense_heads.recompose import key_of

# Of the command or of the measure: a trial with another one could not stand beside the others.
_NOT_SWEPT = ("mode", "model", "resume", "input", "output", "output_dir", "run_dir", "launcher", "sweep", "hydra",
              "logger", "debug", "task", "task.metrics", "task.protocol.select", "trainer.devices")  # fmt: skip
_RANGE = ("low", "high", "log", "step")


@dataclass(frozen=True)
class Parameter:
    """One config key, and what it may be."""

    key: str  # as typed
    distribution: BaseDistribution
    choices: tuple[Any, ...] = ()  # of a list: its values, in the order of the distribution's names for them

    def override(self, suggested: Any) -> str:
        """What a person would type for a value that the study suggests."""
        if isinstance(self.distribution, CategoricalDistribution):
            suggested = self.choices[self.distribution.choices.index(suggested)]
        return f"{self.key}={_typed(suggested)}"

    def probes(self) -> list[str]:
        """Overrides to compose before the first trial: each choice, or both ends."""
        ends = self.distribution.choices if self.choices else (self.distribution.low, self.distribution.high)  # type: ignore[attr-defined]
        return [self.override(end) for end in ends]

    def size(self) -> int | None:
        """How many values there are; None for a continuum."""
        if self.choices:
            return len(self.choices)
        low, high, step = (getattr(self.distribution, name) for name in ("low", "high", "step"))
        return None if step is None else math.floor((high - low) / step) + 1


@dataclass(frozen=True)
class Space:
    """All parameters of a sweep, by key."""

    parameters: Mapping[str, Parameter]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """As a study takes them."""
        return {key: parameter.distribution for key, parameter in self.parameters.items()}

    def suggest(self, trial: Trial) -> None:
        """Let a trial take a value for each key; what it has taken before stays."""
        for key, parameter in self.parameters.items():
            described = parameter.distribution
            if isinstance(described, CategoricalDistribution):
                trial.suggest_categorical(key, described.choices)
            elif isinstance(described, IntDistribution):
                trial.suggest_int(key, described.low, described.high, step=described.step, log=described.log)
            elif isinstance(described, FloatDistribution):
                trial.suggest_float(key, described.low, described.high, step=described.step, log=described.log)

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """The overrides of a trial."""
        return [parameter.override(params[key]) for key, parameter in self.parameters.items()]

    def size(self) -> int | None:
        """How many combinations there are; None for infinitely many."""
        sizes = [parameter.size() for parameter in self.parameters.values()]
        return math.prod(size for size in sizes if size is not None) if None not in sizes else None


def read_space(cfg: DictConfig) -> Space:
    """The space that `sweep.space` describes.

    Raises:
        UserError: there is none, a key cannot be swept, or a description makes no sense.
    """
    if not cfg.sweep.space or not OmegaConf.is_dict(cfg.sweep.space):
        raise UserError(
            f"sweep.space is {cfg.sweep.space}. Say what to search, such as "
            "'sweep.space={optim.lr: {low: 1e-4, high: 1e-1, log: true}, head: [linear, linear4]}'."
        )
    described = plain(cfg.sweep.space)
    for key in described:
        name = key_of(key)
        if name in _NOT_SWEPT or name.startswith(("hydra", "sweep", "logger.", "task.metrics.")):
            raise UserError(
                f"sweep.space: {key} cannot be swept: trials are compared by one score of one task. "
                "For separate runs there is -m KEY=A,B."
            )
    return Space({key: _parameter(key, spec) for key, spec in described.items()})


def _parameter(key: str, spec: Any) -> Parameter:
    if isinstance(spec, list) and spec:
        names = [choice if _is_scalar(choice) else json.dumps(choice) for choice in spec]
        if len({repr(name) for name in names}) < len(names):
            raise UserError(f"sweep.space: {key} names a value twice: {spec}.")
        return Parameter(key, CategoricalDistribution(names), tuple(spec))
    if not isinstance(spec, dict) or not {"low", "high"} <= spec.keys():
        raise UserError(f"sweep.space: {key} is {spec!r}; expected a list of values, or {{low: A, high: B}}.")
    for name, value in spec.items():
        if name not in _RANGE:
            raise unknown_name(f"word in the range of {key}:", str(name), _RANGE)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (isinstance(value, bool) if name == "log" else number):
            raise UserError(
                f"sweep.space: {key} has {name}={value!r}; expected {'true or false' if name == 'log' else 'a number'}."
            )
    if spec["low"] > spec["high"]:
        raise UserError(f"sweep.space: {key} has low={spec['low']} above high={spec['high']}.")
    whole = all(isinstance(spec.get(name, 1), int) for name in ("low", "high", "step"))
    try:
        return Parameter(key, IntDistribution(**spec) if whole else FloatDistribution(**spec))
    except ValueError as error:  # a logarithm of nothing, a logarithm in steps
        raise UserError(f"sweep.space: {key}: {error}") from error


def check_space(space: Space, base: Sequence[str]) -> None:
    """Compose each parameter's values on their own, so that a mistake shows before the first trial.

    Raises:
        UserError: a value that is refused on the command line too, or one that changes what is measured.
        HydraException: a key or an option that there is not (the command says it in its own words).
    """
    kept = ("task.name", "task.metrics.primary", "task.metrics.direction")
    expected: list[Any] | None = None
    for parameter in space.parameters.values():
        for probe in parameter.probes():
            cfg = composed([*base, probe])
            refuse_bad_values(cfg)
            found = [OmegaConf.select(cfg, key) for key in kept]
            expected = expected or found
            if found != expected:
                raise UserError(f"sweep.space: {probe} changes what is measured: {kept} from {expected} to {found}.")


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _typed(value: Any) -> str:
    """A value in the grammar of overrides."""
    if isinstance(value, list):
        return "[" + ",".join(map(_typed, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_typed(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z_./][\w./-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
            return value
        escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)  # the grammar knows backslashes before a quote only
        return "'" + escaped + "\\" * (len(value) - len(value.rstrip("\\"))) + "'"
    return json.dumps(value)  # null, true, false, numbers
