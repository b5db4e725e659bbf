"""Depth through the real command: every task on its layout, every verb, released heads by name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import dense_heads
from dense_heads.__main__ import main
from dense_heads.build import heads
from dense_heads.heads.dpt import DPTHead
from dense_heads.heads.linear_depth import LinearDepthHead
from tests.factories import DATA, make_depth_folders, make_kitti, make_nyu_depth

TINY = ["backbone=vitn14_reg", "backbone.weights=null", "debug=fast", "trainer.accelerator=cpu", "data.batch_size=2"]
SMALL_CROP = ["data.image_size=[42,56]"]
TASKS = {
    "nyu_depth": (make_nyu_depth, ["head=linear4_depth"]),
    "kitti_depth": (make_kitti, ["head=linear_depth"]),
    "depth": (make_depth_folders, ["head=dpt", "head.channels=16", "task.transforms.train.rotate=null"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Task -> (run folder, data), trained on first use."""
    made = {}

    def run(task):
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            make, own = TASKS[task]
            root = make(folder / "data")
            typed = [f"task={task}", *TINY, *SMALL_CROP, *own, f"data.root={root}", f"run_dir={folder / 'run'}"]
            assert main(typed) == 0
            made[task] = folder / "run", root
        return made[task]

    return run


@pytest.mark.parametrize("task", TASKS)
def test_every_depth_task_is_trained_measured_and_measured_again_alike(runs, task):
    run, _ = runs(task)
    found = json.loads((run / "metrics.json").read_text())
    assert found["family"] == "depth" and found["primary"] == "val/abs_rel" and found["direction"] == "min"
    assert found["metrics"]["val/abs_rel"] > 0 and 0 <= found["metrics"]["val/delta1"] <= 1
    assert "images" in found["conventions"] and (run / "report.html").stat().st_size > 1000
    assert list((run / "pictures" / "val").glob("*.png"))
    assert [len(blind["metrics"]) for blind in found["blind"]] == [len(found["metrics"])] * 3
    assert main(["mode=evaluate", f"model={run}"]) == 0
    (again,) = (run / "evaluate").iterdir()
    measured = json.loads((again / "metrics.json").read_text())
    assert measured["metrics"] == found["metrics"] and measured["blind"] == found["blind"]


def test_blind_predictions_are_scored_on_the_same_pixels_as_the_head(runs):
    """`debug=fast` measures two images; by hand from the files, by a plain formula."""
    run, root = runs("depth")
    read = lambda split: [  # noqa: E731
        np.asarray(Image.open(path)).astype(np.float64) / 1000 for path in sorted((root / "depth" / split).iterdir())
    ]
    maps = np.stack(read("training"))
    median = np.median(maps[maps > 0])
    blind = json.loads((run / "metrics.json").read_text())["blind"]
    assert blind[0]["name"] == f"training median, {median:.2f} m"
    each = [np.mean(np.abs(median - label[label > 0]) / label[label > 0]) for label in read("validation")]
    assert len(each) == 2 and blind[0]["metrics"]["val/abs_rel"] == pytest.approx(np.mean(each), rel=1e-5)
    page = (run / "report.html").read_text()
    assert "Without looking at the image" in page and blind[2]["name"] in page


def test_prediction_is_written_in_millimetres_and_on_request_in_metres_and_points(runs, tmp_path):
    run, _ = runs("depth")
    (tmp_path / "in").mkdir()
    image = np.random.default_rng(0).integers(0, 255, (33, 47, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    typed = ["mode=predict", f"model={run}", f"input={tmp_path / 'in'}", f"output={out}"]
    assert main([*typed, "output_also=[npy,ply]", "focal_px=50"]) == 0
    millimetres = np.asarray(Image.open(out / "depth" / "a.png"))
    metres = np.load(out / "depth" / "a.npy")
    assert millimetres.dtype == np.uint16 and millimetres.shape == metres.shape == (33, 47)
    np.testing.assert_allclose(millimetres / 1000, metres, atol=5.1e-4)
    np.testing.assert_array_equal(metres, dense_heads.load_model(run).predict(tmp_path / "in" / "a.png"))
    assert Image.open(out / "pictures" / "a.png").width == 47
    header, _, body = (out / "points" / "a.ply").read_bytes().partition(b"end_header\n")
    assert b"focal length 50.00 pixels (given)" in header and f"element vertex {33 * 47}".encode() in header
    points = np.frombuffer(body, dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    np.testing.assert_allclose(points["xyz"][:, 2].reshape(33, 47), metres)
    corner = points["xyz"][0]
    np.testing.assert_allclose(corner[:2], [-23 * corner[2] / 50, -16 * corner[2] / 50], rtol=1e-5)
    np.testing.assert_array_equal(points["rgb"], image.reshape(-1, 3))
    assert main([*typed, "output_also=[obj]"]) == 2


def test_dpt_serves_segmentation_too(tmp_path):
    from tests.factories import make_camvid

    typed = ["task=camvid", *TINY, "head=dpt", "head.channels=16", "data.image_size=56"]
    run = tmp_path / "run"
    assert main([*typed, f"data.root={make_camvid(tmp_path / 'data')}", f"run_dir={run}"]) == 0
    labels = dense_heads.load_model(run).predict(np.zeros((40, 60, 3), np.uint8))
    assert labels.shape == (40, 60) and labels.dtype == np.int64 and labels.max() < 11


def test_many_depth_heads_on_one_pass(tmp_path):
    run = tmp_path / "run"
    grid = ["head=grid", "head.heads=[linear_depth,linear4_depth]", "head.lr=[1e-3]"]
    data = make_depth_folders(tmp_path / "data")
    typed = ["task=depth", *TINY, *SMALL_CROP, *grid, f"data.root={data}", f"run_dir={run}"]
    assert main(typed) == 0
    rows = (run / "grid.csv").read_text().splitlines()
    assert len(rows) == 3 and "val/abs_rel" in rows[0]
    scores = [float(row.split(",")[rows[0].split(",").index("val/abs_rel")]) for row in rows[1:]]
    assert scores == sorted(scores)  # the least error first


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["data.depth_scale=1"], "scale"),
        (["data.root=/nowhere"], "nowhere"),
        (["head=linear_depth", "head.range=hub"], "no released depth heads"),
        (["task.evaluation.crop=egen"], "eigen"),
    ],
)
def test_mistakes_end_before_training(tmp_path, capsys, typed, words):
    data = make_depth_folders(tmp_path / "data")
    given = ["task=depth", *TINY, *SMALL_CROP, f"data.root={data}", f"run_dir={tmp_path / 'run'}", *typed]
    assert main(given) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.csv").exists()


@pytest.fixture(scope="module")
def vits():
    return dense_heads.load_backbone("vits14", None)


def released(path, head):
    torch.save({"state_dict": {f"decode_head.{key}": value for key, value in head.state_dict().items()}}, path)
    return path


@pytest.mark.parametrize(
    ("dataset", "asked", "largest"),
    [("nyu", None, 10.0), ("nyu", "hub", 80.0), ("kitti", None, 80.0), ("nyu", (0.5, 4.0), 4.0)],
)
def test_a_released_linear_head_has_the_range_that_was_asked_for(tmp_path, vits, dataset, asked, largest):
    head = LinearDepthHead([384])
    file = released(tmp_path / f"dinov2_vits14_{dataset}_linear_head.pth", head)
    model = dense_heads.load_head("linear_depth", backbone=vits, weights=file, range=asked)
    assert model.head.max_m == largest == model.card.head["arguments"]["max_m"]
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    depth = model.predict(image)
    assert depth.shape == (40, 60) and depth.dtype == np.float32 and 0 < depth.min() and depth.max() <= largest
    batch = torch.randn(2, 3, 30, 45)
    assert model(batch).shape == (2, 30, 45)


def test_the_ranges_are_told_of_once_and_loud_enough_for_programs(tmp_path, vits, monkeypatch):
    """A warning: where no logging has been set up, as in a notebook, nothing less is shown."""
    told = []
    monkeypatch.setattr(heads.log, "warning", told.append)
    heads._tell_of_range.cache_clear()
    file = released(tmp_path / "dinov2_vits14_nyu_linear_head.pth", LinearDepthHead([384]))
    for asked, number in (("hub", 0), ((0.5, 4.0), 0), (None, 1), (None, 1)):
        dense_heads.load_head("linear_depth", backbone=vits, weights=file, range=asked)
        assert len(told) == number
    assert "10 m reproduces the published numbers, head.range=hub what the hub entry gives" in told[0]


def test_a_released_dpt_predicts_at_once(tmp_path, vits):
    head = DPTHead([384] * 4, min_m=0.001, max_m=10.0)
    file = released(tmp_path / "dinov2_vits14_nyu_dpt_head.pth", head)
    model = dense_heads.load_head("dpt", backbone=vits, weights=file)
    assert model.card.task == "nyu_depth" and model.predict(np.zeros((28, 42, 3), np.uint8)).shape == (28, 42)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), model.head.parameters(), strict=True))


@pytest.mark.skipif(not (DATA / "nyu_depth_v2").is_dir(), reason="the shared samples are not here")
def test_the_real_sample_in_the_official_layout_runs(tmp_path):
    run = tmp_path / "run"
    typed = ["task=nyu_depth", *TINY, *SMALL_CROP, f"data.root={DATA / 'nyu_depth_v2'}", f"run_dir={run}"]
    assert main(typed) == 0
    published = json.loads((run / "metrics.json").read_text())["published"]
    assert published is None  # there is none for the small in-house backbone
