"""Average precision against pycocotools and against a plain reading of VOC's rules."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.multiprocessing.spawn import start_processes

from dense_heads.errors import UserError
from dense_heads.metrics.detection import COCO_SCORES, DetectionMetrics, conventions, score_names
from dense_heads.metrics.voc import VocPrecision
from dense_heads.ops import masks

SIZE = (120, 160)
NUM_CLASSES = 6  # of which two are never annotated, one is never predicted


def boxes_of(rng, num):
    x, y = rng.uniform(0, SIZE[1] - 12, num), rng.uniform(0, SIZE[0] - 12, num)
    w, h = rng.uniform(3, 110, num), rng.uniform(3, 110, num)
    return np.stack([x, y, np.minimum(x + w, SIZE[1]), np.minimum(y + h, SIZE[0])], 1)


def ellipse(box):
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    across, down = (
        (columns - (box[0] + box[2]) / 2) / (box[2] - box[0]),
        (rows - (box[1] + box[3]) / 2) / (box[3] - box[1]),
    )
    return across**2 + down**2 <= 0.25


def world(seed, num_images=9):
    """Random objects (with crowds and images without any) and random detections, some of them near objects."""
    rng = np.random.default_rng(seed)
    images = []
    for index in range(num_images):
        num = 0 if index % 4 == 3 else int(rng.integers(1, 8))
        boxes, labels = boxes_of(rng, num), rng.integers(0, NUM_CLASSES - 2, num)
        near = rng.random(num) < 0.8
        more = int(rng.integers(0, 5))
        found = np.concatenate([boxes[near] + rng.normal(0, 2, (near.sum(), 4)), boxes_of(rng, more)])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        kinds = np.concatenate([labels[near], rng.integers(1, NUM_CLASSES, more)])
        kinds[kinds == 0] = 1
        codes = [masks.encode(ellipse(box)) for box in boxes]
        target = {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(labels),
            "iscrowd": torch.from_numpy(rng.random(num) < 0.2),
            "difficult": torch.from_numpy(rng.random(num) < 0.3),
            "area": torch.tensor([masks.area(code, SIZE) + 0.25 for code in codes], dtype=torch.float64),
            "mask_codes": tuple(codes),
        }
        scores = np.round(rng.random(len(found)), 1 if seed % 2 else 6).astype(np.float32)  # ties in every other world
        prediction = {
            "boxes": torch.from_numpy(found),
            "labels": torch.from_numpy(kinds),
            "scores": torch.from_numpy(scores),
        }
        images.append((target, prediction, [masks.encode(ellipse(box)) for box in found]))
    return images


def target_of(boxes):
    """Plain objects of class 0."""
    num = len(boxes)
    no = torch.zeros(num, dtype=torch.bool)
    area = torch.full((num,), 64.0, dtype=torch.float64)
    labels = torch.zeros(num, dtype=torch.long)
    return {"boxes": boxes, "labels": labels, "iscrowd": no, "difficult": no, "area": area, "mask_codes": ()}


def reference(images, kind, max_detections=(1, 10, 100)):
    """pycocotools on the same objects and detections: its twelve numbers, and its table of precisions."""
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(len(images))],
        "categories": [{"id": k, "name": str(k)} for k in range(NUM_CLASSES)],
        "annotations": [],
    }
    results = []
    for i, (target, prediction, codes) in enumerate(images):
        for j, box in enumerate(target["boxes"].tolist()):
            truth.dataset["annotations"].append(
                {
                    "id": len(truth.dataset["annotations"]) + 1,
                    "image_id": i,
                    "category_id": int(target["labels"][j]),
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": float(target["area"][j]),
                    "iscrowd": int(target["iscrowd"][j]),
                    "segmentation": masks.to_coco(target["mask_codes"][j], SIZE),
                }
            )
        for j, box in enumerate(prediction["boxes"].tolist()):
            own = {"bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
            if kind == "segm":
                own = {"segmentation": masks.to_coco(codes[j], SIZE)}
            score, category = float(prediction["scores"][j]), int(prediction["labels"][j])
            results.append({"image_id": i, "category_id": category, "score": score, **own})
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.params.maxDets = list(max_detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def counted(images, **options):
    metrics = DetectionMetrics([str(k) for k in range(NUM_CLASSES)], **options)
    for target, prediction, codes in images:
        metrics.coco.count(prediction, codes, target, SIZE)
    return metrics.compute()


@pytest.mark.parametrize("seed", range(6))
def test_boxes_and_masks_score_as_in_pycocotools(seed):
    images = world(seed)
    scores, rows = counted(images, with_masks=True)
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        theirs = reference(images, kind)
        ours = np.array([scores[prefix + name] for name in COCO_SCORES])
        expected = np.where(theirs.stats < 0, np.nan, theirs.stats)
        np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=0)
        for label, row in enumerate(rows):
            precision = theirs.eval["precision"][:, :, label, 0, -1]
            for name, some in (("map", precision), ("map_50", precision[0])):
                expected = some[some > -1].mean() if (some > -1).any() else np.nan
                np.testing.assert_allclose(row[prefix + name], expected, atol=1e-6, rtol=0)
    assert scores["map"] > 0.05 and np.isnan(rows[-1]["map"])


def test_boxes_alone_score_the_same():
    images = world(3)
    with_masks, boxes = counted(images, with_masks=True)[0], counted(images)[0]
    assert {name: with_masks[name] for name in boxes} == pytest.approx(boxes, abs=1e-9, nan_ok=True)


def test_more_detections_than_a_hundred_count_where_asked():
    rng = np.random.default_rng(0)
    boxes = torch.from_numpy(np.stack(np.meshgrid(np.arange(15), np.arange(11)), -1).reshape(-1, 2) * 10.0)
    boxes = torch.cat([boxes, boxes + 8], 1)
    num = len(boxes)
    target = target_of(boxes)
    prediction = {"boxes": boxes, "labels": target["labels"], "scores": torch.from_numpy(rng.random(num))}
    found = {}
    for last in (100, 300):
        metrics = DetectionMetrics(["one"], max_detections=[1, 10, last])
        metrics.count(prediction, target, SIZE)
        found[last] = metrics.compute()[0]
    assert found[100]["map"] == pytest.approx(61 / 101, abs=0.01) and found[300]["map"] == pytest.approx(1)
    assert found[300]["mar_300"] == pytest.approx(1) and found[100]["mar_100"] == pytest.approx(100 / num)


def test_without_detections_or_objects():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    target = target_of(torch.zeros(0, 4))
    metrics = DetectionMetrics(["a", "b"], with_masks=True, voc=True, box_as_mask=True)
    metrics.count({**nothing, "masks": torch.zeros(0, 28, 28)}, target, SIZE)
    scores, rows = metrics.compute()
    assert np.isnan(scores["map"]) and np.isnan(scores["voc_map_50"]) and np.isnan(rows[0]["mask_map_50"])
    images = [(target_, nothing, []) for target_, _, _ in world(0)]
    assert counted(images, with_masks=True)[0]["map"] == 0


def test_boxes_taken_for_masks_score_below_the_masks():
    images = world(2)
    metrics = DetectionMetrics([str(k) for k in range(NUM_CLASSES)], with_masks=True, box_as_mask=True)
    side = torch.linspace(-1, 1, 28)
    round_mask = (side[:, None] ** 2 + side**2 <= 1).float()
    for target, prediction, _ in images:
        metrics.count({**prediction, "masks": round_mask.expand(len(prediction["boxes"]), -1, -1)}, target, SIZE)
    scores, _ = metrics.compute()
    assert set(scores) == set(score_names(True, (1, 10, 100), True, False))
    assert 0 < scores["box_as_mask_map"] < scores["mask_map"]


def voc_reference(images, num_classes):
    """The rules again, the plain way: one class at a time, one detection after the other."""
    precisions = []
    for label in range(num_classes):
        rows, num, taken = [], 0, set()
        for i, (target, prediction, _) in enumerate(images):
            num += int(((target["labels"] == label) & ~target["difficult"]).sum())
            rows += [(float(s), i, b) for s, b, k in zip(prediction["scores"], prediction["boxes"].tolist(),
                                                        prediction["labels"], strict=True) if k == label]  # fmt: skip
        hits = []
        for _, i, box in sorted(rows, key=lambda row: -row[0]):
            best, place = 0.0, None
            for j, other in enumerate(images[i][0]["boxes"].tolist()):
                if images[i][0]["labels"][j] != label:
                    continue
                w = min(box[2], other[2]) - max(box[0], other[0])
                h = min(box[3], other[3]) - max(box[1], other[1])
                area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
                overlap = w * h / (area - w * h) if w > 0 and h > 0 else 0.0
                if overlap > best:
                    best, place = overlap, j
            if best >= 0.5 and images[i][0]["difficult"][place]:
                continue
            hits.append(best >= 0.5 and (i, place) not in taken)
            if best >= 0.5:
                taken.add((i, place))
        if num == 0:
            precisions.append(np.nan)
            continue
        points = []
        for at in np.arange(0.0, 1.1, 0.1):
            reached = [sum(hits[: n + 1]) / (n + 1) for n in range(len(hits)) if sum(hits[: n + 1]) / num >= at]
            points.append(max(reached, default=0.0))
        precisions.append(sum(points) / 11)
    return precisions


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_vocs_eleven_points_with_difficult_objects(seed):
    images = world(seed)
    metric = VocPrecision(NUM_CLASSES)
    for target, prediction, _ in images:
        metric.count(prediction, target)
    ours, theirs = metric.compute(), voc_reference(images, NUM_CLASSES)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert np.isnan(ours[-1]) and np.nanmean(ours) > 0.1


def _count_share(rank, folder, images):
    torch.set_num_threads(1)  # threads of a forked process's parent are not there
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.save(_scored(images[rank::2]), folder / f"rank{rank}")
    torch.distributed.destroy_process_group()


def _scored(images):
    metrics = DetectionMetrics([str(k) for k in range(NUM_CLASSES)], with_masks=True, box_as_mask=True, voc=True)
    for target, prediction, _ in images:
        metrics.count({**prediction, "masks": torch.ones(len(prediction["boxes"]), 28, 28)}, target, SIZE)
    return metrics.compute()


@pytest.mark.parametrize("num_images", [9, 1])
def test_two_processes_measure_what_one_does(tmp_path, num_images):
    """Shares are unequal, one may be empty; scores with ties, so the order of images counts too."""
    images = world(1, num_images)
    start_processes(_count_share, (tmp_path, images), nprocs=2, start_method="fork")
    (scores, rows), nan = _scored(images), {"nan_ok": True, "abs": 0}
    assert scores["map"] > 0 and scores["voc_map_50"] > 0
    for rank in (0, 1):
        shared, own = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        assert shared == pytest.approx(scores, **nan)
        for row, expected in zip(own, rows, strict=True):
            assert row.pop("name") == expected["name"]
            assert row == pytest.approx({key: value for key, value in expected.items() if key != "name"}, **nan)


def test_conventions_say_what_was_asked():
    assert "mask_" in conventions(True, False) and "voc_map_50" in conventions(False, True)
    assert "mask_" not in conventions(False, False)
    with pytest.raises(UserError, match="three ascending"):
        DetectionMetrics(["a"], max_detections=[10, 1, 100])
