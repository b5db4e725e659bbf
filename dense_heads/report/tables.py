"""Scores and per-class results as rows; one renderer for the terminal (rich), one for the report (HTML)."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dense_heads.errors import UserError

Summary = Mapping[str, Any]  # what `metrics.json` holds

_AREAS = ("", "_50", "_75", "_small", "_medium", "_large")
_PRECISIONS = tuple(f"{kind}map{area}" for kind in ("", "mask_", "box_as_mask_") for area in _AREAS)
PERCENT = frozenset(
    {"miou", "macc", "aacc", "dice", "iou", "acc", "top1", "top5", *_PRECISIONS, "voc_map_50", "voc_ap_50"}
)
LABELS = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc", "dice": "Dice", "iou": "IoU", "lr": "learning rate"}
LABELS |= {name: name.replace("_", " ").replace("map", "mAP") for name in (*_PRECISIONS, "voc_map_50")}
# Columns of the per-class table, where an entry has them; the first one that is there sorts and is drawn as a bar.
CLASS_COLUMNS = (
    "dice",
    "iou",
    "acc",
    "map",
    "map_50",
    "mask_map",
    "mask_map_50",
    "voc_ap_50",
    "surface_dice",
    "hd95_mm",
    "hd95_px",
)
GREY = (190, 194, 199)

# Of medical segmentation.
PERCENT |= {"dice_pooled", "surface_dice", "sensitivity", "precision", "ap", "ap50", "aji"}
LABELS |= {"iou": "IoU", "dice_pooled": "Dice, pooled", "surface_dice": "surface Dice", "volume_error": "volume error"}
LABELS |= {"ece": "ECE", "ap": "AP", "ap50": "AP50", "aji": "AJI"}
LABELS |= {f"{name}_{unit}": f"{name.upper()} ({unit})" for name in ("hd95", "assd") for unit in ("mm", "px")}

_TAUGHT = {"teacher": "the teacher", "alone": "without the teacher"}  # of `distillation`: key -> title

# What `metrics.json` must and may hold: key -> type, and whether the report needs it.
_SCHEMA: dict[str, tuple[type | tuple[type, ...], bool]] = {
    "task": (str, True),
    "metrics": (dict, True),
    "primary": (str, True),
    "backbone": (dict, True),
    "head": (dict, True),
    "direction": (str, False),
    "per_class": (list, False),
    "protocol": (dict, False),
    "published": (dict, False),
    "spread": (dict, False),
    "folds": (list, False),
    "baseline": (dict, False),
    "blind": (list, False),
    "threshold": (dict, False),
    "distillation": (dict, False),
    "notes": (list, False),
    "seconds": (dict, False),
    "versions": (dict, False),
    "candidates": (list, False),
}


@dataclass(frozen=True)
class ScoreRow:
    """One metric of a run beside what it is held against; None where there is no such number."""

    name: str  # as in metrics.json, `test/miou`
    value: float | None
    published: str | None  # as published, unit included
    comparable: bool
    baseline: float | None
    blind: tuple[float | None, ...]  # of predictions that do not look at the image
    threshold: float | None  # of grey alone
    taught: tuple[float | None, float | None]  # of the teacher, and of the same student without it
    primary: bool


@dataclass(frozen=True)
class ClassRow:
    """One class's results; None where the class occurs nowhere."""

    name: str
    values: Mapping[str, float | None]  # by column, in the order of CLASS_COLUMNS
    colour: tuple[int, int, int]

    @property
    def main(self) -> float | None:
        """The first column's value."""
        return next(iter(self.values.values()), None)


def read_summary(path: Path) -> Summary:
    """Read `metrics.json` and check what the report relies on.

    Raises:
        UserError: the file is missing, is no JSON object, or lacks a key or has one of another type.
    """
    fix = "Give the folder of a finished run, or run `mode=evaluate model=RUN` to measure again."
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"No {path.name} in {path.parent}: expected the folder of a finished run. {fix}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}. {fix}") from error
    if not isinstance(summary, dict):
        raise UserError(f"{path} holds a {type(summary).__name__}; expected a JSON object of results. {fix}")
    for key, (kind, needed) in _SCHEMA.items():
        value = summary.get(key)
        if (value is None and needed) or (value is not None and not isinstance(value, kind)):
            expected = kind.__name__ if isinstance(kind, type) else " or ".join(one.__name__ for one in kind)
            raise UserError(f"{path}: `{key}` is {_short(value)}; expected a {expected}. {fix}")
    if not all(isinstance(entry, dict) and "name" in entry for entry in summary.get("blind") or ()):
        raise UserError(f"{path}: `blind` holds an entry without a name; expected name and metrics. {fix}")
    taught = summary.get("distillation") or {}
    others = [summary.get(key) or {} for key in ("baseline", "threshold")]
    others += [*(summary.get("blind") or ()), *(taught.get(key) or {} for key in ("teacher", "alone"))]
    beside = [entry.get("metrics") for entry in others]
    numbers = [
        item for metrics in (summary["metrics"], *beside) if isinstance(metrics, dict) for item in metrics.items()
    ]
    for name, value in numbers:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{path}: the metric `{name}` is {_short(value)}; expected a number or null. {fix}")
    if not all(isinstance(entry, dict) and "name" in entry for entry in summary.get("per_class") or ()):
        raise UserError(f"{path}: `per_class` holds an entry without a name; expected name, iou, acc, colour. {fix}")
    return summary


def score_rows(summary: Summary) -> list[ScoreRow]:
    """The run's metrics, the primary one first, beside the published number and the baseline."""
    published = summary.get("published") or {}
    baseline = (summary.get("baseline") or {}).get("metrics") or {}
    blind = [entry.get("metrics") or {} for entry in summary.get("blind") or ()]
    threshold = (summary.get("threshold") or {}).get("metrics") or {}
    taught = summary.get("distillation") or {}
    primary = summary["primary"]
    rows = []
    of_published = published.get("metric") or primary.rpartition("/")[2]
    for name in sorted(summary["metrics"], key=lambda one: one != primary):
        rows.append(
            ScoreRow(
                name=name,
                value=_number(summary["metrics"][name]),
                published=published_text(published) if published and name.rpartition("/")[2] == of_published else None,
                comparable=bool(published.get("comparable")),
                baseline=_number(baseline.get(name)),
                blind=tuple(_number(metrics.get(name)) for metrics in blind),
                threshold=_number(threshold.get(name)),
                taught=(_of_taught(taught, "teacher", name), _of_taught(taught, "alone", name)),
                primary=name == primary,
            )
        )
    return rows


def _of_taught(taught: Summary, key: str, name: str) -> float | None:
    return _number(((taught.get(key) or {}).get("metrics") or {}).get(name))


def class_rows(summary: Summary) -> list[ClassRow]:
    """Per-class results, best first, classes that occur nowhere last; all rows have the same columns."""
    entries = summary.get("per_class") or ()
    columns = [name for name in CLASS_COLUMNS if any(name in entry for entry in entries)]
    rows = [
        ClassRow(str(entry["name"]), {name: _number(entry.get(name)) for name in columns}, _colour(entry.get("colour")))
        for entry in entries
    ]
    return sorted(rows, key=lambda row: (row.main is None, -(row.main or 0.0)))


def print_tables(summary: Summary, console: Console | None = None, max_classes: int = 30) -> None:
    """Print the scores and the per-class results to the terminal; of many classes the best and the worst."""
    console = console or Console()
    console.print(_rich_scores(summary))
    if summary.get("per_class"):
        console.print(_rich_classes(class_rows(summary), max_classes))


def _rich_scores(summary: Summary) -> Table:
    rows = score_rows(summary)
    table = Table(title=Text(f"{plain(summary['task'])}: scores"), title_justify="left")
    table.add_column("metric")
    table.add_column("this run", justify="right")
    shown = [row.published for row in rows if row.published]
    with_baseline = any(row.baseline is not None for row in rows)
    if with_baseline:
        table.add_column(Text(_baseline_name(summary)), justify="right")
    for name in _beside_names(summary):
        table.add_column(Text(name), justify="right")
    if shown:
        table.add_column("published", justify="right")
    for row in rows:
        cells = [Text(metric_label(plain(row.name))), Text(format_metric(row.name, row.value))]
        if with_baseline:
            cells.append(Text(format_metric(row.name, row.baseline)))
        cells += [Text(format_metric(row.name, value)) for value in _beside(summary, row)]
        if shown:
            remark = "" if row.comparable or not row.published else " (not comparable)"
            cells.append(Text(plain(row.published or "") + remark))
        table.add_row(*cells, style="bold" if row.primary else "")
    return table


def _rich_classes(rows: Sequence[ClassRow], most: int) -> Table:
    columns = list(rows[0].values)
    table = Table(title=Text("By class"), title_justify="left")
    table.add_column("class")
    for number, name in enumerate(columns):
        table.add_column(metric_label(name), justify="right")
        if number == 0:
            table.add_column("")
    cut = len(rows) > most
    half = most // 2
    for number, row in enumerate(rows):
        if cut and half <= number < len(rows) - half:
            if number == half:
                table.add_row(Text(f"… {len(rows) - 2 * half} more"), style="dim")
            continue
        label = Text("■ ", style="#{:02x}{:02x}{:02x}".format(*row.colour)).append(plain(row.name), style="default")
        cells = [Text(format_metric(name, value)) for name, value in row.values.items()]
        cells.insert(1, Text("━" * round(20 * _share(row)), style="cyan"))
        table.add_row(label, *cells)
    return table


def html_scores(summary: Summary) -> str:
    """The scores as an HTML table; every text in it is escaped."""
    rows = score_rows(summary)
    with_published = any(row.published for row in rows)
    with_baseline = any(row.baseline is not None for row in rows)
    head = ["<th>metric</th>", '<th class="n">this run</th>']
    if with_baseline:
        head.append(f'<th class="n">{escape(_baseline_name(summary))}</th>')
    head += [f'<th class="n">{escape(name)}</th>' for name in _beside_names(summary)]
    if with_published:
        head.append('<th class="n">published</th>')
    body = []
    for row in rows:
        cells = [
            f"<td>{escape(metric_label(row.name))}</td>",
            f'<td class="n">{format_metric(row.name, row.value)}</td>',
        ]
        if with_baseline:
            cells.append(f'<td class="n">{format_metric(row.name, row.baseline)}</td>')
        cells += [f'<td class="n">{format_metric(row.name, value)}</td>' for value in _beside(summary, row)]
        if with_published:
            remark = "" if row.comparable or not row.published else '<span class="faint"> not comparable</span>'
            cells.append(f'<td class="n">{escape(row.published or "")}{remark}</td>')
        body.append(f"<tr{' class=primary' if row.primary else ''}>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def html_classes(summary: Summary) -> str:
    """Per-class results with colour chips and bars; long lists in two columns; every text in it is escaped."""
    rows = class_rows(summary)
    halves = [rows] if len(rows) <= 24 else [rows[: (len(rows) + 1) // 2], rows[(len(rows) + 1) // 2 :]]
    names = [f'<th class="n">{escape(metric_label(name))}</th>' for name in rows[0].values]
    head = f"<tr><th>class</th>{names[0] if names else ''}<th></th>{''.join(names[1:])}</tr>"
    tables = []
    for half in halves:
        body = "".join(_html_class(row) for row in half)
        tables.append(f'<table class="classes"><thead>{head}</thead><tbody>{body}</tbody></table>')
    return f'<div class="halves">{"".join(tables)}</div>'


def _html_class(row: ClassRow) -> str:
    cells = [f'<td class="n">{format_metric(name, value)}</td>' for name, value in row.values.items()]
    cells[1:] = [cell.replace('"n"', '"n faint"') for cell in cells[1:]]
    bar = f'<td class="bar"><i style="width:{100 * _share(row):.1f}%"></i></td>'
    chip = f'<td><span class="chip" style="background:rgb{row.colour}"></span>{escape(row.name)}</td>'
    return f"<tr>{chip}{''.join(cells[:1])}{bar}{''.join(cells[1:])}</tr>"


def _share(row: ClassRow) -> float:
    """The main value as the length of a bar."""
    return min(max(row.main or 0.0, 0.0), 1.0)


def format_metric(name: str, value: float | None) -> str:
    """A value as people read it: ratios in per cent, `_m` in metres, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001
    last = name.rsplit("/", 1)[-1]
    if last in PERCENT:
        return f"{100 * value:.1f} %"
    return f"{value:.3f} m" if last.endswith("_m") else f"{value:.4g}"


def published_text(published: Mapping[str, Any]) -> str:
    """The published number with its unit, as its source prints it."""
    return f"{published.get('value')} {published.get('unit') or ''}".strip()


def metric_label(name: str) -> str:
    """`test/miou` -> `mIoU, test`; names without a house label stay as they are."""
    prefix, _, last = name.rpartition("/")
    label = LABELS.get(last, last)
    return f"{label}, {prefix}" if prefix else label


def plain(text: object) -> str:
    """Text on one line without control characters: a class name must not steer a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))


def escape(text: object) -> str:
    """Text for HTML: control characters replaced, markup escaped."""
    return html.escape(plain(text))


def blind_names(summary: Summary) -> list[str]:
    """What the predictions that do not look at the image are called, in the order of `ScoreRow.blind`."""
    return [plain(entry["name"]) for entry in summary.get("blind") or ()]


def _beside_names(summary: Summary) -> list[str]:
    """Headings of the columns of what was not trained, and of a teacher and the student without it."""
    threshold, taught = summary.get("threshold"), summary.get("distillation") or {}
    by_grey = [plain(threshold.get("name") or "threshold")] if threshold else []
    return [*blind_names(summary), *by_grey, *(title for key, title in _TAUGHT.items() if taught.get(key))]


def _beside(summary: Summary, row: ScoreRow) -> list[float | None]:
    """The values of a row in these columns."""
    taught = summary.get("distillation") or {}
    values = [value for key, value in zip(_TAUGHT, row.taught, strict=True) if taught.get(key)]
    return [*row.blind, *([row.threshold] if summary.get("threshold") else []), *values]


def _baseline_name(summary: Summary) -> str:
    return plain((summary.get("baseline") or {}).get("name") or "baseline")


def _number(value: object) -> float | None:
    """A finite number, else None: nan is null in JSON, and NaN in what Python writes by default."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond any float
        return None


def _colour(value: object) -> tuple[int, int, int]:
    """Three channels 0-255, grey where the class has none."""
    if isinstance(value, list) and len(value) == 3 and all(isinstance(one, int) and 0 <= one <= 255 for one in value):
        return (int(value[0]), int(value[1]), int(value[2]))
    return GREY


def _short(value: object) -> str:
    return "missing" if value is None else repr(value)[:80]
