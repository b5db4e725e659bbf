"""Runs of the real command as contenders: `experiment=bench_camvid`, each in a process of its own."""

import json
import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path

from dense_heads.benchmark.protocol import Sample, command
from dense_heads.errors import UserError

STEP_PARTS = ("train/loading", "train/forward", "train/backward", "train/optimiser")


def add_data_argument(parser: ArgumentParser) -> None:
    """Where CamVid is."""
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="CamVid, as tasks/camvid says")


def run_of(
    folder: Path, overrides: Sequence[str], seconds: Callable[[dict[str, float]], float]
) -> Callable[[], Sample]:
    """A repetition that trains in `folder`; its time is what `seconds` makes of the parts in `metrics.json`.

    Raises:
        UserError: the command fails.
    """
    run = folder / "run"
    argv = [sys.executable, "-m", "dense_heads", "experiment=bench_camvid", *overrides, f"run_dir={run.resolve()}"]

    def taken() -> float:
        found: dict[str, float] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["seconds"]
        return seconds(found)

    repetition = command(argv, folder, seconds=taken)

    def measured() -> Sample:
        shutil.rmtree(run, ignore_errors=True)
        return repetition()

    return measured


def of_steps(found: dict[str, float]) -> float:
    """The training steps alone, waiting for batches included."""
    return sum(found[part] for part in STEP_PARTS)


def camvid(folder: Path) -> Path:
    """The data's folder, absolute.

    Raises:
        UserError: it is not there.
    """
    if not (folder / "images").is_dir():
        raise UserError(f"--data {folder}: no CamVid is there (images/ is missing). tasks/camvid/README.md says how.")
    return folder.resolve()
