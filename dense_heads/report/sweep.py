"""A sweep in the report: how the score grew, what it hangs on, and every trial."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from dense_heads.report.curves import COLOURS, INK, PALE, RULE, figure_bytes
from dense_heads.report.fragments import duration, figure, section
from dense_heads.report.tables import PERCENT, escape, format_metric, metric_label
from dense_heads.report.trials import SWEEP_FILE, Sweep, TrialRow, counted, read_sweep

MAX_ROWS = 200  # of the table
MAX_PARAMETERS = 12  # that are drawn
GOOD, OTHER = COLOURS[0], "#b9bec4"


def html_sweep(run_dir: Path) -> str:
    """The sections of a sweep's folder; nothing for a single run.

    Raises:
        UserError: see `read_sweep`.
    """
    path = run_dir / SWEEP_FILE
    if not path.is_file():
        return ""
    sweep = read_sweep(path)
    figures = {"Trials in their order": draw_history(sweep)}
    if sweep.importances:
        told = f"Importance of each key (PED-ANOVA over {len(sweep.of('complete'))} trials)"
        figures[told] = draw_importances(sweep)
    keys = list(sweep.importances) or list(dict.fromkeys(key for row in sweep.rows for key in row.params))
    for key in keys[:MAX_PARAMETERS]:
        if any(key in row.params for row in sweep.of("complete", "pruned")):
            figures[key] = draw_parameter(sweep, key)
    drawn = "".join(figure(title, figure_bytes(one), "svg+xml") for title, one in figures.items())
    lead = f"<p>{escape(f'{len(sweep.rows)} of {sweep.total} trials: {counted(sweep)}. {sweep.method}.')}</p>"
    return section("Sweep", f'{lead}<div class="curves">{drawn}</div>') + "\n" + section("Trials", _table(sweep))


def draw_history(sweep: Sweep) -> Figure:
    """Each trial's score by its number, and the best so far."""
    drawn, axes = _axes(sweep)
    scored = [row for row in sweep.of("complete", "pruned") if row.value is not None]
    _dots(axes, [row.number for row in scored], scored)
    best: list[float] = []
    complete = [row for row in scored if row.state == "complete"]
    for row in complete:
        assert row.value is not None
        best.append((max if sweep.direction == "max" else min)([*best[-1:], row.value]))
    last = [*(row.number for row in complete), len(sweep.rows) - 1]
    axes.step(last, [*best, *best[-1:]] if best else [], where="post", color=GOOD, lw=1.4, label="best so far")
    for row in sweep.of("failed"):
        axes.plot(row.number, 0.02, "x", color=COLOURS[6], ms=5, transform=axes.get_xaxis_transform())
    axes.set_xlabel("trial", color=PALE, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.legend(loc="best", frameon=False, fontsize=8, labelcolor=INK)
    return drawn


def draw_importances(sweep: Sweep) -> Figure:
    """Bars, the most important key on top."""
    ordered = sorted(sweep.importances.items(), key=lambda item: item[1])[-MAX_PARAMETERS:]
    drawn = Figure(figsize=(4.3, max(1.6, 0.6 + 0.34 * len(ordered))), layout="constrained")
    axes = drawn.subplots()
    bars = axes.barh([_label(key) for key, _ in ordered], [value for _, value in ordered], color=GOOD, height=0.55)
    axes.bar_label(bars, [f"{100 * value:.0f} %" for _, value in ordered], padding=4, fontsize=8, color=PALE)
    axes.set_xlim(0, 1.15 * max(1e-9, *(value for _, value in ordered)))
    axes.set_xticks([])
    _quiet(axes)
    return drawn


def draw_parameter(sweep: Sweep, key: str) -> Figure:
    """Each trial's score by what it took for one key."""
    drawn, axes = _axes(sweep)
    rows = [row for row in sweep.of("complete", "pruned") if key in row.params and row.value is not None]
    values = [row.params[key] for row in rows]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        _dots(axes, values, rows)
        if key in sweep.logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        names = sorted({str(value) for value in values})
        _dots(axes, [names.index(str(value)) for value in values], rows)
        axes.set_xticks(range(len(names)), [_label(name)[:18] for name in names])
        axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xlabel(_label(key), color=PALE, fontsize=9)
    return drawn


def _axes(sweep: Sweep) -> tuple[Figure, Axes]:
    drawn = Figure(figsize=(4.3, 2.8), layout="constrained")
    axes = drawn.subplots()
    axes.set_ylabel(metric_label(sweep.score), color=PALE, fontsize=9)
    if sweep.score.rsplit("/", 1)[-1] in PERCENT:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.margins(y=0.08)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    _quiet(axes)
    return drawn, axes


def _quiet(axes: Axes) -> None:
    axes.tick_params(colors=PALE, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)


def _dots(axes: Axes, places: Sequence[float], rows: Sequence[TrialRow]) -> None:
    for state, colour, face in (("complete", GOOD, GOOD), ("pruned", OTHER, "none")):
        chosen = [(place, row.value) for place, row in zip(places, rows, strict=True) if row.state == state]
        if chosen:
            x, y = zip(*chosen, strict=True)
            axes.scatter(x, y, s=22, edgecolors=colour, facecolors=face, label=state, zorder=3)


def _table(sweep: Sweep) -> str:
    """Every trial, best first."""
    keys = list(dict.fromkeys(key for row in sweep.rows for key in row.params))
    heads = ["trial", metric_label(sweep.score), "steps", "time", *keys, ""]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = []
    for row in sweep.best_first()[:MAX_ROWS]:
        note = row.error or ("" if row.state == "complete" else row.state)
        cells: list[Any] = [row.number, format_metric(sweep.score, row.value), max(row.curve, default=""),
                            "" if row.seconds is None else duration(row.seconds),
                            *(_value(row.params.get(key, "")) for key in keys), note[:200]]  # fmt: skip
        body.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    more = f'<p class="soft">The best {MAX_ROWS} of {len(sweep.rows)}; all are in trials.csv.</p>'
    table = f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'
    return table + (more if len(sweep.rows) > MAX_ROWS else "")


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _label(text: str) -> str:
    """As matplotlib takes it: `$` would start mathematics."""
    return text.replace("$", r"\$")
