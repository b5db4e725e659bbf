from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dense_heads.errors import UserError
from dense_heads.losses.segmentation import SegmentationLoss

NUM_CLASSES = 5


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels; class 3 is absent, some pixels of each image are ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, NUM_CLASSES, 6, 7, generator=generator)
    target = torch.tensor([0, 1, 2, 4, 255])[torch.randint(0, 5, (2, 6, 7), generator=generator)]
    return logits.requires_grad_(), target


def labelled(logits, target) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (n, K), softmax (n, K) and labels (n,) of the pixels that count, in numpy."""
    scores = logits.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, NUM_CLASSES)
    labels = target.numpy().ravel()
    scores, labels = scores[labels != 255], labels[labels != 255]
    exps = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores, exps / exps.sum(axis=1, keepdims=True), labels


def cross_entropy_sum(logits, target, weights=None, smoothing=0.0) -> float:
    """Written out pixel by pixel: the target's share of each class times its weight times -log p."""
    weights = np.ones(NUM_CLASSES) if weights is None else np.asarray(weights)
    _, probabilities, labels = labelled(logits, target)
    total = 0.0
    for p, label in zip(probabilities, labels, strict=True):
        share = np.full(NUM_CLASSES, smoothing / NUM_CLASSES)
        share[label] += 1 - smoothing
        total -= float((share * weights * np.log(p)).sum())
    return total


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0, 0.0, 3.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_divided_by_all_pixels(batch, weights, smoothing):
    logits, target = batch
    total = cross_entropy_sum(logits, target, weights, smoothing)
    num_all, num_valid = target.numel(), int((target != 255).sum())
    assert num_valid < num_all
    loss = SegmentationLoss(class_weights=weights, label_smoothing=smoothing)
    assert loss(logits, target).item() == pytest.approx(total / num_all, rel=1e-5)
    loss = SegmentationLoss(class_weights=weights, label_smoothing=smoothing, avg_non_ignore=True)
    assert loss(logits, target).item() == pytest.approx(total / num_valid, rel=1e-5)


def test_pytorchs_own_mean_is_the_other_convention(batch):
    logits, target = batch
    mean = F.cross_entropy(logits, target, ignore_index=255)
    assert torch.allclose(SegmentationLoss(avg_non_ignore=True)(logits, target), mean)
    assert not torch.allclose(SegmentationLoss()(logits, target), mean)


def dice(logits, target) -> float:
    _, probabilities, labels = labelled(logits, target)
    losses = []
    for index in range(NUM_CLASSES):
        p, t = probabilities[:, index], labels == index
        losses.append(1 - 2 * p[t].sum() / (p.sum() + t.sum()) if t.any() else 0.0)
    return float(np.mean(losses))


def focal(logits, target) -> float:
    scores, _, labels = labelled(logits, target)
    sigmoid = 1 / (1 + np.exp(-scores))
    p = np.where(labels[:, None] == np.arange(NUM_CLASSES), sigmoid, 1 - sigmoid)
    return float((-((1 - p) ** 2) * np.log(p)).mean())


def lovasz(logits, target) -> float:
    """By the definition: the Lovasz extension of the Jaccard loss, summed over level sets of the errors."""
    _, probabilities, labels = labelled(logits, target)
    losses = []
    for index in np.unique(labels):
        t = labels == index
        errors = np.abs(t - probabilities[:, index])
        levels = np.append(np.sort(errors)[::-1], 0.0)
        total = 0.0
        for high, low in pairwise(levels):
            wrong = errors >= high
            jaccard_loss = wrong.sum() / (t | wrong).sum()  # of a prediction that is wrong exactly there
            total += (high - low) * jaccard_loss
        losses.append(total)
    return float(np.mean(losses))


@pytest.mark.parametrize(("name", "independent"), [("dice", dice), ("focal", focal), ("lovasz", lovasz)])
def test_region_losses_against_independent_ones(batch, name, independent):
    logits, target = batch
    loss = SegmentationLoss(cross_entropy=0.0, **{name: 1.0})
    assert loss(logits, target).item() == pytest.approx(independent(logits, target), rel=1e-5)


def test_is_the_weighted_sum(batch):
    logits, target = batch
    loss = SegmentationLoss(cross_entropy=0.5, dice=2.0, focal=3.0, lovasz=0.25)(logits, target)
    parts = (cross_entropy_sum(logits, target) / target.numel(), *(f(logits, target) for f in (dice, focal, lovasz)))
    assert loss.item() == pytest.approx(np.dot([0.5, 2.0, 3.0, 0.25], parts), rel=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "dice", "focal", "lovasz"])
def test_ignored_pixels_have_no_gradient_and_change_nothing(batch, name):
    logits, target = batch
    loss = SegmentationLoss(**{"cross_entropy": 0.0, name: 1.0})
    value = loss(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    ignored = (target == 255)[:, None].expand_as(logits)
    assert (gradient[ignored] == 0).all()
    assert (gradient[~ignored] != 0).any()
    disturbed = torch.where(ignored, logits.detach() * -7 + 3, logits.detach())
    assert torch.allclose(loss(disturbed, target), value)


@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_a_batch_without_labels_is_zero_with_zero_gradients(batch, avg_non_ignore):
    logits, target = batch
    loss = SegmentationLoss(1.0, 1.0, 1.0, 1.0, avg_non_ignore=avg_non_ignore)
    value = loss(logits, torch.full_like(target, 255))
    assert value.shape == ()
    assert value.item() == 0
    value.backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", ["cross_entropy", "dice", "focal", "lovasz"])
def test_is_summed_in_float32_whatever_the_run(batch, name):
    logits, target = batch
    loss = SegmentationLoss(**{"cross_entropy": 0.0, name: 1.0})
    half = logits.detach().to(torch.bfloat16)
    exact = loss(half.float(), target)
    assert torch.equal(loss(half, target), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(half, target), exact)


def test_learns_every_pixel_with_all_four():
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, NUM_CLASSES, (1, 8, 8), generator=generator)
    logits = torch.zeros(1, NUM_CLASSES, 8, 8, requires_grad=True)
    loss = SegmentationLoss(1.0, 1.0, 1.0, 1.0)
    optimiser = torch.optim.Adam([logits], lr=0.5)
    for _ in range(30):
        optimiser.zero_grad()
        loss(logits, target).backward()
        optimiser.step()
    assert torch.equal(logits.argmax(dim=1), target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dice": -1.0}, r"loss\.dice=-1\.0"),
        ({"focal": float("nan")}, r"loss\.focal=nan"),
        ({"lovasz": "much"}, r"loss\.lovasz='much'"),
        ({"cross_entropy": 0.0}, "all weights are 0"),
        ({"label_smoothing": 1.5}, r"label_smoothing=1\.5"),
        ({"class_weights": [1.0, -2.0]}, r"class_weights\.1=-2\.0"),
        ({"class_weights": [0.0, 0.0]}, "all weights are 0"),
        ({"cross_entropy": 0.0, "dice": 1.0, "class_weights": [1.0, 2.0]}, "act on cross-entropy only"),
    ],
)
def test_weights_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        SegmentationLoss(**arguments)


def test_class_weights_of_the_wrong_length_are_refused(batch):
    with pytest.raises(UserError, match="has 3 values; expected one for each of the 5"):
        SegmentationLoss(class_weights=[1.0, 2.0, 3.0])(*batch)


def test_brings_nothing_into_a_checkpoint():
    assert SegmentationLoss(dice=1.0, class_weights=[1.0, 2.0]).state_dict() == {}
