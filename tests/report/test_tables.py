import io
import json

import pytest
from rich.console import Console
from run_folders import IOU, NAMES, summary

from dense_heads.errors import UserError
from dense_heads.report.tables import (
    class_rows,
    format_metric,
    html_classes,
    html_scores,
    print_tables,
    read_summary,
    score_rows,
)

PUBLISHED = {
    "value": 47.7,
    "unit": "%",
    "source": "model card",
    "comparable": False,
    "not_comparable": ["seed"],
    "row": "L",
}


def printed(data, **given):
    stream = io.StringIO()
    print_tables(data, Console(file=stream, width=110, color_system=None), **given)
    return stream.getvalue()


def test_the_primary_metric_comes_first_beside_published_and_baseline():
    rows = score_rows(summary(published=PUBLISHED, primary="test/aacc"))
    assert rows[0].name == "test/aacc" and rows[0].primary and rows[0].published == "47.7 %"
    assert rows[0].baseline == 0.7012 and not rows[0].comparable
    assert [row.published for row in rows[1:]] == [None] * 3
    assert {row.name: row.baseline for row in rows}["test/dice"] is None


def test_a_published_number_of_another_metric_stands_beside_that_metric():
    published = {"value": 0.356, "unit": "m RMSE", "metric": "rmse_m", "comparable": True}
    metrics = {"val/abs_rel": 0.11, "val/rmse_m": 0.37}
    rows = score_rows(summary(metrics=metrics, primary="val/abs_rel", published=published))
    assert [(row.name, row.published) for row in rows] == [("val/abs_rel", None), ("val/rmse_m", "0.356 m RMSE")]


def test_what_does_not_look_at_the_image_stands_beside_the_score():
    blind = [{"name": "median", "metrics": {"test/miou": 0.11}}, {"name": "of each <pixel>", "metrics": {}}]
    data = summary(blind=blind)
    rows = {row.name: row.blind for row in score_rows(data)}
    assert rows["test/miou"] == (0.11, None) and rows["test/dice"] == (None, None)
    assert "11.0 %" in printed(data) and "of each <pixel>" in printed(data)
    assert "of each &lt;pixel&gt;" in html_scores(data)
    assert "median" not in printed(summary())


def test_classes_are_sorted_and_absent_ones_last():
    rows = class_rows(summary())
    values = [row.main for row in rows]
    assert values[:-1] == sorted((value for value in IOU if value is not None), reverse=True) and values[-1] is None
    assert rows[0].name == "Sky" and rows[0].colour == (128, 128, 128) and rows[-1].name == NAMES[-1]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("test/miou", 0.47749, "47.7 %"), ("val/rmse_m", 0.2984, "0.298 m"), ("val/loss", 1.23456, "1.235"),
        ("test/miou", None, "\N{EN DASH}"), ("test/miou", float("nan"), "\N{EN DASH}"),
    ],
)  # fmt: skip
def test_values_are_written_as_people_read_them(name, value, text):
    assert format_metric(name, value) == text


def test_terminal_shows_scores_and_classes():
    text = printed(summary(published=PUBLISHED))
    assert "32.4 %" in text and "47.7 % (not comparable)" in text and "24.2 %" in text and "raw pixels" in text
    assert text.index("Sky") < text.index("Road") < text.index("Bicyclist")


def test_of_many_classes_the_terminal_shows_both_ends():
    classes = [{"name": f"c{i:03}", "iou": i / 150, "acc": None, "colour": [1, 2, 3]} for i in range(150)]
    text = printed(summary(per_class=classes), max_classes=10)
    assert "c149" in text and "c000" in text and "c070" not in text and "140 more" in text


def test_hostile_names_reach_neither_terminal_nor_page():
    classes = [{"name": "\x1b[31m[bold]<b>&\nname", "iou": 0.5, "acc": 0.5, "colour": "red;}"}]
    data = summary(per_class=classes, task="<script>[/]", baseline={"name": "\x1b<i>", "metrics": {"test/miou": 0.1}})
    text = printed(data)
    assert "\x1b" not in text and "[bold]<b>&" in text and "<script>[/]" in text
    page = html_classes(data) + html_scores(data)
    assert (
        "<b>" not in page
        and "<i>" not in page
        and "\x1b" not in page
        and "&lt;b&gt;&amp;" in page
        and "red;" not in page
    )


def test_long_lists_stand_in_two_columns():
    classes = [{"name": f"c{i}", "iou": i / 30, "acc": None, "colour": None} for i in range(30)]
    page = html_classes(summary(per_class=classes))
    assert page.count("<table") == 2 and page.count("<tr>") == 32 and "width:96.7%" in page


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No metrics.json"),
        ("", "cannot be read as JSON"),
        ('{"task": "x", "metr', "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("\xff\xfe", "cannot be read as JSON"),
        ("[1, 2]", "holds a list"),
        ({"metrics": None}, "`metrics` is missing; expected a dict"),
        ({"backbone": "vits14"}, "`backbone` is 'vits14'; expected a dict"),
        ({"metrics": {"test/miou": "0.4"}}, "`test/miou` is '0.4'; expected a number"),
        ({"baseline": {"name": "x", "metrics": {"test/miou": [1]}}}, "expected a number"),
        ({"blind": [{"name": "x", "metrics": {"test/miou": "0"}}]}, "expected a number"),
        ({"blind": [{"metrics": {}}]}, "without a name"),
        ({"per_class": [{"iou": 1.0}]}, "without a name"),
        ({"per_class": [3]}, "without a name"),
        ({"notes": "one"}, "`notes` is 'one'; expected a list"),
    ],
)
def test_corrupt_summaries_are_refused_with_the_file_and_the_reason(tmp_path, text, words):
    path = tmp_path / "metrics.json"
    if isinstance(text, dict):
        path.write_text(json.dumps(summary(**text)))
    elif text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words) as caught:
        read_summary(path)
    assert str(tmp_path) in str(caught.value) and "mode=evaluate" in str(caught.value)


def test_null_nan_and_giant_numbers_are_dashes(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(summary(metrics={"test/miou": None, "test/aacc": float("nan"), "test/big": 10**400})))
    assert [row.value for row in score_rows(read_summary(path))] == [None, None, None]
