"""What passes before there is anything to see: the help, a mistake, a shortest run; a sweep's trials against runs."""

import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from dense_heads.benchmark.protocol import Case, Contender, Sample, command
from dense_heads.errors import UserError

SHORTEST = ["task=nuclei", "debug=fast", "task.baseline=null", "data.image_size=56", "head=linear"]
# What such a run stands on, whoever writes it.
LIBRARIES = "import albumentations, hydra, lightning.pytorch, matplotlib.figure, torch, torchmetrics, torchvision"


def add_arguments(parser: ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--trials", type=int, default=8, help="of the sweep (default %(default)s)")


def cases(arguments: Namespace, scratch: Path) -> Iterator[Case]:
    """Each command in a process of its own, with a bare interpreter or the libraries alone beside it."""
    ours = [sys.executable, "-m", "dense_heads"]
    libraries = Contender(
        "importing the libraries alone", command([sys.executable, "-c", LIBRARIES], scratch / "libraries")
    )
    nothing = Contender("python -c pass", command([sys.executable, "-c", "pass"], scratch / "python"), reference=True)
    mistake = [sys.executable, "-c", _EXPECTING_2, *ours, "task=nuclie"]
    yield Case("--help", [Contender("dense_heads", command([*ours, "--help"], scratch / "help")), libraries, nothing])
    yield Case(
        "a mistyped name, refused",
        [Contender("dense_heads", command(mistake, scratch / "mistake")), libraries, nothing],
    )
    run = _anew(command([*ours, *SHORTEST, "run_dir=run"], scratch / "run"), scratch / "run" / "run")
    yield Case("two steps on real images, report included", [Contender("dense_heads", run), libraries])
    if arguments.trials < 1:
        raise UserError(f"--trials {arguments.trials}: expected at least 1.")
    search = ["mode=sweep", "sweep=lr", "sweep/pruner=none", f"sweep.trials={arguments.trials}"]
    sweep = _anew(command([*ours, *search, *SHORTEST, "run_dir=run"], scratch / "sweep"), scratch / "sweep" / "run")
    yield Case(
        f"{arguments.trials} learning rates tried, two steps each",
        [
            Contender("one sweep", sweep),
            Contender(f"{arguments.trials} runs (one, times {arguments.trials})", _times(run, arguments.trials)),
        ],
    )


_EXPECTING_2 = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]) != 2)"


def _anew(run: Callable[[], Sample], folder: Path) -> Callable[[], Sample]:
    """A repetition that finds no run of the one before."""

    def repetition() -> Sample:
        shutil.rmtree(folder, ignore_errors=True)
        return run()

    return repetition


def _times(run: Callable[[], Sample], num: int) -> Callable[[], Sample]:
    def many() -> Sample:
        one = run()
        return Sample(num * one.seconds, one.peak_bytes)

    return many
