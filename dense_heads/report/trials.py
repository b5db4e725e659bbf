"""The trials of a sweep as rows: two files, a line for each as it ends, and a table in the terminal."""

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dense_heads.errors import UserError
from dense_heads.ops.files import write_atomically
from dense_heads.report.fragments import duration
from dense_heads.report.tables import format_metric, metric_label, plain

SWEEP_FILE, TRIALS_FILE = "sweep.json", "trials.csv"
STATES = ("complete", "pruned", "failed", "unfinished")


@dataclass(frozen=True)
class TrialRow:
    """One trial."""

    number: int
    state: str  # of STATES
    value: float | None  # of the score; of a pruned trial at its last step
    seconds: float | None  # without what a killed process spent
    params: dict[str, Any]
    curve: dict[int, float] = field(default_factory=dict)  # step -> score
    error: str | None = None


@dataclass(frozen=True)
class Sweep:
    """All trials of a sweep, and what they are compared by."""

    score: str  # val/miou
    direction: str  # max | min
    total: int
    method: str  # sampler and pruner
    rows: list[TrialRow]
    logarithmic: list[str] = field(default_factory=list)  # keys that are searched in their logarithm
    importances: dict[str, float] = field(default_factory=dict)

    def of(self, *states: str) -> list[TrialRow]:
        """The trials in one of these states, by number."""
        return [row for row in self.rows if row.state in states]

    def best_first(self) -> list[TrialRow]:
        """Complete ones from best to worst, then pruned, failed and unfinished ones."""

        def key(row: TrialRow) -> tuple[int, float, int]:
            value = row.value or 0.0
            return STATES.index(row.state), -value if self.direction == "max" else value, row.number

        return sorted(self.rows, key=key)


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """`sweep.json` with all there is, `trials.csv` with a line for each trial."""
    write_atomically(folder / SWEEP_FILE, json.dumps(asdict(sweep), indent=1, ensure_ascii=False) + "\n")
    keys = list(dict.fromkeys(key for row in sweep.rows for key in row.params))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["trial", "state", sweep.score, "steps", "seconds", *keys, "error"])
    for row in sweep.rows:
        last = max(row.curve, default=None)
        settings = [row.params.get(key) for key in keys]
        lines.writerow([row.number, row.state, row.value, last, row.seconds, *settings, row.error])
    write_atomically(folder / TRIALS_FILE, text.getvalue())


def read_sweep(path: Path) -> Sweep:
    """Read `sweep.json`.

    Raises:
        UserError: it is not what `write_sweep` wrote.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            TrialRow(**{**row, "curve": {int(step): float(value) for step, value in row["curve"].items()}})
            for row in content.pop("rows")
        ]
        sweep = Sweep(**content, rows=rows)
        numbers = [value for row in rows for value in (row.value, row.seconds) if value is not None]
        if not all(isinstance(value, int | float) for value in (*numbers, *sweep.importances.values())):
            raise ValueError("a score, time or importance is no number")
        if not all(row.state in STATES for row in rows):
            raise ValueError("a trial is in no known state")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as the trials of a sweep: {error}. Remove it to report without."
        ) from error
    return sweep


def settings_text(params: dict[str, Any]) -> str:
    """`optim.lr=0.0032 head=linear4`."""
    return " ".join(f"{key}={_short(value)}" for key, value in params.items())


def progress_line(sweep: Sweep, number: int, workers: int) -> str:
    """What is said when a trial has ended: what it was and scored, the best so far, and how long the rest will take."""
    row = sweep.rows[number]
    ended = sweep.of("complete", "pruned", "failed")
    score = format_metric(sweep.score, row.value)
    what = {
        "complete": f"{sweep.score} {score}",
        "pruned": f"pruned at step {max(row.curve, default=0)} with {score}",
        "failed": f"failed: {(row.error or '').splitlines()[0] if row.error else ''}",
    }[row.state]
    parts = [f"{what}  ({settings_text(row.params)})"]
    if complete := sweep.of("complete"):
        best = sweep.best_first()[0]
        parts.append(f"best {format_metric(sweep.score, best.value)}, trial {best.number}" if len(complete) > 1 else "")
    seconds = [one.seconds for one in ended if one.seconds is not None]
    left = sweep.total - len(ended)
    if seconds and left:
        parts.append(f"about {duration(sum(seconds) / len(seconds) * left / workers)} left")
    return f"[{len(ended)}/{sweep.total}] trial {number}: " + "; ".join(part for part in parts if part)


def print_trials(sweep: Sweep, console: Console | None = None, most: int = 10) -> None:
    """Print the best trials, and those that failed by name."""
    console = console or Console()
    table = Table(title=Text(f"{len(sweep.rows)} trials, best first"), title_justify="left")
    table.add_column("trial", justify="right")
    table.add_column(Text(metric_label(sweep.score)), justify="right")
    keys = list(dict.fromkeys(key for row in sweep.rows for key in row.params))
    for key in keys:
        table.add_column(Text(plain(key)), justify="right")
    table.add_column("")
    for place, row in enumerate(sweep.best_first()[:most]):
        cells = [Text(plain(_short(row.params.get(key, "")))) for key in keys]
        note = "" if row.state == "complete" else row.state
        table.add_row(
            str(row.number), format_metric(sweep.score, row.value), *cells, note, style="" if place else "bold"
        )
    console.print(table)
    for row in sweep.of("failed"):
        console.print(Text(plain(f"trial {row.number} failed: {row.error}")))


def counted(sweep: Sweep) -> str:
    """`5 complete, 2 pruned, 1 failed`."""
    return ", ".join(f"{len(sweep.of(state))} {state}" for state in STATES if sweep.of(state)) or "none"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
