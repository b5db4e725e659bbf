"""What was measured, as a table on the terminal, `benchmark.json`, `benchmark.md` and `benchmark.png`."""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from dense_heads.benchmark.protocol import Contender, Measured
from dense_heads.modes.folder import make_unique, time_stamp
from dense_heads.modes.outcome import commit, hardware
from dense_heads.ops.files import write_atomically
from dense_heads.report.curves import COLOURS, INK, PALE, RULE, figure_bytes

_PACKAGES = ("dense-heads", "torch", "transformers", "timm", "lightning")
_COLUMNS = ("", "median s", "least s", "times ours", "GFLOP/s", "share of peak", "peak MB")


def machine() -> dict[str, Any]:
    """What the numbers were measured on; `load` is of the minute before, other programs' included."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "hardware": hardware(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": found,
        "commit": commit(),
        "load": round(os.getloadavg()[0], 2),
    }


def write(output: Path, part: str, typed: Sequence[str], on: dict[str, Any], results: Sequence[Measured]) -> Path:
    """Write a new folder `<part>-<time>` below `output`, and return it. `on` is `machine()` before the measurement."""
    folder = make_unique(output, f"{part}-{time_stamp()}")
    content = {
        "command": ["python", "scripts/benchmark.py", *typed],
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": on,
        "cases": [_plain(measured) for measured in results],
    }
    write_atomically(folder / "benchmark.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "benchmark.md", _markdown(on, results))
    write_atomically(folder / "benchmark.png", figure_bytes(draw(results), ".png"))
    return folder


def print_results(results: Sequence[Measured]) -> None:
    """One table for each case."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for measured in results:
        table = Table(title=measured.case.title, title_justify="left", caption=verdict(measured))
        for column in _COLUMNS:
            table.add_column(column, justify="left" if not column else "right")
        for row in _rows(measured):
            table.add_row(*row)
        console.print(table)


def verdict(measured: Measured) -> str:
    """Against the fastest of the others, in a sentence."""
    other = measured.fastest_other()
    if other is None:
        return ""
    ratio, goal = measured.ratio(other), measured.case.goal
    said = f"{ratio:.2f} times as fast as {other}, the fastest other one"
    return said if goal is None else f"{said}; the goal is {goal:g}: {'reached' if ratio >= goal else 'missed'}"


def draw(results: Sequence[Measured]) -> Figure:
    """A row of bars for each case: median seconds, the range of the repetitions as a line."""
    bars = [len(measured.case.contenders) for measured in results]
    figure = Figure(figsize=(7.5, 0.9 * len(results) + 0.3 * sum(bars)), layout="constrained")
    every = figure.subplots(len(results), 1, squeeze=False, gridspec_kw={"height_ratios": bars})[:, 0]
    for axes, measured in zip(every, results, strict=True):
        names = [contender.name for contender in measured.case.contenders if not contender.reference]
        for place, name in enumerate(names):
            times = [sample.seconds for sample in measured.samples[name]]
            colour = COLOURS[0] if place == 0 else "#c3c7cc"
            axes.barh(place, measured.seconds(name), color=colour, height=0.7)
            axes.plot([min(times), max(times)], [place, place], color=INK, linewidth=0.8)
            said = f"{measured.seconds(name):.3g} s" + (f", {measured.ratio(name):.2f} x" if place else "")
            axes.annotate(said, (max(times), place), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=9, color=INK)
        axes.invert_yaxis()
        axes.set_title(measured.case.title, fontsize=10, loc="left", color=INK)
        axes.set_xlim(0, 1.25 * axes.get_xlim()[1])
        axes.tick_params(colors=PALE, labelsize=8, length=0)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(RULE)
    every[-1].set_xlabel("seconds (bar: median, line: all repetitions)", fontsize=9, color=PALE)
    return figure


def _rows(measured: Measured) -> Iterator[list[str]]:
    for contender in measured.case.contenders:
        seconds, peak = measured.seconds(contender.name), measured.peak_bytes(contender.name)
        share = measured.share(contender)
        yield [
            contender.name,
            f"{seconds:.3f}",
            f"{min(sample.seconds for sample in measured.samples[contender.name]):.3f}",
            "" if contender.reference else f"{measured.ratio(contender.name):.2f}",
            f"{contender.work / seconds / 1e9:.0f}" if contender.work else "",
            f"{share:.0%}" if share is not None else "",
            f"{peak / 2**20:.0f}" if peak is not None else "",
        ]


def _markdown(on: dict[str, Any], results: Sequence[Measured]) -> str:
    lines = [f"{on['hardware']}, torch {on['versions']['torch']}, load before {on['load']}", ""]
    for measured in results:
        lines += [f"**{measured.case.title}**", "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in _rows(measured)]
        lines += ["", verdict(measured), ""]
    return "\n".join(lines)


def _plain(measured: Measured) -> dict[str, Any]:
    return {
        "title": measured.case.title,
        "goal": measured.case.goal,
        "verdict": verdict(measured),
        "contenders": [_contender(measured, contender) for contender in measured.case.contenders],
    }


def _contender(measured: Measured, contender: Contender) -> dict[str, Any]:
    return {
        "name": contender.name,
        "median_seconds": measured.seconds(contender.name),
        "ratio": None if contender.reference else measured.ratio(contender.name),
        "share_of_peak": measured.share(contender),
        "operations": contender.work,
        "peak_bytes": measured.peak_bytes(contender.name),
        "seconds": [sample.seconds for sample in measured.samples[contender.name]],
    }
