"""What was measured case by case, beside `metrics.json`: `cases.json` for programs, `cases.csv` for people."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dense_heads.errors import UserError
from dense_heads.ops.files import write_atomically

CASES_FILE = "cases.json"


def write_cases(
    folder: Path, found: Mapping[str, Any], class_names: Sequence[str], threshold: Mapping[str, Any]
) -> None:
    """Write both files.

    Args:
        folder: of the run.
        found: `cases` (as measured) and `rows` (case -> its scores, mean over classes), as `metrics/cases.py` has them.
        class_names: of the measured classes, in the order of each case's measurements.
        threshold: the cases as a threshold of grey segments them; {} where there is none.
    """
    content = {"classes": list(class_names), "cases": found["cases"], "threshold": threshold}
    write_atomically(folder / CASES_FILE, json.dumps(without_nan(content), indent=1))
    lines: list[dict[str, Any]] = []
    for case, row in found["rows"].items():
        lines.append({"case": case, "class": "all", **row})
        each = found["cases"][case]["classes"]
        if len(each) > 1:
            lines += [{"case": case, "class": n, **own} for n, own in zip(class_names, each, strict=True)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(folder / "cases.csv", text.getvalue())


def read_cases(folder: Path) -> dict[str, Any]:
    """What `write_cases` kept: `classes`, `cases` and `threshold`.

    Raises:
        UserError: it is not there or not readable.
    """
    path = folder / CASES_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kept = {
            key: {case: _with_nan(measured) for case, measured in content.get(key, {}).items()}
            for key in ("cases", "threshold")
        }
        return {"classes": list(content["classes"]), **kept}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: not readable as the cases of a finished run ({error}). Run the fold again."
        ) from error


def without_nan(value: Any) -> Any:
    """JSON has no nan: null stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def _with_nan(case: Mapping[str, Any]) -> dict[str, Any]:
    """The measurements of one case as they were."""
    known = {key: math.nan if value is None else value for key, value in case.items() if key != "classes"}
    rows = [{key: math.nan if value is None else value for key, value in row.items()} for row in case["classes"]]
    return {"classes": rows, **known}
