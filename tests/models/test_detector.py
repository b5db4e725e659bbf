"""Images of unequal sizes in one batch, windows, mirror images: the same objects as one by one."""

import numpy as np
import pytest
import torch
from torch import nn

import dense_heads
from dense_heads.data.detection_transforms import DetectionEvalTransform
from dense_heads.errors import UserError
from dense_heads.heads.detection import DetectionHead
from dense_heads.heads.fcos import FCOSDetector
from dense_heads.heads.linear import LinearHead
from dense_heads.heads.plain_detr import PlainDETR
from dense_heads.heads.rcnn import RCNNDetector
from dense_heads.models.dense import FrozenBackbone
from dense_heads.models.detector import DetectionInference, Detector, check_fit, check_head, detections
from tests.factories import fake_objects

SIZES = [(84, 112), (98, 70), (75, 101)]


@pytest.fixture(scope="module")
def backbone():
    torch.set_num_threads(1)
    return FrozenBackbone(dense_heads.load_backbone("vitn14_reg", None), "pad")


def lively(head, seed=0):
    """Random weights that answer: scores spread out, so that their order is no matter of rounding."""
    generator = torch.Generator().manual_seed(seed)
    spread = 1 if isinstance(head, PlainDETR) else 2  # it corrects corrections: with more its boxes leave the image
    for parameter in head.parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=spread / parameter[0].numel() ** 0.5, generator=generator)
    return head.eval()


HEADS = {
    "fcos": lambda: FCOSDetector([192], 4, channels=32, num_convs=1),
    "faster_rcnn": lambda: RCNNDetector([192], 4, channels=32, hidden=64, proposals=100),
    "mask_rcnn": lambda: RCNNDetector([192], 4, channels=32, hidden=64, mask_channels=16, proposals=100),
    "plain_detr": lambda: PlainDETR([192], 4, channels=32, num_heads=4, hidden=64, bias_hidden=16, queries=30),
}


def images(sizes):
    made = []
    for seed, size in enumerate(sizes):
        made += DetectionEvalTransform()(fake_objects(seed, size)[0])
    return made


def found(backbone, head, views, how=None, factor=2):
    sizes = [(view.shape[-2] * factor, view.shape[-1] * factor) for view in views]
    with torch.inference_mode():
        return detections(backbone, [head], [[view] for view in views], sizes, how or DetectionInference())[0]


def assert_same(one, other):
    assert torch.equal(one["labels"], other["labels"])
    assert (one["boxes"] - other["boxes"]).abs().max() < 1e-2
    assert (one["scores"] - other["scores"]).abs().max() < 1e-4
    if "masks" in one:
        assert (one["masks"] - other["masks"]).abs().max() < 1e-3


@pytest.mark.parametrize("name", HEADS)
def test_images_of_unequal_sizes_are_seen_as_if_alone(backbone, name):
    torch.manual_seed(0)
    head, views = lively(HEADS[name]()), images(SIZES)
    alone = [found(backbone, head, [view])[0] for view in views]
    assert all(len(one["scores"]) > 5 for one in alone)
    for together in ([0], [0, 1], [0, 1, 2], [2, 1, 0]):
        batch = found(backbone, head, [views[place] for place in together])
        for place, one in zip(together, batch, strict=True):
            assert_same(one, alone[place])


@pytest.mark.parametrize("name", HEADS)
def test_images_of_equal_sizes_share_a_pass(backbone, name):
    """A matrix product of two images rounds otherwise than one of one: of scores that are nearly equal, either may
    come first, so each object is compared with the one that is nearest to it."""
    torch.manual_seed(0)
    head, views = lively(HEADS[name]()), images(SIZES)
    alone = [found(backbone, head, [view])[0] for view in views]
    together = [2, 0, 2, 1, 0]
    for place, one in zip(together, found(backbone, head, [views[place] for place in together]), strict=True):
        other = alone[place]
        assert len(one["scores"]) == len(other["scores"])
        distance = (one["boxes"][:, None] - other["boxes"]).abs().amax(2)
        distance[one["labels"][:, None] != other["labels"]] = 1e6
        distance[(one["scores"][:, None] - other["scores"]).abs() > 1e-4] = 1e6
        assert distance.amin(1).max() < 1e-2 and distance.amin(0).max() < 1e-2


class Painted(DetectionHead):
    """A stand-in that finds the one bright square in its features, at patch resolution."""

    def __init__(self):
        super().__init__([1], 1)

    def detect(self, features, sizes):
        results = []
        for patches, size in zip(features.patch_maps[0], sizes, strict=True):
            rows, columns = torch.where(patches[0] > 0.5)
            boxes = torch.zeros(0, 4)
            if len(rows):
                corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                scale = torch.tensor([size[1] / patches.shape[2], size[0] / patches.shape[1]] * 2)
                boxes = (torch.stack(corners).float() * scale)[None]
            results.append({"boxes": boxes, "scores": torch.ones(len(boxes)), "labels": torch.zeros(len(boxes)).long()})
        return results


class Bright(nn.Module):
    """A backbone whose one feature says whether a patch is bright."""

    name, patch_size, embed_dim, num_registers, in_channels, num_blocks = "vitn14_reg", 14, 1, 0, 3, 8

    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()

    def block_outputs(self, images, blocks):
        patches = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 14).flatten(2).transpose(1, 2)
        return {block: torch.cat([patches[:, :1], patches], 1) for block in blocks}


@pytest.mark.parametrize(
    "box", [(28, 42, 70, 84), (98, 98, 140, 126), (126, 14, 154, 182), (0, 0, 28, 28), (56, 56, 210, 196)]
)
def test_windows_find_an_object_once_wherever_it_lies(box):
    """Whole where it fits into the overlap of windows; an object larger than that still once, by the merging."""
    image = torch.zeros(3, 196, 224)
    image[:, box[1] : box[3], box[0] : box[2]] = 1
    how = DetectionInference(window=112, stride=56, merge_iou=0.3)
    (one,) = found(FrozenBackbone(Bright()), Painted(), [image], how, factor=1)
    if max(box[2] - box[0], box[3] - box[1]) <= 56:
        assert one["boxes"].tolist() == [list(map(float, box))]
    else:  # larger than the overlap: what the windows see of it, all of it inside the object
        assert len(one["boxes"]) and (one["boxes"][:, :2] >= torch.tensor(box[:2])).all()
        assert (one["boxes"][:, 2:] <= torch.tensor(box[2:])).all()


def test_a_mirror_image_adds_nothing_to_a_sure_object():
    image = torch.zeros(3, 84, 112)
    image[:, 14:42, 28:70] = 1
    (one,) = found(FrozenBackbone(Bright()), Painted(), [image], DetectionInference(flip=True), factor=1)
    assert one["boxes"].tolist() == [[28, 14, 70, 42]]


def test_masks_are_mirrored_with_their_boxes(backbone):
    """The detections of the mirror image, looked at in the mirror, are those of the image."""
    head, (view,) = lively(HEADS["mask_rcnn"]()), images([(84, 112)])
    (straight,) = found(backbone, head, [view.flip(-1)], factor=1)
    (both,) = found(backbone, head, [view], DetectionInference(flip=True, merge_iou=1.0, detections=10_000), factor=1)
    mirrored = straight["boxes"].clone()
    mirrored[:, [0, 2]] = 112 - straight["boxes"][:, [2, 0]]
    distance, place = (both["boxes"][None] - mirrored[:5, None]).abs().amax(2).min(1)
    assert distance.max() < 1e-2
    assert (both["masks"][place] - straight["masks"][:5].flip(-1)).abs().max() < 1e-3


def test_what_does_not_find_objects_is_refused(backbone):
    with pytest.raises(UserError, match="head=fcos"):
        check_head(LinearHead([192], 3))
    with pytest.raises(UserError, match="patch_fit=crop"):
        check_fit(FrozenBackbone(backbone.backbone, "crop"))
    for wrong in ({"merge_iou": 0}, {"detections": 0}, {"window": 56, "stride": 57}):
        with pytest.raises(UserError, match="expected"):
            DetectionInference(**wrong)


def test_a_model_predicts_boxes_and_masks_at_the_images_own_size(backbone):
    from dense_heads.models.card import Card

    card = Card("detection", "t", {}, {}, 4, [], [], {}, {"size": 56, "patch_fit": "pad"}, {"detections": 9}, {})
    model = Detector(backbone, lively(HEADS["mask_rcnn"]()), card).eval()
    image = fake_objects(0, (60, 100))[0]
    one = model.predict(image)
    num = len(one["scores"])
    assert num and one["masks"].shape == (num, 60, 100) and one["masks"].dtype == np.bool_
    assert one["boxes"].max() <= 100 and (np.diff(one["scores"]) <= 0).all()
    batch = model(torch.stack(images([(56, 56), (56, 56)])))
    assert len(batch) == 2 and batch[0]["boxes"].max() <= 56
