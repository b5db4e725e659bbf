"""`report.html`: a run as one page that opens offline, for a person to judge it by."""

import csv
import io
import os
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from dense_heads.report.cases import html_cases, html_folds, spread_text
from dense_heads.report.curves import draw_curves, figure_bytes
from dense_heads.report.fragments import card, count, definitions, duration, figure, joined, section
from dense_heads.report.sweep import html_sweep
from dense_heads.report.tables import (
    PERCENT,
    ScoreRow,
    Summary,
    blind_names,
    escape,
    format_metric,
    html_classes,
    html_scores,
    metric_label,
    published_text,
    read_summary,
    score_rows,
)

MAX_BYTES = 7_800_000  # of the whole file: it should still go by mail
MAX_TEXT = 200_000  # characters of an embedded text file
MAX_ROWS = 100  # of the table of candidates
PICTURE_WIDTH = 1760  # pixels: sharp at the page's width, also when the page is zoomed in


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, from what stands there; gives its path.

    Reads `metrics.json` (needed) and `metrics.csv`, `config.yaml`, `card.json`, `grid.csv`, `sweep.json`,
    `pictures/**/*.png` (each
    left out where it is missing). The file carries everything in itself, runs no script and stays below 8 MB:
    pictures become JPEG, smaller ones where there are many, and those that do not fit are counted in a line.

    Raises:
        UserError: `metrics.json` is missing or corrupt, `metrics.csv` holds what is no number.
    """
    run_dir = Path(run_dir)
    summary = read_summary(run_dir / "metrics.json")
    before = [_headline(summary), _curves(run_dir / "metrics.csv")]
    after = [
        html_sweep(run_dir),
        section("Classes", html_classes(summary)) if summary.get("per_class") else "",
        html_folds(summary),
        html_cases(run_dir / "cases.csv"),
        _candidates(run_dir / "grid.csv"),
        _protocol(summary),
        _facts(summary),
        _texts(run_dir),
    ]
    room = MAX_BYTES - sum(len(part.encode("utf-8", "replace")) for part in (*before, *after)) - 10_000
    body = "\n".join(part for part in (*before, _pictures(run_dir / "pictures", room), *after) if part)
    template = Template(Path(__file__).with_name("report.template.html").read_text(encoding="utf-8"))
    title = escape(f"{summary['task']}: {_head_name(summary)} on {_backbone_name(summary)}")
    path = run_dir / "report.html"
    _write(path, template.substitute(title=title, body=body))
    return path


def _headline(summary: Summary) -> str:
    """What was trained, what it scored, and what that is worth."""
    task, steps = escape(summary["task"]), summary.get("steps")
    trained = f", trained for {steps:,} steps" if isinstance(steps, int) and steps > 0 else ""
    family = f" ({escape(summary['family'])})" if summary.get("family") else ""
    sentence = (
        f"A <strong>{escape(_head_name(summary))}</strong> head on a {_state(summary)} "
        f"<strong>{escape(_backbone_name(summary))}</strong> {_weights(summary)}{trained} on {task}{family}."
    )
    parts = ['<p class="over">dense_heads · report of a run</p>', f"<h1>{task}</h1>", f'<p class="lead">{sentence}</p>']
    main = next((row for row in score_rows(summary) if row.primary), None)
    baseline = summary.get("baseline") or {}
    if _is_random(summary):
        beside = ""
        if main and main.baseline is not None:
            beside = (
                f" A head on {escape(baseline.get('name', 'the baseline'))}, trained in the same way, scores "
                f"{format_metric(main.name, main.baseline)}; this run {format_metric(main.name, main.value)}."
            )
        parts.append(
            '<p class="warn"><strong>The backbone is random: it has learnt nothing.</strong> What these numbers show '
            f"is the head's work on random features.{beside}</p>"
        )
    cards = [_own_card(summary), _published_card(summary)]
    if main and main.baseline is not None:
        value, beside = format_metric(main.name, main.baseline), _distance(main.name, main.value, main.baseline)
        cards.append(card(f"Baseline: {escape(baseline.get('name', 'baseline'))}", value, beside, "quiet"))
    if main and summary.get("distillation"):
        cards.append(_teacher_card(summary["distillation"], main))
    if main and main.blind:
        cards.append(_blind_card(summary, main))
    if main and main.threshold is not None:
        cards.append(_threshold_card(summary["threshold"], main))
    parts.append(f'<div class="cards">{"".join(cards)}</div>')
    if len(summary["metrics"]) > 1:
        parts.append(f'<div class="scores">{html_scores(summary)}</div>')
    return "\n".join(parts)


def _own_card(summary: Summary) -> str:
    primary = summary["primary"]
    value = format_metric(primary, next((row.value for row in score_rows(summary) if row.primary), None))
    better = {"max": "higher is better", "min": "lower is better"}.get(str(summary.get("direction")), "")
    chosen = f"checkpoint: {escape(summary['selected_on'])}" if summary.get("selected_on") else ""
    below = "<br>".join(filter(None, (escape(spread_text(summary, primary)), better, chosen)))
    return card(escape(metric_label(primary)), value, below, "own")


def _blind_card(summary: Summary, main: ScoreRow) -> str:
    """What is scored without looking at the image: the simplest large, the others below."""
    first, *others = zip(blind_names(summary), main.blind, strict=True)
    lines = [escape(first[0]), _distance(main.name, main.value, first[1])]
    lines += [f"{escape(name)}: {format_metric(main.name, value)}" for name, value in others]
    return card(
        "Without looking at the image", format_metric(main.name, first[1]), "<br>".join(filter(None, lines)), "quiet"
    )


def _teacher_card(taught: dict[str, Any], main: ScoreRow) -> str:
    """The student's share of the teacher's score, and that of the same student without the teacher."""
    teacher, alone = main.taught
    name = f"{escape(taught.get('head'))} on {escape(taught.get('backbone'))}"
    lines = [f"of the teacher's score, {format_metric(main.name, teacher)} ({name})"]
    if alone is not None:
        share = _share(taught["alone"].get("retention"))
        lines.append(f"The same student without the teacher: {format_metric(main.name, alone)}, {share} of it.")
        lines.append(_distance(main.name, main.value, alone).replace(" it.", " that student."))
    return card("Retention", _share(taught.get("retention")), "<br>".join(filter(None, lines)), "quiet")


def _share(value: object) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "–"  # noqa: RUF001


def _threshold_card(threshold: dict[str, Any], main: ScoreRow) -> str:
    """What a threshold of grey scores, and which class it takes each range for."""
    ranges = ", ".join(map(str, threshold.get("ranges") or ()))
    lines = [
        escape(threshold.get("name") or ""),
        _distance(main.name, main.value, main.threshold),
        f"dark to bright: {escape(ranges)}" if ranges else "",
    ]
    value = format_metric(main.name, main.threshold)
    return card("By grey alone", value, "<br>".join(filter(None, lines)), "quiet")


def _published_card(summary: Summary) -> str:
    """The published number if it is this set-up's; else what it is not, and why."""
    published = summary.get("published")
    if not published:
        return card("Published", "none", "There is no published number for this backbone, head and protocol.", "quiet")
    row = escape(" · ".join(str(published[key]) for key in ("row", "source") if published.get(key)))
    if published.get("comparable"):
        ours = next((row for row in score_rows(summary) if row.published), None)
        beside = _distance(ours.name, ours.value, _as_metric(ours.name, published)) if ours else ""
        return card("Published, same set-up", escape(published_text(published)), f"{row}<br>{beside}", "")
    why = published.get("not_comparable")
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in (why if isinstance(why, list) else [why or "unknown"]))
    return card(
        "Nearest published row",
        escape(published_text(published)),
        f"{row}<br>Not comparable:<ul>{reasons}</ul>",
        "quiet",
    )


def _curves(path: Path) -> str:
    if not path.is_file():
        return ""
    figures = []
    for title, drawn in draw_curves(path).items():
        data, kind = figure_bytes(drawn, ".svg"), "svg+xml"
        if len(data) > 400_000:  # many candidates or steps: pixels are smaller than outlines
            data, kind = figure_bytes(drawn, ".png"), "png"
        figures.append(figure(title, data, kind))
    return section("Curves", f'<div class="curves">{"".join(figures)}</div>') if figures else ""


def _pictures(folder: Path, room: int) -> str:
    """All pictures, by sub-folder, within `room` bytes; smaller where there are many."""
    files = sorted(folder.rglob("*.png"), key=lambda file: (_split(file, folder) != "test", file))
    if not files:
        return ""
    share = min(room // len(files), 1_200_000)
    groups: dict[str, list[str]] = {}
    unreadable, left_out = 0, 0
    for file in files:
        try:
            data = _jpeg(file, share * 3 // 4 - 600)  # base64 takes four bytes for three
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            unreadable += 1
            continue
        if data is None:
            left_out += 1
            continue
        groups.setdefault(_split(file, folder), []).append(figure("", data, "jpeg", alt=file.stem))
    parts = []
    for split, figures in groups.items():
        heading = f"<h3>{escape({'val': 'validation'}.get(split, split))}</h3>" if split else ""
        parts.append(f'{heading}<div class="pictures">{"".join(figures)}</div>')
    for number, what in ((unreadable, "could not be read"), (left_out, "did not fit into one file")):
        if number:
            told = f"{number} of {len(files)} pictures {what}; see the folder <code>pictures</code>."
            parts.append(f'<p class="soft">{told}</p>')
    return section("Pictures", "\n".join(parts))


def _jpeg(path: Path, most: int) -> bytes | None:
    """The picture as JPEG of at most `most` bytes, as large and good as that allows; None where it would be a blur."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    for width in (PICTURE_WIDTH, 1200, 800, 480):
        if width != PICTURE_WIDTH and width >= picture.width:
            continue
        picture.thumbnail((width, 10 * width), Image.Resampling.LANCZOS)
        for quality in (90, 75, 50):
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=quality, subsampling=0)  # flat colours keep their edges
            if buffer.tell() <= most:
                return buffer.getvalue()
    return None


def _candidates(path: Path) -> str:
    """The table of a grid of heads, in the order of its file (best first)."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.reader(file))
    except (OSError, csv.Error):
        return ""
    if len(rows) < 2:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1 : MAX_ROWS + 1])
    more = f'<p class="soft">The first {MAX_ROWS} of {len(rows) - 1}.</p>' if len(rows) - 1 > MAX_ROWS else ""
    return section("Candidates", f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>{more}')


def _protocol(summary: Summary) -> str:
    left = definitions(summary.get("protocol") or {})
    right = "".join(
        f"<p>{escape(note)}</p>" for note in (summary.get("conventions"), *(summary.get("notes") or ())) if note
    )
    if not left and not right:
        return ""
    return section("Protocol and conventions", f'<div class="columns"><div>{left}</div><div>{right}</div></div>')


def _facts(summary: Summary) -> str:
    """What it takes to repeat the run."""
    backbone, head, seconds = summary["backbone"], summary["head"], summary.get("seconds") or {}
    own = {
        "backbone": joined(_backbone_name(summary), count(backbone.get("parameters")), _state(summary)),
        "weights": joined(backbone.get("weights") or "random", _named("seed", backbone.get("seed"))),
        "fingerprint": backbone.get("fingerprint"),
        "head": joined(_head_name(summary), count(head.get("parameters"))),
        "seed": summary.get("seed"),
        "steps": f"{summary['steps']:,}" if isinstance(summary.get("steps"), int) else summary.get("steps"),
        "commit": summary.get("commit"),
    }
    machine = {
        "hardware": summary.get("hardware"),
        **{f"time, {name}": duration(value) for name, value in seconds.items()},
        **(summary.get("versions") or {}),
    }
    return section("Run", f'<div class="columns"><div>{definitions(own)}</div><div>{definitions(machine)}</div></div>')


def _texts(run_dir: Path) -> str:
    """The run's own files, folded."""
    parts = []
    for name, what in (("config.yaml", "the whole configuration"), ("card.json", "the card of the trained head")):
        path = run_dir / name
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            cut = text[:MAX_TEXT] + ("\n[cut here: see the file]" if len(text) > MAX_TEXT else "")
            lines = "\n".join(escape(line) for line in cut.expandtabs(4).split("\n"))
            parts.append(f"<details><summary>{name}: {what}</summary><pre>{lines}</pre></details>")
    return section("Files", "".join(parts)) if parts else ""


def _is_random(summary: Summary) -> bool:
    """Whether the backbone has parameters that were never trained (raw pixels have none)."""
    backbone = summary["backbone"]
    return backbone.get("weights") is None and backbone.get("parameters") != 0 and not backbone.get("trained")


def _state(summary: Summary) -> str:
    return "trained" if summary["backbone"].get("trained") else "frozen"


def _weights(summary: Summary) -> str:
    weights = summary["backbone"].get("weights")
    if summary["backbone"].get("trained"):
        return f"from {escape(weights or 'random')} weights"
    if weights is None:
        return "with random weights" if _is_random(summary) else "(no parameters)"
    return f"with {escape(weights)} weights" if weights in ("official", "in-house") else f"(weights: {escape(weights)})"


def _backbone_name(summary: Summary) -> str:
    return str(summary["backbone"].get("name") or "unnamed")


def _head_name(summary: Summary) -> str:
    return str(summary["head"].get("name") or "unnamed")


def _as_metric(name: str, published: dict[str, Any]) -> float | None:
    """The published number on the scale of our metric `name`; None where its unit leaves that open."""
    value, percent = published.get("value"), published.get("unit") == "%"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if percent != (name.rsplit("/", 1)[-1] in PERCENT):
        return None
    return value / 100 if percent else float(value)


def _distance(name: str, value: float | None, other: float | None) -> str:
    """This run against another number, in words."""
    if value is None or other is None:
        return ""
    gap = value - other
    unit = f"{abs(100 * gap):.1f} points" if name.rsplit("/", 1)[-1] in PERCENT else f"{abs(gap):.4g}"
    return f"This run is {unit} {'above' if gap >= 0 else 'below'} it."


def _split(file: Path, folder: Path) -> str:
    return file.relative_to(folder).parent.as_posix().removeprefix(".")


def _named(name: str, value: object) -> str:
    return "" if value is None else f"{name} {value}"


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a report that is being looked at is not half a file."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(text.encode("utf-8", "replace"))
    os.replace(part, path)
