"""What was measured case by case, in the report: spread, folds, the table of cases."""

import csv
from pathlib import Path
from typing import Any

from dense_heads.report.fragments import section
from dense_heads.report.tables import Summary, escape, format_metric, metric_label

_DISTANCES = ("hd95_mm", "hd95_px", "assd_mm", "assd_px")
_COLUMNS = ("dice", "iou", *_DISTANCES, "surface_dice", "volume_error", "aji", "ap", "ece")
_MOST = 300  # rows of the table of cases


def spread_text(summary: Summary, name: str) -> str:
    """Standard deviation and interval of a score over cases, in words; empty where it was not measured so."""
    row = (summary.get("spread") or {}).get(name)
    if not isinstance(row, dict):
        return ""
    low, high = (format_metric(name, row.get(key)) for key in ("low", "high"))
    return f"± {format_metric(name, row.get('std'))} over {row.get('cases')} cases; 95 % interval {low} to {high}"


def html_folds(summary: Summary) -> str:
    """Each fold's scores as a section; empty where there are none."""
    folds = summary.get("folds") or []
    if not folds:
        return ""
    names = [name for name in folds[0] if name.rpartition("/")[2] in _COLUMNS]
    rows = [[f"fold {row.get('fold')}", *(format_metric(name, row.get(name)) for name in names)] for row in folds]
    return section("Folds", _table(["", *(metric_label(name) for name in names)], rows))


def html_cases(path: Path) -> str:
    """`cases.csv` as a folded table, worst first; empty where there is none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found = [row for row in csv.DictReader(file) if row.get("class") == "all"]
    except (OSError, csv.Error):
        return ""
    if not found:
        return ""
    names = [name for name in _COLUMNS if name in found[0]]
    found.sort(key=lambda row: _number(row.get("dice")) or 0.0)
    rows = [[row["case"], *(format_metric(name, _number(row[name])) for name in names)] for row in found[:_MOST]]
    more = f'<p class="soft">The worst {_MOST} of {len(found)}.</p>' if len(found) > _MOST else ""
    table = _table(["case", *(metric_label(name) for name in names)], rows)
    return section("Cases", f"<details><summary>{len(found)} cases, worst first</summary>{table}{more}</details>")


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
