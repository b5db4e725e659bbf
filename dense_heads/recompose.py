"""Runs are recomposed: a run keeps what was typed for it, and a later command is typed after that.

`mode=evaluate model=RUN data.root=D` becomes the run's own overrides with `mode=... model=... data.root=...` behind
them, so that Hydra itself composes the run's choices with the new ones on top (a later duplicate wins).
"""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dense_heads.errors import UserError
from dense_heads.ops.files import write_atomically
from dense_heads.paths import CONF_DIR

OVERRIDES_FILE = "overrides.yaml"
# Of one command, not of the run: never kept, or meaningless when the run is composed again.
_PER_COMMAND = (
    "mode",
    "model",
    "resume",
    "input",
    "output",
    "output_ids",
    "output_also",
    "focal_px",
    "output_dir",
    "run_dir",
    "launcher",
)
_PATHS = ("data.root=", "data.unlabeled=", "backbone.weights=", "head.weights=", "distill=")

_OPTIONS_WITH_VALUE = (
    "--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p",
)  # fmt: skip


def recompose(arguments: Sequence[str]) -> list[str]:
    """The command line with the overrides of the run that `model=` or `resume=` names put in front.

    Raises:
        UserError: no such run, or its file of overrides is unreadable or tries to choose what code runs.
    """
    run = named_run(arguments)
    kept = read_overrides(run) if run else []
    start = _first_override(arguments)
    # A process that a rank started finds them on its command line already.
    return [*arguments[:start], *(override for override in kept if override not in arguments), *arguments[start:]]


def _first_override(arguments: Sequence[str]) -> int:
    """Where overrides begin: the command line's parser wants all of them on one side of options such as `-m`."""
    for index, argument in enumerate(arguments):
        is_value = index > 0 and arguments[index - 1] in _OPTIONS_WITH_VALUE
        if not (is_value or argument.startswith("-")):
            return index
    return len(arguments)


def named_run(arguments: Sequence[str]) -> Path | None:
    """The run folder that the command line names with `model=` or `resume=`, if any."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("model", "resume") and value not in ("", "null", "auto"):
            folder = Path(value.strip("'\""))
            if not (folder / OVERRIDES_FILE).is_file():
                raise UserError(
                    f"{key}={value}: no run is there ({folder / OVERRIDES_FILE} does not exist). "
                    "Name a folder that a run wrote, outputs/<task>/<backbone>-<head>/<time>."
                )
            return folder
    return None


def read_overrides(run: Path) -> list[str]:
    """The overrides that a run folder keeps, checked: a folder from a stranger never decides what code runs."""
    path = run / OVERRIDES_FILE
    try:
        overrides = yaml.safe_load(path.read_text(encoding="utf-8")) or []
        if not isinstance(overrides, list) or not all(isinstance(item, str) for item in overrides):
            raise ValueError("expected a list of `key=value` strings")
        parsed = OverridesParser.create().parse_overrides(overrides)
    except (OSError, ValueError, yaml.YAMLError, HydraException) as error:
        raise UserError(
            f"{path} is not readable as a list of overrides: {error}. Was the run folder edited?"
        ) from error
    for override in parsed:
        key, text = override.key_or_group, override.input_line or ""
        foreign = key == "hydra" or key.startswith(("hydra.", "hydra/")) or override.package is not None
        # Hydra takes the backslash of `$\{` away, and an option's name with a path loads a file from anywhere.
        runs_code = "_target_" in text or re.search(r"\$\\*\{", text) or _is_path_of_option(key, text)
        if foreign or runs_code or key in _PER_COMMAND:
            raise UserError(
                f"{path} holds {text!r}: a run folder may not set Hydra's own keys, a `_target_`, an interpolation, an "
                "option outside conf/ and tasks/, or what belongs to one command (mode, output, ...). "
                "If you trust the folder, remove the line and type it on the command line."
            )
    return overrides


def _is_path_of_option(key: str, text: str) -> bool:
    is_group = (CONF_DIR / key).is_dir() or "/" in key
    return is_group and re.fullmatch(r"[\w\s\[\],'\"-]*", text.partition("=")[2]) is None


def key_of(override: str) -> str:
    """What an override is about: its key, without a prefix."""
    return override.partition("=")[0].lstrip("+~")


def own_overrides(overrides: Sequence[str]) -> list[str]:
    """What was typed for a run, less what belongs to one command only; paths are made absolute."""
    kept = []
    for override in overrides:
        value = override.partition("=")[2]
        if key_of(override) in _PER_COMMAND or override == "debug=traceback":
            continue
        if override.startswith(_PATHS) and value and Path(value).exists():
            override = f"{key_of(override)}={_quoted(str(Path(value).resolve()))}"
        kept.append(override)
    return kept


def keep_overrides(run: Path, overrides: Sequence[str]) -> list[str]:
    """Write a run's own overrides into its folder."""
    kept = own_overrides(overrides)
    write_atomically(run / OVERRIDES_FILE, yaml.safe_dump(kept, allow_unicode=True))
    return kept


def _quoted(path: str) -> str:
    """A path as the override grammar reads it: `=`, `,`, braces and the like only within quotes."""
    return path if re.fullmatch(r"[\w./-]+", path) else "'" + path.replace("'", "\\'") + "'"
