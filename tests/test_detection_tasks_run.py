"""Detection through the real command: every task on its layout, every verb, mistakes."""

import contextlib
import io
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file

import dense_heads
from dense_heads.__main__ import main
from dense_heads.data.detection_transforms import DetectionEvalTransform
from dense_heads.models.detector import DetectionInference
from dense_heads.ops import masks
from dense_heads.paths import TASKS_DIR
from tests.factories import fake_objects, make_coco, make_voc_xml, make_yolo, save

TINY = [
    "backbone=vitn14_reg", "backbone.weights=null", "backbone.precision=float32", "debug=fast",
    "trainer.accelerator=cpu", "data.batch_size=2",
]  # fmt: skip
SMALL = ["data.image_size=[56,84]", "head.channels=32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Task -> (run folder, data), trained on first use."""
    torch.set_num_threads(1)
    made = {}

    def run(task, make=make_coco, own=(), name=None):
        key = name or task
        if key not in made:
            folder = tmp_path_factory.mktemp(key)
            root = make(folder / "data")
            typed = [f"task={task}", *TINY, *SMALL, *own, f"data.root={root}", f"run_dir={folder / 'run'}"]
            assert main(typed) == 0
            made[key] = folder / "run", root
        return made[key]

    return run


MASKS = [
    "head=mask_rcnn",
    "head.hidden=32",
    "head.mask_channels=16",
    "task.masks=true",
    "task.metrics.primary=mask_map",
]
SET = [
    "head=plain_detr",
    "head.windows=2",
    "head.blocks=quarters",
    "head.hidden=32",
    "head.decoder_layers=2",
    "head.queries=20",
    "head.extra_queries=10",
]
KINDS = {
    "coco": ("detection", make_coco, ["head=faster_rcnn", "head.hidden=32"]),
    "masks": ("detection", make_coco, [*MASKS, "task.evaluation.box_as_mask=true", "head.score_thresh=0.01"]),
    "yolo": ("detection", make_yolo, []),
    "voc": ("voc2007_detection", make_voc_xml, []),
    "set": ("detection", make_coco, SET),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_trained_measured_and_measured_again_alike(runs, kind):
    task, make, own = KINDS[kind]
    run, _ = runs(task, make, own, kind)
    found = json.loads((run / "metrics.json").read_text())
    primary = {"masks": "mask_map", "voc": "voc_map_50"}.get(kind, "map")
    assert found["family"] == "detection" and found["primary"] == f"val/{primary}" and found["direction"] == "max"
    assert 0 <= found["metrics"]["val/map"] <= 1 and "COCO" in found["conventions"]
    assert (run / "report.html").stat().st_size > 1000 and list((run / "pictures" / "val").glob("*.png"))
    names = [row["name"] for row in found["per_class"]]
    assert names[:3] == (["aeroplane", "bicycle", "bird"] if kind == "voc" else ["disc", "square", "ring"])
    card = json.loads((run / "card.json").read_text())
    assert card["classes"] == names and card["num_outputs"] == len(names)
    assert main(["mode=evaluate", f"model={run}"]) == 0
    (again,) = (run / "evaluate").iterdir()
    assert json.loads((again / "metrics.json").read_text())["metrics"] == found["metrics"]
    header = (run / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss" in header and "val/map" in header


OF_COCO = {"splits": ("train2017", "val2017"), "classes": ("person", "car", "dog")}
OF_NUCLEI = {"annotations": "instances_{}.json", "images": "images/{}", "splits": ("training", "validation")}
BENCHMARKS = {  # of those, voc2007_detection stands among the formats
    "bccd": (partial(make_coco, classes=("RBC", "WBC", "Platelets")), []),
    "coco_detection": (partial(make_coco, **OF_COCO), []),
    "coco_instance": (partial(make_coco, **OF_COCO), MASKS[1:3]),
    "nuclei_instance": (partial(make_coco, **OF_NUCLEI, classes=("nucleus",)), MASKS[1:3]),
    "scenes_detection": (lambda root: root, [f"task.data.format.{key}" for key in ("num_train=4", "num_val=2")]),
}


@pytest.mark.parametrize("task", BENCHMARKS)
def test_every_benchmark_trains_on_its_layout(tmp_path, task):
    """With its own head, classes, transforms and metrics: only widths and lengths are made small."""
    make, own = BENCHMARKS[task]
    typed = [*TINY, *SMALL, *own, f"data.root={make(tmp_path / 'data')}", f"run_dir={tmp_path / 'run'}"]
    assert main([f"task={task}", *typed]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["primary"] in found["metrics"] and found["metrics"]["val/map"] is not None
    assert ("val/mask_map" in found["metrics"]) == ("hidden" in str(own))
    names = (TASKS_DIR / task / "classes.txt").read_text().splitlines()
    assert [row["name"] for row in found["per_class"]] == [line.split("\t")[0] for line in names]


def test_predictions_are_coco_files_that_pycocotools_reads(runs, tmp_path):
    run, _ = runs(*KINDS["masks"], "masks")
    image = fake_objects(5, (60, 90))[0]
    save(tmp_path / "in" / "a.png", image)
    save(tmp_path / "in" / "b" / "c.jpg", fake_objects(6, (84, 70))[0])
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    typed = ["mode=predict", f"model={run}", f"input={tmp_path / 'in'}", f"output={out}"]
    assert main([*typed, "head.score_thresh=0.01"]) == 0
    assert Image.open(out / "pictures" / "a.png").size == (90, 60) and (out / "pictures" / "b" / "c.png").is_file()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(out / "detections.json"))
        results = truth.loadRes(str(out / "results.json"))
        evaluation = COCOeval(truth, results, "segm")
        evaluation.evaluate()
    assert [record["file_name"] for record in truth.dataset["images"]] == ["a", "b/c"]
    assert [record["name"] for record in truth.dataset["categories"]] == ["disc", "square", "ring"]
    model = dense_heads.load_model(run)
    expected = model.predict(tmp_path / "in" / "a.png")
    kept = expected["scores"] >= 0.05
    ours = results.loadAnns(results.getAnnIds([1]))
    assert len(ours) == kept.sum()
    for record, box, label, score, mask in zip(
        ours, *(expected[key][kept] for key in ("boxes", "labels", "scores", "masks")), strict=True
    ):
        corner = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        np.testing.assert_allclose(record["bbox"], corner, atol=1e-3)
        assert record["category_id"] == label + 1 and abs(record["score"] - score) < 1e-5
        np.testing.assert_array_equal(results.annToMask(record), mask)


def test_a_large_image_is_looked_at_in_windows(runs, tmp_path):
    """At its own size; typed for a run that was trained without, and the same objects as the model finds in Python."""
    run, _ = runs(*KINDS["masks"], "masks")
    save(tmp_path / "in" / "large.png", fake_objects(8, (112, 168), num=9)[0])
    windows = {"window": 56, "stride": 28, "merge_iou": 0.4}
    looks = [f"task.inference.{key}={value}" for key, value in windows.items()]
    typed = ["mode=predict", f"model={run}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", *looks]
    assert main([*typed, "task.transforms.eval.size=null"]) == 0
    model = dense_heads.load_model(run)
    model.transform = DetectionEvalTransform()
    whole = model.predict(tmp_path / "in" / "large.png")
    model.inference = DetectionInference(**windows)
    expected = model.predict(tmp_path / "in" / "large.png")
    assert len(expected["scores"]) and not np.array_equal(expected["boxes"], whole["boxes"])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    kept = expected["boxes"][expected["scores"] >= 0.05]
    corners = [[box[0], box[1], box[0] + box[2], box[1] + box[3]] for box in (record["bbox"] for record in found)]
    np.testing.assert_allclose(corners, kept, atol=1e-3)


def test_raw_category_ids_are_the_data_sets_own(runs, tmp_path):
    run, root = runs(*KINDS["coco"], "coco")
    typed = ["mode=predict", f"model={run}", f"input={root / 'val'}", f"output={tmp_path}", "output_ids=raw"]
    assert main(typed) == 0
    content = json.loads((tmp_path / "detections.json").read_text())
    assert [(one["id"], one["name"]) for one in content["categories"]] == [(2, "disc"), (5, "square"), (9, "ring")]
    assert {record["category_id"] for record in content["annotations"]} <= {2, 5, 9}


def test_a_run_scores_as_pycocotools_does_on_its_predictions(runs, tmp_path):
    """End to end: predictions by the command, the data set's own file, pycocotools; and the run's own number."""
    run, root = runs(*KINDS["masks"], "masks")
    typed = ["mode=predict", f"model={run}", f"input={root / 'val'}", f"output={tmp_path}", "output_ids=raw"]
    assert main(typed) == 0
    found = json.loads((run / "metrics.json").read_text())["metrics"]
    model = dense_heads.load_model(run)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / "annotations" / "instances_val.json"))
        truth.dataset.setdefault("info", {})
        by_name = {record["file_name"]: record for record in truth.dataset["images"]}
        results = []
        for path in sorted((root / "val").glob("*.png")):
            one = model.predict(path)
            for box, score, label, mask in zip(
                *(one[key] for key in ("boxes", "scores", "labels", "masks")), strict=True
            ):
                x0, y0, x1, y1 = (float(value) for value in box)
                results.append(
                    {
                        "image_id": by_name[path.name]["id"],
                        "category_id": (2, 5, 9)[label],
                        "score": float(score),
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "segmentation": masks.to_coco(masks.encode(mask), mask.shape),
                    }
                )
        scores = {}
        for kind, prefix in (("bbox", ""), ("segm", "mask_")):
            evaluation = COCOeval(truth, truth.loadRes(results), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores[prefix] = evaluation.stats
    for prefix, stats in scores.items():
        for name, place in (("map", 0), ("map_50", 1), ("mar_100", 8)):
            ours = found[f"val/{prefix}{name}"]
            assert (stats[place] < 0 and ours is None) or abs(ours - stats[place]) < 1e-6


def test_many_heads_on_one_pass(tmp_path):
    run, data = tmp_path / "run", make_coco(tmp_path / "data")
    grid = ["head=grid", "head.heads=[fcos,faster_rcnn,plain_detr]", "head.lr=[1e-3]", "+head.arguments.channels=32"]
    typed = ["task=detection", *TINY, *grid, "data.image_size=[56,84]", f"data.root={data}", f"run_dir={run}"]
    assert main([*typed, "cache=memory", "cache.views=1"]) == 0
    rows = (run / "grid.csv").read_text().splitlines()
    assert len(rows) == 4 and "val/map" in rows[0]
    assert main(["mode=predict", f"model={run}", f"input={data / 'val'}", f"output={tmp_path / 'out'}"]) == 0


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path):
    data = make_coco(tmp_path / "data")
    typed = ["task=detection", *TINY, *SMALL, "head=faster_rcnn", "head.hidden=32", f"data.root={data}"]
    steps = ["trainer.val_check_interval=2", "trainer.max_steps=4"]
    assert main([*typed, *steps, f"run_dir={tmp_path / 'whole'}"]) == 0
    assert main([*typed, *steps, f"run_dir={tmp_path / 'part'}"]) == 0
    for path in (tmp_path / "part" / "checkpoints").glob("step=00000004.ckpt"):
        path.unlink()
    assert main(["mode=fit", f"resume={tmp_path / 'part'}"]) == 0
    one, other = (load_file(tmp_path / name / "head.safetensors") for name in ("whole", "part"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["head=linear"], "head=linear predicts maps"),
        (["head=mask_rcnn"], "Set task.masks=true"),
        (["task.masks=true"], "Use head=mask_rcnn"),
        (["task.loss.weights={classificaton: 2}"], "classification"),
        (["backbone.patch_fit=crop"], "cuts off the border"),
        (["data.root=/nowhere"], "nowhere"),
        (["task.num_classes=5"], "there are 3 classes"),
        (["task.metrics.primary=mapp"], "Did you mean 'map'"),
        (["head.strides=[14,56]"], "expected neighbours"),
        (["task.inference.window=0"], "window=0"),
    ],
)
def test_mistakes_end_before_training(tmp_path, capsys, typed, words):
    data = make_coco(tmp_path / "data", train=2, val=1)
    head = [] if any(one.startswith("head=") for one in typed) else SMALL[1:]
    given = ["task=detection", *TINY, SMALL[0], *head, f"data.root={data}", f"run_dir={tmp_path / 'run'}", *typed]
    assert main(given) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_detection_head_is_refused_where_maps_are_wanted(tmp_path, capsys):
    assert main(["task=nuclei", "head=fcos", *TINY, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "head=fcos finds objects" in capsys.readouterr().err


def test_cached_features_train_and_measure_as_images_do(tmp_path):
    """Without chance in the transforms, in float32: the same steps on features from memory and disk as on images."""
    data = make_coco(tmp_path / "data", sizes=((84, 112), (98, 70)))
    typed = ["task=detection", *TINY, *SMALL, *MASKS, f"data.root={data}", "data.augment=false"]
    found = {}
    for cache in ("off", "memory", "disk"):
        run, own = tmp_path / cache, [f"cache={cache}"]
        own += [] if cache == "off" else ["cache.dtype=float32"]
        own += [f"cache.dir={tmp_path / 'features'}"] if cache == "disk" else []
        assert main([*typed, *own, f"run_dir={run}"]) == 0
        found[cache] = json.loads((run / "metrics.json").read_text())["metrics"]
    for cache in ("memory", "disk"):
        assert found[cache] == pytest.approx(found["off"], abs=1e-4, nan_ok=True)
    views = ["cache=memory", "cache.views=2", f"run_dir={tmp_path / 'views'}"]
    assert main([*typed[:-1], *views]) == 0
