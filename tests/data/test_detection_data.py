"""Augmentation of boxes and masks in step, samples and batches, class-aware sampling."""

import albumentations as A
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.ops import box_iou, masks_to_boxes

from dense_heads.data.datasets.coco import CocoJson
from dense_heads.data.detection import DetectionDataset, collate_eval, collate_train
from dense_heads.data.detection_transforms import (
    BoxCrop,
    DetectionEvalTransform,
    DetectionTrainPipeline,
    ScaleToFit,
    fitting_size,
)
from dense_heads.data.sampler import StepBatchSampler
from dense_heads.errors import UserError
from dense_heads.ops import masks
from tests.factories import fake_objects, make_coco, save


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return CocoJson(make_coco(tmp_path_factory.mktemp("coco"), sizes=((84, 112), (112, 90)))).samples("train")


def steps(size=(70, 98), ratio=(0.8, 1.4)):
    return {"flip": A.HorizontalFlip(p=0.5), "scale": ScaleToFit(size, ratio), "crop": BoxCrop(size)}


def train_set(samples, with_masks=True, seed=0, **options):
    return DetectionDataset(samples, DetectionTrainPipeline(steps(**options), (70, 98), with_masks), with_masks, seed)


def test_boxes_follow_the_pixels_of_their_masks(samples):
    """Where nothing was cut away, the box is the mask's own extent, whatever flip, scale and crop did."""
    data, whole = train_set(samples), 0
    for epoch in range(6):
        for index in range(len(samples)):
            item = data[epoch, index]
            assert item["image"].shape == (3, 70, 98) and item["boxes"].dtype == torch.float32
            assert len(item["boxes"]) == len(item["labels"]) == len(item["instance_masks"])
            if not len(item["labels"]):
                continue
            extent = masks_to_boxes(item["instance_masks"]) + torch.tensor([0, 0, 1, 1])
            assert (item["boxes"][:, 2:] <= torch.tensor([98, 70])).all() and (item["boxes"] >= 0).all()
            inner = (item["boxes"][:, :2] > 1).all(1) & (item["boxes"][:, 2:] < torch.tensor([97, 69])).all(1)
            assert ((item["boxes"] - extent).abs().amax(1)[inner] <= 2.5).all()  # the tip of a disc may be lost
            whole += int(inner.sum())
    assert whole > 30


def test_a_colour_stays_under_its_label(samples):
    """Independent of boxes and masks: the pixels in the middle of each mask have the class's own colour."""
    data = train_set(samples)
    colours = {0: (220, 60, 50), 1: (50, 90, 220), 2: (240, 220, 60)}
    for index in range(len(samples)):
        item = data[3, index]
        pixels = item["image"] * torch.tensor([58.395, 57.12, 57.375])[:, None, None]
        pixels = pixels + torch.tensor([123.675, 116.28, 103.53])[:, None, None]
        for label, mask in zip(item["labels"].tolist(), item["instance_masks"], strict=True):
            assert (pixels[:, mask].median(1).values - torch.tensor(colours[label])).abs().max() < 40


def test_items_are_functions_of_seed_epoch_and_index(samples):
    data, again, other = train_set(samples), train_set(samples), train_set(samples, seed=1)
    keys = [(0, 0), (0, 2), (1, 0)]
    items = {key: data[key] for key in keys}
    for key in reversed(keys):
        for name in ("image", "boxes", "labels", "instance_masks"):
            assert torch.equal(again[key][name], items[key][name])
    assert not torch.equal(items[0, 0]["image"], items[1, 0]["image"])
    assert not torch.equal(other[0, 0]["image"], items[0, 0]["image"])
    loads = [
        list(
            DataLoader(
                data, batch_sampler=[[(0, 0), (0, 1)], [(1, 2), (1, 3)]], collate_fn=collate_train, num_workers=n
            )
        )
        for n in (0, 2)
    ]
    for plain, worked in zip(*loads, strict=True):
        assert torch.equal(plain["image"], worked["image"])
        assert all(torch.equal(a, b) for a, b in zip(plain["boxes"], worked["boxes"], strict=True))


def test_crowds_and_difficult_objects_are_not_learnt(samples):
    from dataclasses import replace

    objects = samples[0].objects
    flags = np.zeros(len(objects), bool)
    flags[0] = True
    for name in ("iscrowd", "difficult"):
        marked = [replace(samples[0], objects=replace(objects, **{name: flags}))]
        whole = {"scale": ScaleToFit((70, 98))}
        item = DetectionDataset(marked, DetectionTrainPipeline(whole, (70, 98)))[0]
        np.testing.assert_array_equal(item["labels"], objects.labels[1:])
        label = DetectionDataset(marked, DetectionEvalTransform((70, 98)))[0]
        assert label[name].tolist() == flags.tolist() and len(label["labels"]) == len(objects)


def test_overlapping_masks_do_not_cut_each_other(tmp_path):
    """Objects that cover the same pixels keep them, though masks travel as layers of instance numbers."""
    from dense_heads.data.objects import DetectionSample, ObjectsBuilder, Repairs

    builder = ObjectsBuilder((60, 80), Repairs(tmp_path))
    squares = [(5, 5, 45, 45), (25, 25, 65, 55), (10, 10, 70, 50)]
    for x0, y0, x1, y1 in squares:
        builder.add("one", None, 0, outline=[[x0, y0, x1, y0, x1, y1, x0, y1]])
    image = save(tmp_path / "a.png", fake_objects(0, (60, 80))[0])
    sample = DetectionSample("a", image, objects=builder.build())
    item = DetectionDataset([sample], DetectionTrainPipeline({}, (60, 80), with_masks=True), True)[0]
    assert item["instance_masks"].sum((1, 2)).tolist() == [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in squares]
    assert item["boxes"].tolist() == [list(map(float, square)) for square in squares]


def test_evaluation_keeps_objects_at_the_size_on_disk(samples):
    data = DetectionDataset(samples, DetectionEvalTransform((70, 98)), with_masks=True)
    batch = collate_eval([data[0], data[1], data[3]])
    assert [tuple(image.shape[1:]) for image in batch["image"]] == [fitting_size(s, (70, 98)) for s in
                                                                  [(84, 112), (112, 90), (112, 90)]]  # fmt: skip
    assert tuple(batch["image"][0].shape) == (3, 70, 93)
    np.testing.assert_array_equal(batch["boxes"][0], samples[0].objects.boxes)
    assert batch["boxes"][0].dtype == torch.float64 and len(batch["boxes"][1]) == 0
    assert batch["coco_id"] == [7, 8, 10] and batch["original_size"].tolist() == [[84, 112], [112, 90], [112, 90]]
    shapes = np.array([masks.decode(code, (84, 112)) for code in batch["mask_codes"][0]])
    np.testing.assert_array_equal(shapes, fake_objects(0)[3])


def test_several_scales_become_views(samples):
    item = DetectionDataset(samples, DetectionEvalTransform(56, (1.0, 0.5)))[0]
    assert [tuple(view.shape) for view in item["views"]] == [(3, 42, 56), (3, 21, 28)] and "image" not in item
    assert DetectionEvalTransform()(np.zeros((30, 40, 3), np.uint8))[0].shape == (3, 30, 40)


def test_mistakes_are_said(samples):
    with pytest.raises(UserError, match="Add a BoxCrop step"):
        DetectionDataset(samples, DetectionTrainPipeline({}, (20, 20)))[0]
    for make in (lambda: ScaleToFit(56, (2, 1)), lambda: ScaleToFit((1, 2, 3)), lambda: DetectionEvalTransform(0)):
        with pytest.raises(UserError, match="expected"):
            make()


def test_rare_classes_are_drawn_as_often_as_others():
    groups = [[0]] * 90 + [[0, 1]] * 9 + [[]]
    sampler = StepBatchSampler(100, 10, seed=0, max_steps=300, groups=groups)
    drawn = [index for batch in sampler for _, index in batch]
    counts = np.bincount(drawn, minlength=100)
    shares = np.array([counts[:90].sum(), counts[90:99].sum(), counts[99]]) / len(drawn)
    # A third each: class 0 (of which a tenth falls on images with class 1), class 1, none.
    np.testing.assert_allclose(shares, [0.30, 0.36, 0.33], atol=0.04)
    assert len(set(drawn[:300])) > 60
    later = StepBatchSampler(100, 10, seed=0, max_steps=300, start_step=140, groups=groups)
    assert list(later) == list(sampler)[140:]
    shared = [StepBatchSampler(100, 10, 0, 300, rank=rank, world_size=2, groups=groups) for rank in (0, 1)]
    assert [a + b for a, b in zip(*map(list, shared), strict=True)] == list(sampler)


def test_masks_go_to_codes_and_back():
    rng = np.random.default_rng(0)
    for _ in range(100):
        size = tuple(rng.integers(1, 60, 2))
        mask = rng.random(size) < rng.random()
        code = masks.encode(mask)
        assert masks.num_pixels(code) == mask.size and masks.area(code, size) == mask.sum()
        np.testing.assert_array_equal(masks.decode(code, size), mask)
    for wrong in ("zz", "o", "\x00", "04é"):
        with pytest.raises(ValueError):
            assert masks.num_pixels(wrong) == 9408


def test_pasted_masks_and_filled_boxes_stand_where_their_boxes_are():
    boxes = torch.tensor([[10.0, 20, 50, 40], [0.0, 0, 30, 30]])
    whole = list(masks.pasted(torch.ones(2, 28, 28), boxes, (60, 80)))
    filled = list(masks.filled_boxes(boxes, (60, 80)))
    for mask, box, exact in zip(whole, boxes, filled, strict=True):
        assert exact.sum() == (box[2] - box[0]) * (box[3] - box[1])
        found = masks_to_boxes(torch.from_numpy(mask)[None]) + torch.tensor([0, 0, 1, 1])
        assert box_iou(found, box[None]).item() > 0.9
