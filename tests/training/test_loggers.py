"""Curves: metrics.csv, TensorBoard event files, W&B offline."""

import csv

import pytest

from dense_heads.__main__ import main
from dense_heads.training.loggers import MetricsCsv


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("WANDB_SILENT", "true")
        assert main([*tiny, "logger=[tensorboard,wandb]", f"run_dir={folder}"]) == 0
    return folder


def test_metrics_csv_has_a_row_for_each_step(run):
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(float(row["train/loss"]) > 0 and float(row["lr"]) > 0 for row in rows)
    assert [bool(row["val/miou"]) for row in rows] == [False, False, True, False, False, True]


def test_tensorboard_events_can_be_read_back(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(run.rglob("events.out.tfevents.*")).parent), size_guidance={"images": 0})
    events.Reload()
    scalars = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert scalars["train/loss"] == pytest.approx([float(row["train/loss"]) for row in rows], rel=1e-6)
    assert scalars["val/miou"] == pytest.approx([float(row["val/miou"]) for row in rows if row["val/miou"]], rel=1e-6)
    assert events.Tags()["images"]


def test_wandb_works_offline_and_keeps_metrics_and_pictures(run):
    folder = next((run / "wandb").glob("offline-run-*"))
    assert next(folder.glob("run-*.wandb")).stat().st_size > 1000
    assert list((folder / "files" / "media").rglob("*.png"))


def test_metrics_csv_is_cut_back_and_appended(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCsv(path)
    for step in range(5):
        log.log_metrics({"a": step}, step)
    log.log_metrics({"b": 0.5}, 4)
    again = MetricsCsv(path)
    again.cut_back(3)
    again.log_metrics({"a": 30.0}, 3)
    assert path.read_text().splitlines() == ["step,a", "1,0", "2,1", "3,2", "4,30"]
