"""How everything is timed: contenders take turns, medians and ratios within a turn are kept, and peak memory.

Turns, because a machine that others use is not equally fast for a minute: what runs in the same turn meets the same
load, so ratios hold where times do not.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress

from dense_heads.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One repetition."""

    seconds: float
    peak_bytes: int | None = None  # of memory resident at once; None where it was not measured


@dataclass(frozen=True)
class Contender:
    """Something to measure."""

    name: str
    run: Callable[[], Sample]  # one repetition
    work: float | None = None  # floating-point operations of one repetition
    reference: bool = False  # a limit of the machine (a matrix product): not compared with, only related to


@dataclass(frozen=True)
class Case:
    """Contenders that do the same; the first is this project's."""

    title: str
    contenders: Sequence[Contender]
    goal: float | None = None  # how many times faster than the fastest other one it is to be


@dataclass
class Measured:
    """A case and its repetitions: for each contender one sample for each turn."""

    case: Case
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def seconds(self, name: str) -> float:
        """Median."""
        return statistics.median(sample.seconds for sample in self.samples[name])

    def peak_bytes(self, name: str) -> int | None:
        """The largest; None where it was not measured."""
        peaks = [sample.peak_bytes for sample in self.samples[name] if sample.peak_bytes is not None]
        return max(peaks) if peaks else None

    def ratio(self, name: str) -> float:
        """How many times longer `name` takes than the first contender: the median over turns."""
        ours = self.samples[self.case.contenders[0].name]
        return statistics.median(
            other.seconds / own.seconds for other, own in zip(self.samples[name], ours, strict=True)
        )

    def share(self, contender: Contender) -> float | None:
        """Operations per second as a share of the reference's: the median over turns."""
        limit = next((other for other in self.case.contenders if other.reference and other.work), None)
        if limit is None or limit.work is None or contender.work is None or contender.reference:
            return None
        pairs = zip(self.samples[limit.name], self.samples[contender.name], strict=True)
        return statistics.median(contender.work / own.seconds * (top.seconds / limit.work) for top, own in pairs)

    def fastest_other(self) -> str | None:
        """The contender that this project's is held against; None where it is alone."""
        others = [other.name for other in self.case.contenders[1:] if not other.reference]
        return min(others, key=self.ratio) if others else None


def measure(cases: Iterable[Case], repeats: int, warmups: int) -> list[Measured]:
    """Run every case: `warmups` turns that do not count, then `repeats` that do.

    Each turn starts with another contender, so that none always follows the same one.

    Raises:
        UserError: fewer than one repeat, or a negative number of warm-ups.
    """
    if repeats < 1 or warmups < 0:
        raise UserError(f"--repeats {repeats} --warmups {warmups}: expected at least 1 and at least 0.")
    results = []
    with Progress(transient=True) as progress:
        for case in cases:
            task = progress.add_task("", total=(warmups + repeats) * len(case.contenders))
            names = [contender.name for contender in case.contenders]
            assert len(set(names)) == len(names), names
            measured = Measured(case, {name: [] for name in names})
            for turn in range(-warmups, repeats):
                start = turn % len(names)
                for contender in [*case.contenders[start:], *case.contenders[:start]]:
                    progress.update(task, description=f"{case.title}: {contender.name}")
                    sample = contender.run()
                    progress.advance(task)
                    if turn >= 0:
                        measured.samples[contender.name].append(sample)
            progress.remove_task(task)
            results.append(measured)
    return results


def timed(function: Callable[[], object]) -> Callable[[], Sample]:
    """A repetition that calls `function` in this process."""

    def run() -> Sample:
        started = time.perf_counter()
        function()
        return Sample(time.perf_counter() - started)

    return run


def command(
    argv: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    seconds: Callable[[], float] | None = None,
) -> Callable[[], Sample]:
    """A repetition that runs a command in a process of its own, with that process's peak memory.

    Args:
        argv: the command.
        folder: where it runs; its output goes to `folder/output.txt`.
        environment: variables on top of this process's.
        seconds: what to take as its time, asked for after it ended (such as a number that it wrote); None takes the
            process's whole life.

    Raises:
        UserError: the command fails; says the end of its output.
    """

    def run() -> Sample:
        folder.mkdir(parents=True, exist_ok=True)
        log, usage = folder / "output.txt", folder / "usage.txt"
        with log.open("wb") as output:
            process = subprocess.run(
                [sys.executable, "-c", _LAUNCHER, str(usage.resolve()), *argv],
                cwd=folder,
                env={**os.environ, **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if process.returncode != 0:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise UserError(f"{' '.join(argv)} ended with code {process.returncode}:\n{end}")
        elapsed, peak = usage.read_text().split()
        return Sample(seconds() if seconds else float(elapsed), int(peak) * _RSS_UNIT)

    return run


# A small process between: a child's peak starts at what its parent held when it was started, gigabytes here.
_LAUNCHER = """
import resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.call(sys.argv[2:])
elapsed = time.perf_counter() - started
open(sys.argv[1], "w").write(f"{elapsed} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}")
sys.exit(code if 0 <= code < 256 else 1)
"""
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
