"""Detection heads: where things stand in the pyramid, and that they learn what they are shown."""

from collections import OrderedDict

import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from dense_heads.errors import UserError
from dense_heads.heads.detection import Frame, finished, targets
from dense_heads.heads.fcos import FCOSDetector
from dense_heads.heads.plain_detr import PlainDETR
from dense_heads.heads.pyramid import STRIDES, PyramidAnchors, PyramidRoIAlign, SimplePyramid
from dense_heads.heads.rcnn import RCNNDetector
from dense_heads.losses.set_prediction import SetCriterion
from dense_heads.structures import Features, Padding

BOXES = torch.tensor([[100.0, 120, 130, 140], [60, 50, 300, 290], [30, 40, 400, 380], [100.3, 77.7, 160, 250]])


def ramp(size=448):
    """A pyramid whose two channels hold the x and y of each cell's centre, in pixels."""
    levels = OrderedDict()
    for number, stride in enumerate(STRIDES):
        centres = (torch.arange(size // stride) + 0.5) * stride
        grid = torch.meshgrid(centres, centres, indexing="ij")
        levels[str(number)] = torch.stack([grid[1], grid[0]])[None]
    return levels


def cell_centres(boxes, cells=7):
    share = (torch.arange(cells) + 0.5) / cells
    return [boxes[:, None, axis] + share * (boxes[:, None, axis + 2] - boxes[:, None, axis]) for axis in (0, 1)]


def test_pooling_reads_a_coordinate_ramp_to_the_pixel():
    """RoIAlign with the true scales: a box's cells hold their own coordinates, on whatever level it is."""
    pooled = PyramidRoIAlign(7, STRIDES)(ramp(), [BOXES], [(448, 448)])
    x, y = cell_centres(BOXES)
    torch.testing.assert_close(pooled[:, 0], x[:, None, :].expand(-1, 7, -1), atol=1e-3, rtol=0)
    torch.testing.assert_close(pooled[:, 1], y[:, :, None].expand(-1, -1, 7), atol=1e-3, rtol=0)
    levels = PyramidRoIAlign(7, STRIDES).mapper([BOXES])
    assert levels.tolist() == [0, 1, 1, 0] and PyramidRoIAlign(7, (14, 28)).mapper([BOXES]).tolist() == [0, 0, 0, 0]


def test_torchvisions_own_pooler_would_not():
    """The reason for ours: scales rounded to powers of two, and half a cell of offset."""
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(ramp(), [BOXES], [(448, 448)])
    x, _ = cell_centres(BOXES)
    assert (theirs[:, 0] - x[:, None, :]).abs().max() > 5


def test_anchors_are_centred_on_their_cells_and_not_rounded():
    levels = list(ramp(112).values())
    make = PyramidAnchors([[stride] for stride in STRIDES], [1.0], STRIDES)
    (anchors,) = make(ImageList(levels[0], [(112, 112)]), levels)
    assert anchors[0].tolist() == [0, 0, 7, 7] and anchors[256].tolist() == [0, 0, 14, 14]
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    torch.testing.assert_close(centres, torch.cat([level[0].flatten(1).T for level in levels]))
    several = PyramidAnchors([[32]] * 4, [0.5, 2.0], STRIDES).cell_anchors[0]
    sides = several[:, 2:] - several[:, :2]
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(sides.prod(1), torch.full((2,), 1024.0))


def test_the_pyramid_covers_grids_of_any_size():
    features = seen(rows=5, columns=7, image=(70, 98))
    levels = SimplePyramid([24, 24], 32)(features)
    assert [tuple(level.shape) for level in levels.values()] == [
        (2, 32, 16, 16),
        (2, 32, 8, 8),
        (2, 32, 4, 4),
        (2, 32, 2, 2),
    ]
    assert [level.shape[-1] for level in SimplePyramid([24, 24], 32, (14, 28))(features).values()] == [8, 4]
    for wrong in ((14, 7), (7, 28), (), (8,)):
        with pytest.raises(UserError, match="expected neighbours"):
            SimplePyramid([24], 32, wrong)


def seen(rows=6, columns=8, image=(84, 112), padding=None, levels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = tuple(torch.randn(2, 24, rows, columns, generator=generator) for _ in range(levels))
    return Features(maps, tuple(torch.zeros(2, 24) for _ in maps), image, padding or Padding())


def test_boxes_go_into_the_grid_and_come_back():
    boxes = torch.tensor([[3.0, 4, 50, 60], [0, 0, 100, 75]])
    padded = Frame.of(seen(image=(75, 100), padding=Padding(6, 4, 6, 5)))
    assert padded.size == (84, 112) and padded.scale == (1, 1)
    torch.testing.assert_close(padded.enter(boxes), boxes + torch.tensor([6.0, 4, 6, 4]))
    torch.testing.assert_close(padded.leave(padded.enter(boxes), (150, 300)), boxes * torch.tensor([3.0, 2, 3, 2]))
    resized = Frame.of(seen(image=(80, 110)))
    torch.testing.assert_close(resized.enter(torch.tensor([[55.0, 40, 110, 80]])), torch.tensor([[56.0, 42, 112, 84]]))
    torch.testing.assert_close(resized.leave(resized.enter(boxes), (80, 110)), boxes)


def test_what_lies_in_the_padding_alone_is_dropped():
    features = seen(image=(70, 98), padding=Padding(7, 7, 7, 7))
    found = {"boxes": torch.tensor([[0.0, 0, 7, 7], [0, 0, 20, 20]]), "scores": torch.tensor([0.9, 0.8])}
    (left,) = finished([found], features, [(70, 98)])
    assert left["boxes"].tolist() == [[0, 0, 13, 13]] and left["scores"].tolist() == pytest.approx([0.8])


def test_targets_carry_masks_into_the_grid():
    features = seen(image=(75, 100), padding=Padding(6, 4, 6, 5))
    masks = torch.zeros(1, 75, 100, dtype=torch.bool)
    masks[0, 10:30, 20:50] = True
    batch = {"boxes": [torch.tensor([[20.0, 10, 50, 30]])], "labels": [torch.tensor([2])], "instance_masks": [masks]}
    (target,) = targets(features, batch, first_label=1)
    assert target["labels"].tolist() == [3] and target["masks"].shape == (1, 84, 112)
    assert target["masks"][0, 14:34, 26:56].all() and target["masks"].sum() == 600
    assert target["boxes"].tolist() == [[26, 14, 56, 34]]


HEADS = {
    "fcos": lambda: FCOSDetector([24, 24], 3, channels=32, num_convs=1),
    "faster_rcnn": lambda: RCNNDetector([24, 24], 3, channels=32, hidden=64, samples=32, proposals=100),
    "mask_rcnn": lambda: RCNNDetector([24, 24], 3, channels=32, hidden=64, mask_channels=16, samples=32, proposals=100),
    "plain_detr": lambda: PlainDETR(
        [24, 24], 3, channels=32, num_heads=4, hidden=64, bias_hidden=16, decoder_layers=2, queries=20,
        criterion=SetCriterion(),
    ),
}  # fmt: skip


def shown():
    """Two images, the second without objects; each object marks its cells in the features."""
    boxes = torch.tensor([[14.0, 14, 56, 42], [70, 28, 112, 84]])
    features = seen()
    for place, (x0, y0, x1, y1) in enumerate((boxes / 14).int().tolist()):
        for level in features.patch_maps:
            level[0, place * 8 : place * 8 + 8, y0:y1, x0:x1] += 4
    masks = torch.zeros(2, 84, 112, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0 : (x0 + x1) // 2] = True  # the left half
    batch = {
        "boxes": [boxes, torch.zeros(0, 4)],
        "labels": [torch.tensor([2, 0]), torch.zeros(0, dtype=torch.long)],
        "instance_masks": [masks, torch.zeros(0, 84, 112, dtype=torch.bool)],
    }
    return features, batch


@pytest.mark.parametrize("name", HEADS)
def test_a_head_learns_what_it_is_shown(name):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    head, (features, batch) = HEADS[name](), shown()
    if not head.has_masks:
        del batch["instance_masks"]
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(60):
        losses = head.losses(features, batch)
        assert tuple(losses) == head.terms and all(torch.isfinite(loss) for loss in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        first, second = head.detect(features, [(168, 224), (84, 112)])
    best = [first["boxes"][first["labels"] == label][0] for label in (2, 0)]  # best first
    expected = batch["boxes"][0] * 2  # the image on disk is twice as large
    assert (torch.stack(best) - expected).abs().max() < 14
    assert (second["scores"] < 0.5).all()
    assert ("masks" in first) == head.has_masks
    if head.has_masks:
        mask = first["masks"][first["labels"] == 2][0]
        assert mask.shape == (28, 28) and mask[:, 2:11].mean() > 0.7 and mask[:, 17:26].mean() < 0.3


@pytest.mark.parametrize("name", HEADS)
def test_images_without_objects_alone_give_a_finite_loss(name):
    head, (features, batch) = HEADS[name](), shown()
    empty = {key: [values[1], values[1]] for key, values in batch.items() if key != "instance_masks" or head.has_masks}
    losses = head.losses(features, empty)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()


def test_a_detection_head_gives_no_map():
    with pytest.raises(TypeError, match="losses"):
        HEADS["fcos"]()(seen())
    with pytest.raises(UserError, match="multiple of 32"):
        FCOSDetector([24], 3, channels=48)
