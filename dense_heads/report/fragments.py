"""Pieces of HTML and of wording that a report is made of."""

import base64
import json
from collections.abc import Mapping
from typing import Any

from dense_heads.report.tables import escape


def section(title: str, content: str) -> str:
    """A part of the page under its heading; both are HTML."""
    return f"<section><h2>{title}</h2>\n{content}</section>"


def card(label: str, value: str, below: str, style: str) -> str:
    """A box with one large number; all three texts are HTML, `style` is a class of the template's."""
    return (
        f'<div class="card {style}"><div class="k">{label}</div><div class="v">{value}</div>'
        f'<div class="s">{below}</div></div>'
    )


def figure(caption: str, data: bytes, kind: str, alt: str = "") -> str:
    """An embedded image of the given kind (`png`, `jpeg`, `svg+xml`) under a caption; texts are escaped here."""
    above = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return f'<figure>{above}<img alt="{escape(alt or caption)}" src="{source}"></figure>'


def definitions(values: Mapping[str, Any]) -> str:
    """Names and values of a free mapping, those without a value left out; escaped here."""
    rows = "".join(
        f"<dt>{escape(str(name).replace('_', ' '))}</dt><dd>{escape(text(value))}</dd>"
        for name, value in values.items()
        if value is not None and value != ""
    )
    return f"<dl>{rows}</dl>" if rows else ""


def text(value: object) -> str:
    """A value of a free mapping on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not isinstance(value, dict | list) or any(isinstance(one, dict | list) for one in nested):
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return ", ".join(f"{name}: {one}" for name, one in value.items()) if isinstance(value, dict) else joined(*value)


def joined(*parts: object) -> str:
    """The parts that there are, with commas."""
    return ", ".join(str(part) for part in parts if part is not None and part != "")


def count(parameters: object) -> str:
    """A number of parameters as people say it."""
    if isinstance(parameters, bool) or not isinstance(parameters, int):
        return ""
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {letter} parameters"
    return f"{parameters} parameters"


def duration(seconds: object) -> str:
    """Seconds in the unit that people would use."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return str(seconds)
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
