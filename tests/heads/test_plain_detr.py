"""Plain DETR: what its losses look at, where its proposals and its attention stand."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dense_heads.backbones.zoo import resolve_blocks
from dense_heads.errors import UserError
from dense_heads.heads.detr_layers import BoxBias, corrected, usable
from dense_heads.heads.plain_detr import PlainDETR
from dense_heads.structures import Features, Padding
from tests.factories import composed

TERMS = ("class", "box", "giou")


def made(criterion=None, **options):
    torch.manual_seed(0)
    options = {"decoder_layers": 3, "queries": 7, **options}
    return PlainDETR([24], 3, channels=32, num_heads=4, hidden=32, bias_hidden=8, criterion=criterion, **options)


def seen(rows=6, columns=8, padding=None, images=2):
    generator = torch.Generator().manual_seed(0)
    padding = padding or Padding()
    size = rows * 14 - padding.top - padding.bottom, columns * 14 - padding.left - padding.right
    return Features((torch.randn(images, 24, rows, columns, generator=generator),), (), size, padding)


BATCH = {
    "boxes": [torch.tensor([[14.0, 14, 56, 42]]), torch.zeros(0, 4)],
    "labels": [torch.tensor([1]), torch.zeros(0)],
}


class Counting:
    """A criterion that keeps what it is asked, and says 1 for each term, and what depends on the boxes."""

    def __init__(self):
        self.calls = []

    def __call__(self, said, boxes, labels, repeat=1):
        self.calls.append((said, boxes, repeat))
        moves = sum(values.square().mean() for values in (said["logits"], said["boxes"]))
        return {name: 1 + 0 * moves for name in TERMS}


@pytest.mark.parametrize("extra", [0, 5])
def test_the_losses_look_at_every_layer_at_the_proposals_and_at_the_extra_queries(extra):
    criterion = Counting()
    losses = made(criterion, extra_queries=extra, repeats=6).losses(seen(), BATCH)
    layers = 3 + (3 if extra else 0)
    assert {name: value.item() for name, value in losses.items()} == {
        **dict.fromkeys(TERMS, layers),
        **{f"proposal_{name}": 1 for name in TERMS},
    }
    queries = [(said["logits"].shape[1], repeat) for said, _, repeat in criterion.calls]
    proposals = 6 * 8 * 4 + 6 * 8 + 3 * 4 + 2 * 2  # cells of strides 7, 14, 28, 56
    assert queries == [(7, 1)] * 3 + [(5, 6)] * (3 if extra else 0) + [(proposals, 1)]
    (first, empty), expected = criterion.calls[0][1], BATCH["boxes"][0] / torch.tensor([112.0, 84, 112, 84])
    torch.testing.assert_close(first, expected)
    assert empty.shape == (0, 4)


def test_every_parameter_learns():
    """Through the real criterion: auxiliary losses reach each layer, the proposals' losses the pyramid."""
    from dense_heads.losses.set_prediction import SetCriterion

    head = made(SetCriterion(), extra_queries=4)
    batch = {**BATCH, "labels": [torch.tensor([1]), torch.zeros(0, dtype=torch.long)]}
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-2)
    for _ in range(2):  # the last layers of the corrections start at zero, and hide those before them
        optimizer.zero_grad()
        sum(head.losses(seen(), batch).values()).backward()
        optimizer.step()
    still = [name for name, value in head.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert still == []


def test_the_extra_queries_are_of_training_alone():
    with_extra, features = made(extra_queries=5).eval(), seen()
    alone = made().eval()
    state = with_extra.state_dict()
    state["content.weight"] = state["content.weight"][:7]
    alone.load_state_dict(state)
    for one, other in zip(*(head.detect(features, [(84, 112)] * 2) for head in (with_extra, alone)), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("boxes", "scores", "labels"))


def test_detections_are_the_best_of_queries_and_classes():
    (one, _) = made(detections=10).eval().detect(seen(), [(84, 112)] * 2)
    assert len(one["scores"]) <= 10 and (one["scores"].diff() <= 0).all()
    assert one["labels"].min() >= 0 and one["labels"].max() <= 2
    assert len(made(detections=100).eval().detect(seen(), [(84, 112)] * 2)[0]["scores"]) <= 7 * 3


def test_an_images_padding_is_no_part_of_its_boxes():
    """A box that a query says stands in the grid; the image begins where the padding ends."""
    padding = Padding(6, 4, 6, 5)
    head = made().eval()
    (whole,), (own,) = (head.detect(seen(padding=pad, images=1), [(h, w)]) for pad, h, w in
                        ((Padding(), 84, 112), (padding, 75, 100)))  # fmt: skip
    moved = whole["boxes"] - torch.tensor([6.0, 4, 6, 4])
    expected = torch.stack([*(moved[:, k].clamp(0, (100, 75)[k % 2]) for k in range(4))], dim=1)
    there = (expected[:, 2:] > expected[:, :2]).all(dim=1)
    assert there.sum() > 3
    torch.testing.assert_close(own["boxes"], expected[there])


def test_attentions_bias_moves_with_the_box():
    """It knows where a cell lies relative to a box's sides, and nothing else of where either is."""
    torch.manual_seed(0)
    bias, grid = BoxBias(4, 16), (5, 6)
    box = torch.tensor([[[1 / 6, 1 / 5, 3 / 6, 2 / 5]]])
    right = box + torch.tensor([1 / 6, 0, 1 / 6, 0])
    here, there = (bias(one, grid).unflatten(3, grid)[0, :, 0] for one in (box, right))
    torch.testing.assert_close(here[..., :-1], there[..., 1:])
    assert (here - there).abs().max() > 1e-3


def test_boxes_stay_usable():
    boxes = torch.tensor([[-0.5, 0.2, 0.5, 0.1], [0.9, 0.9, 3.0, 0.9], [0.3, 0.3, 0.4, 0.5]])
    kept = usable(boxes)
    assert (kept[:, 2:] > kept[:, :2]).all() and kept[:, :2].min() >= 0 and torch.equal(kept[2], boxes[2])
    grown = corrected(boxes[2:], torch.tensor([[0.0, 0, 50, 50]]))
    assert torch.isfinite(grown).all() and (grown[0, 2] - grown[0, 0]) < 100


def test_the_large_experiment_is_as_published():
    """Facts sheet 7.5; the head is made without its memory."""
    cfg = composed("experiment=coco_detection_vitg14_plain_detr")
    node = cfg.head
    assert resolve_blocks(cfg.backbone.name, node.blocks) == (9, 19, 29, 39) and not node.norm and node.windows == 3
    with torch.device("meta"):
        head = instantiate(OmegaConf.masked_copy(node, [key for key in node if key != "weights"]))([3072] * 4, 80)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    assert shapes["project.0.weight"] == (768, 2 * 4 * 1536, 1, 1) and shapes["content.weight"] == (3000, 768)
    assert shapes["decoder.5.perceptron.0.weight"] == shapes["encoder.5.perceptron.0.weight"] == (2048, 768)
    assert shapes["decoder.5.bias.across.0.weight"] == (512, 2) and shapes["decoder.5.bias.across.2.bias"] == (8,)
    assert "decoder.6.norm1.weight" not in shapes and "encoder.6.norm1.weight" not in shapes
    assert (head.queries, head.extra_queries, head.repeats) == (1500, 1500, 6)
    assert cfg.data.image_size % (14 * node.windows) == 0 and cfg.task.protocol.max_steps == -(-12 * 118_287 // 32)


@pytest.mark.parametrize("wrong", [{"channels": 20}, {"queries": 0}, {"decoder_layers": 0}, {"windows": 0}])
def test_values_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match=r"expected|Expected"):
        PlainDETR([24], 3, **wrong)
