"""Cross-entropy of a patch-resolution map against the plain formula: enlarge, then F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from dense_heads.backbones.weights import load_backbone
from dense_heads.losses import cross_entropy
from dense_heads.losses.cross_entropy import Terms, map_cross_entropy
from dense_heads.losses.segmentation import SegmentationLoss
from dense_heads.models.dense import FrozenBackbone
from dense_heads.ops.pad import Placement, fit_to_patch
from dense_heads.structures import Features, Padding

PLAIN = Terms(None, 255, 0.0)
PLACEMENTS = {
    "resized": Placement((45, 31)),
    "padding cut off": Placement((45, 31), Padding(left=5, top=2, right=6, bottom=3)),
    "one row": Placement((1, 31)),
    "smaller than the map": Placement((3, 4)),
}


def sample(num_classes, placement, batch=3, resolution=(5, 4), dtype=torch.float64, scale=3.0):
    """A map and labels of which a tenth, and one whole sample, are ignored."""
    generator = torch.Generator().manual_seed(num_classes)
    map = scale * torch.randn(batch, num_classes, *resolution, generator=generator, dtype=dtype)
    target = torch.randint(0, num_classes, (batch, *placement.size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    target[-1] = 255
    return map.requires_grad_(), target


def plain(map, target, placement, terms):
    """Spelt out: F.interpolate to the padded size, the padding cut off, F.cross_entropy."""
    (height, width), padding = placement
    padded = (height + padding.top + padding.bottom, width + padding.left + padding.right)
    logits = F.interpolate(map, size=padded, mode="bilinear", align_corners=False)
    logits = logits[..., padding.top : padding.top + height, padding.left : padding.left + width]
    weights, ignore_index, smoothing = terms
    weights = None if weights is None else weights.to(map.dtype)
    return F.cross_entropy(
        logits, target, weights, ignore_index=ignore_index, label_smoothing=smoothing, reduction="sum"
    )


def value_and_gradient(function, map, *rest):
    value = function(map, *rest)
    (gradient,) = torch.autograd.grad(value, map)
    return value.detach(), gradient


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("num_classes", [2, 11])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tile", [1, 1000, 10**6])
def test_value_and_gradient_are_the_plain_ones(placement, num_classes, weighted, smoothing, tile, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_TILE_ELEMENTS", {"cpu": tile})
    weights = torch.linspace(0, 2, num_classes) if weighted else None  # class 0 does not count
    terms = Terms(weights, 255, smoothing)
    map, target = sample(num_classes, placement)
    value, gradient = value_and_gradient(map_cross_entropy, map, target, placement, terms)
    expected, slope = value_and_gradient(plain, map, target, placement, terms)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-12)
    assert (gradient[-1] == 0).all() and (gradient[0] != 0).any()


def test_gradient_by_finite_differences():
    placement = Placement((9, 7), Padding(1, 2, 0, 1))
    map, target = sample(3, placement, batch=2, resolution=(3, 2))
    terms = Terms(torch.tensor([1.0, 0.5, 2.0]), 255, 0.2)
    assert torch.autograd.gradcheck(lambda x: map_cross_entropy(x, target, placement, terms), map)


@pytest.mark.parametrize("num_classes", [2, 11, 150])
def test_float32_is_as_exact_as_the_plain_formula(num_classes):
    placement = Placement((112, 98))
    map, target = sample(num_classes, placement, resolution=(8, 7), scale=10.0)
    exact, slope = value_and_gradient(plain, map, target, placement, PLAIN)
    single = map.detach().float().requires_grad_()
    value, gradient = value_and_gradient(map_cross_entropy, single, target, placement, PLAIN)
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    assert (gradient - slope).norm() / slope.norm() < 2e-6
    plain_value, plain_gradient = value_and_gradient(plain, single, target, placement, PLAIN)
    torch.testing.assert_close(value, plain_value, rtol=1e-6, atol=0)
    assert (gradient - plain_gradient).norm() / slope.norm() < 2e-6


def test_logits_far_apart_neither_overflow_nor_lose_their_loss():
    """The wrong class is sure by 1000: its probability underflows, its loss does not."""
    map = torch.tensor([1000.0, 0.0, -500.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2).clone().requires_grad_()
    placement = Placement((8, 8))
    for label, expected in ((0, 0.0), (1, 1000.0), (2, 1500.0)):
        target = torch.full((1, 8, 8), label)
        value, gradient = value_and_gradient(map_cross_entropy, map, target, placement, PLAIN)
        assert value.item() == 64 * expected
        assert torch.equal(gradient, value_and_gradient(plain, map, target, placement, PLAIN)[1])


@pytest.mark.parametrize("avg_non_ignore", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0, 0.0, 3.0]])
def test_the_loss_of_a_map_is_the_loss_of_its_enlarged_logits(avg_non_ignore, smoothing, weights):
    loss = SegmentationLoss(0.7, class_weights=weights, avg_non_ignore=avg_non_ignore, label_smoothing=smoothing)
    for placement in PLACEMENTS.values():
        map, target = sample(5, placement, dtype=torch.float32)
        value, gradient = value_and_gradient(loss.of_map, map, target, placement)
        expected, slope = value_and_gradient(lambda x, *rest: loss(rest[1].enlarge(x), rest[0]), map, target, placement)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("region", ["dice", "focal", "lovasz"])
def test_losses_of_regions_see_enlarged_logits(region):
    loss = SegmentationLoss(1.0, **{region: 1.0})
    placement = PLACEMENTS["padding cut off"]
    map, target = sample(5, placement, dtype=torch.float32)
    assert torch.equal(loss.of_map(map, target, placement), loss(placement.enlarge(map), target))


def test_a_map_of_the_labels_own_size_is_taken_as_it_is():
    placement = Placement((6, 5))
    map, target = sample(4, placement, resolution=(6, 5), dtype=torch.float32)
    assert torch.equal(SegmentationLoss().of_map(map, target, placement), SegmentationLoss()(map, target))


@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_without_labels_it_is_zero_with_zero_gradients(avg_non_ignore):
    placement = PLACEMENTS["resized"]
    map, target = sample(5, placement, dtype=torch.float32)
    loss = SegmentationLoss(avg_non_ignore=avg_non_ignore)
    value, gradient = value_and_gradient(loss.of_map, map, torch.full_like(target, 255), placement)
    assert value == 0 and (gradient == 0).all()


def test_samples_do_not_mix_and_the_result_repeats(monkeypatch):
    placement = PLACEMENTS["resized"]
    map, target = sample(11, placement, dtype=torch.float32)
    monkeypatch.setattr(cross_entropy, "_TILE_ELEMENTS", {"cpu": 4000})
    _, gradient = value_and_gradient(map_cross_entropy, map, target, placement, PLAIN)
    _, again = value_and_gradient(map_cross_entropy, map, target, placement, PLAIN)
    assert torch.equal(gradient, again)
    _, alone = value_and_gradient(map_cross_entropy, map[:1].detach().requires_grad_(), target[:1], placement, PLAIN)
    assert torch.equal(gradient[:1], alone)


def test_half_precision_maps_and_autocast_are_computed_in_float32():
    placement = PLACEMENTS["resized"]
    map, target = sample(5, placement, dtype=torch.float32)
    half = map.detach().to(torch.bfloat16)
    exact = SegmentationLoss().of_map(half.float(), target, placement)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(SegmentationLoss().of_map(half, target, placement), exact)


def test_a_label_that_is_no_class_is_an_error():
    placement = PLACEMENTS["resized"]
    map, target = sample(5, placement)
    target[0, 0, 0] = 5
    with pytest.raises((IndexError, RuntimeError)):
        map_cross_entropy(map, target, placement, PLAIN)


@pytest.mark.parametrize("patch_fit", ["pad", "pad_exact", "crop", "resize"])
def test_follows_how_images_meet_the_patch_size(patch_fit):
    """Through the backbone's own placement, at a size that is no multiple of the patch."""
    images = torch.zeros(2, 3, 45, 31)
    fitted, padding = fit_to_patch(images, 14, patch_fit)
    features = Features((), (), (45, 31), padding)
    placement = FrozenBackbone(load_backbone("vitn14_reg", None), patch_fit).placement(features)
    resolution = fitted.shape[-2] // 14, fitted.shape[-1] // 14
    map, target = sample(3, Placement((45, 31)), batch=2, resolution=resolution)
    value = map_cross_entropy(map, target, placement, PLAIN)
    cut = padding if patch_fit == "pad_exact" else Padding()
    torch.testing.assert_close(value, plain(map, target, Placement((45, 31), cut), PLAIN))
