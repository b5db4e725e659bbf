"""The curves of a run, from its `metrics.csv`: loss, learning rate, validation scores."""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dense_heads.errors import UserError
from dense_heads.report.tables import PERCENT, metric_label, plain

COLOURS = ("#2f5d8a", "#c8663c", "#5b8c5a", "#8a5a83", "#a0853b", "#4f9a9a", "#b3495d", "#6b6f76")
NAMED_MAX = len(COLOURS)  # beyond, lines are drawn pale and unnamed: a legend of fifty says nothing
INK, PALE, RULE = "#202124", "#5f6368", "#e3e5e8"


@dataclass
class Series:
    """One column of `metrics.csv` where it was logged: steps and values, both (n,) float64."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def read_series(path: Path) -> dict[str, Series]:
    """The columns of `metrics.csv` by name; empty cells and values that are not finite are left out.

    A last line that is cut short (the run was killed while writing it) is left out too.

    Raises:
        UserError: the file cannot be read, has no `step` column, or holds a cell that is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.reader(file))
    except (OSError, csv.Error) as error:
        raise UserError(
            f"Cannot read {path}: {error}. Expected the curves that the run wrote; delete it to report without."
        ) from error
    if not rows:
        return {}
    header = rows[0]
    if "step" not in header:
        raise UserError(
            f"{path} has the columns {header[:8]}; expected `step` among them. Delete it to report without."
        )
    if len(rows[-1]) < len(header):
        rows.pop()
    series: dict[str, Series] = {name: Series() for name in header if name not in ("step", "epoch")}
    for number, row in enumerate(rows[1:], start=2):
        cells = dict(zip(header, row, strict=False))
        try:
            step = float(cells.get("step") or "nan")
            for name, one in series.items():
                cell = cells.get(name) or ""
                if cell and math.isfinite(step) and math.isfinite(float(cell)):
                    one.steps.append(step)
                    one.values.append(float(cell))
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: {error}; expected a number or nothing in every cell. Correct that line, or "
                "delete the file to report without curves."
            ) from error
    return {name: one for name, one in series.items() if one.steps}


def draw_curves(path: Path) -> dict[str, Figure]:
    """Figures of `metrics.csv` by title, `Loss` and `Validation` among them; those with nothing to show are absent.

    Raises:
        UserError: see `read_series`.
    """
    series = read_series(path)
    titles = ("Parts of the loss", "Teacher", "Learning rate", "Validation", "Rank of the features")
    groups = {"Loss": _losses(series), **{title: {} for title in titles}}
    for name, one in series.items():
        kind, _, rest = name.partition("/")
        if name == "lr" or name.startswith(("lr/", "lr-")):
            groups["Learning rate"][name] = one
        elif kind == "train" and not rest.startswith("loss"):
            groups["Parts of the loss"][rest] = one
        elif kind == "teacher" and not rest.endswith("temp"):  # entropies, or cosines to its features
            groups["Teacher"][rest] = one
        elif kind == "val" and rest.rsplit("/", 1)[-1] == "rank":
            groups["Rank of the features"][rest] = one
        elif kind == "val" and not rest.startswith("loss"):
            groups["Validation"][rest] = one
    smooth = ("Loss", "Parts of the loss", "Teacher")
    return {title: _figure(lines, smooth=title in smooth) for title, lines in groups.items() if lines}


def save_curves(path: Path, folder: Path, suffix: str = ".png") -> list[Path]:
    """Write each figure of `metrics.csv` to `folder`, as `.png` or `.svg`; gives the files written.

    Raises:
        UserError: see `read_series`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for title, figure in draw_curves(path).items():
        files.append(folder / (title.lower().replace(" ", "_") + suffix))
        files[-1].write_bytes(figure_bytes(figure, suffix))
    return files


def figure_bytes(figure: Figure, suffix: str = ".svg") -> bytes:
    """A figure as SVG (letters as outlines: the same everywhere) or PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "dense_heads"}):
        figure.savefig(buffer, format=suffix.lstrip("."), dpi=160, metadata={"Date": None} if suffix == ".svg" else {})
    return buffer.getvalue()


def _losses(series: Mapping[str, Series]) -> dict[str, Series]:
    """The losses to draw: each candidate's own where there are several (their sum says nothing), else the one."""
    single = "train/loss/"
    candidates = {name.removeprefix(single): one for name, one in series.items() if name.startswith(single)}
    lines = dict(candidates) if len(candidates) > 1 else {}
    if not lines and "train/loss" in series:
        lines["training"] = series["train/loss"]
    if not lines:
        lines = dict(candidates)
    if "val/loss" in series:
        lines["validation"] = series["val/loss"]
    return lines


def _figure(lines: Mapping[str, Series], smooth: bool) -> Figure:
    """One small plot: thin axes, no box, names beside the lines where there are more than one."""
    figure = Figure(figsize=(4.3, 2.8), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(lines.items(), key=lambda item: item[1].values[-1], reverse=not smooth)  # the best come first
    for number, (name, one) in enumerate(ordered):
        named = number < NAMED_MAX
        colour = COLOURS[number] if named else "#c3c7cc"
        label = _label(name) if named else None
        few = len(one.values) <= 40
        if smooth and len(one.values) >= 20:  # what was logged stays visible, pale, behind its running mean
            if len(lines) <= 2:
                axes.plot(one.steps, one.values, color=colour, alpha=0.25, linewidth=0.8)
            values = _running_mean(one.values)
        else:
            values = one.values
        marker = "o" if few else ""
        order = 3 if named else 2
        axes.plot(one.steps, values, marker=marker, color=colour, lw=1.6, ms=3, label=label, zorder=order)
    every = np.concatenate([one.values for one in lines.values()])
    if smooth and every.min() > 0 and every.max() > 100 * every.min():
        axes.set_yscale("log")
    elif not smooth and every.max() <= 1 and every.max() > 0.02:
        axes.set_ylim(bottom=max(0.0, every.min() - 0.1))
    axes.set_xlabel("step", color=PALE, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(colors=PALE, labelsize=9, length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)
    if not smooth and all(name.rsplit("/", 1)[-1] in PERCENT for name in lines):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(lines) > 1:
        best = None if len(lines) <= NAMED_MAX else f"best {NAMED_MAX} of {len(lines)}"
        look = {"frameon": False, "fontsize": 8, "labelcolor": INK, "title": best, "title_fontsize": 8}
        if len(lines) <= 4:
            axes.legend(loc="best", **look)
        else:  # many names would hide the lines
            figure.set_figheight(3.7)
            figure.legend(loc="outside lower center", ncols=2, **look)
    return figure


def _running_mean(values: list[float]) -> list[float]:
    """Exponential mean over about a fortieth of the curve, without a start-up bias."""
    keep = 1 - 1 / max(2.0, len(values) / 40)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _label(name: str) -> str:
    """A name as matplotlib takes it: `$` would start mathematics, a leading `_` would hide the entry."""
    text = metric_label(plain(name))[:32].replace("$", r"\$")
    return " " + text if text.startswith("_") else text
