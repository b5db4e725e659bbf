"""What stands between the shell and Hydra: help, a run's own overrides, and errors a person can read.

Nothing here imports torch: `--help` and a mistyped name answer at once.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dense_heads import recompose as _recompose
from dense_heads.errors import UserError, unknown_name, user_error_in
from dense_heads.modes import MODES
from dense_heads.paths import CONF_DIR, TASKS_DIR
from dense_heads.ray_launcher import register_launcher
from dense_heads.registry import register_tasks

GROUPS = (
    "task",
    "backbone",
    "head",
    "optim",
    "trainer",
    "logger",
    "callbacks",
    "cache",
    "sweep",
    "launcher",
    "debug",
    "experiment",
)
_EXTRAS = {  # what is typed -> the package that it needs, and the extra that brings it
    "mode=sweep": ("optuna", "sweep"),
    "launcher=slurm": ("submitit", "slurm"),
    "launcher=ray": ("ray", "ray"),
}
recompose = _recompose.recompose


def options(group: str) -> list[str]:
    """The names that `group=` takes."""
    folder = "backbone" if group == "teacher" else group  # registry.py: the same options
    names = {path.stem for path in (CONF_DIR / folder).glob("*.yaml")}
    if group == "task":
        names |= {path.parent.name for path in TASKS_DIR.glob("*/task.yaml")}
    return sorted(name for name in names if not name.startswith("_"))


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the user asked for our own help (Hydra's stands under --hydra-help)."""
    return "--help" in arguments or "-h" in arguments


def print_help() -> int:
    """Tasks, backbones, heads and modes on one screen; a reader that has seen enough (`| head`) ends it quietly."""
    try:
        _print_help()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
    return 0


def _print_help() -> None:
    families = {path.stem for path in (CONF_DIR / "task").glob("*.yaml")}
    rows = {group: options(group) for group in GROUPS}
    print(f"dense_heads {version('dense-heads')}: dense heads on a frozen DINOv2\n")
    print("  python -m dense_heads [mode=fit] task=... backbone=... head=... [group.key=value ...]\n")
    print("Modes")
    for mode, purpose in MODES.items():
        print(f"  {mode:<12}{purpose}")
    print("\nTasks")
    width = max(len(name) for name in rows["task"]) + 2
    for name in rows.pop("task"):
        if name in families:
            needed = {"segmentation": " task.num_classes=K", "depth": " data.depth_scale=1000"}.get(name, "")
            print(f"  {name:<{width}}(family) your own data: task={name} data.root=FOLDER{needed}")
        else:
            print(f"  {name:<{width}}{OmegaConf.load(TASKS_DIR / name / 'task.yaml').title}")
    for group, names in rows.items():
        if names:
            print(f"\n{group.capitalize()}\n  {'  '.join(names)}")
    print(
        "\nOften set: data.root data.batch_size data.num_workers trainer.max_steps optim.lr seed"
        " backbone.weights head.weights"
    )
    print(
        "The whole config of a run, without running it: --cfg job. Several runs: -m key=a,b."
        " Tracebacks: debug=traceback."
    )


def hand_to_hydra(arguments: list[str], conf_dir: Path) -> None:
    """Compose the run with Hydra and start it; raises what the run raises."""
    _refuse_missing_extras(arguments)
    register_tasks()
    with _without_current_folder():
        register_launcher()  # plugins are looked for once: a `hydra_plugins` of the current folder is not ours to run
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print and exit by itself: we want the exception
    failed: list[Exception] = []

    @hydra.main(config_path=str(conf_dir), config_name="config", version_base="1.3")
    def start(cfg: DictConfig) -> object:
        from dense_heads.run import run  # imports torch: only now

        try:
            return run(cfg)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # Hydra says which job failed and goes on with the others
            failed.append(error)
            return None

    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        start()
    finally:
        sys.argv = before
    if failed:
        raise failed[0]


def _refuse_missing_extras(arguments: Sequence[str]) -> None:
    """Said before Hydra composes: it would take a launcher that is not there for a single run."""
    for option, (package, extra) in _EXTRAS.items():
        if option in arguments and find_spec(package) is None:
            raise UserError(f"{option} needs {package}, which is not installed: pip install 'dense-heads[{extra}]'.")


@contextmanager
def _without_current_folder() -> Iterator[None]:
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if entry and Path(entry).resolve() != Path.cwd()]
    try:
        yield
    finally:
        sys.path[:] = before


@dataclass
class Outcome:
    """How the command ended."""

    code: int = 0


@contextmanager
def user_errors(arguments: Sequence[str]) -> Iterator[Outcome]:
    """Turns a user's mistake into one message on stderr and exit code 2; `debug=traceback` lets it through."""
    outcome = Outcome()
    try:
        yield outcome
    except Exception as error:
        user_error = user_error_in(error) or _translated(error)
        if user_error is None or "debug=traceback" in arguments:
            raise
        print(f"dense_heads: {user_error}", file=sys.stderr)
        outcome.code = 2


def _translated(error: BaseException | None) -> UserError | None:
    """Hydra's and OmegaConf's own composition errors in our words; None for an exception that is a bug."""
    while error is not None:
        text = " ".join(str(error).split())
        if found := re.search(
            r"(?:Could not find|Could not load|In '[^']*': Could not find) '([\w@./-]+)/([^/']*)'", text
        ):
            group = found[1].split("@")[0]
            group = group if (CONF_DIR / group).is_dir() else group.split("/")[-1]
            return unknown_name(group, found[2], options(group))
        if isinstance(error, OmegaConfBaseException) and (found := re.search(r"Key '([^']+)' is not in struct", text)):
            known = list(error.parent_node or {})
            where = (error.full_key or "").rpartition(".")[0] or "the config"
            return unknown_name(f"key in {where}:", found[1], [str(key) for key in known])
        if found := re.search(r"Missing mandatory value: ([\w.]+)", text):
            return UserError(f"{found[1]} is not set and has no default. Set it: {found[1]}=VALUE.")
        if text.startswith("Config group override must be a string or a list"):
            return UserError("A group cannot be null. Choose one of its options (--help), or remove it: '~GROUP'.")
        if isinstance(error, OSError) and error.filename:
            what = f"{error.filename}: {error.strerror or type(error).__name__}"
            return UserError(f"{what}. Expected a place that can be read or written; check the path and the rights.")
        if isinstance(error, YAMLError):
            return UserError(f"Not readable as YAML: {text}. Correct the file.")
        if isinstance(error, OverrideParseException):
            reason = str(error).splitlines()[0]
            hint = "Expected key=value; values with braces, commas or spaces need quotes: \"key='value'\"."
            return UserError(f"Cannot read {error.override!r} ({reason}). {hint}")
        if isinstance(error, HydraException | OmegaConfBaseException):
            if error.__cause__ is not None and (deeper := _translated(error.__cause__)):
                return deeper
            return UserError(f"{text} (--help lists what there is, --cfg job prints the whole config.)")
        error = error.__cause__
    return None
