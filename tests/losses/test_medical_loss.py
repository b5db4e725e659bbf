import pytest
import torch
import torch.nn.functional as F

from dense_heads.errors import UserError
from dense_heads.losses.medical import MedicalLoss


def only(name, **more):
    weights = dict.fromkeys(("cross_entropy", "dice_per_batch", "dice_per_image", "focal", "lovasz", "tversky"), 0.0)
    return MedicalLoss(**{**weights, name: 1.0, **more})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, 8, 9, generator=generator)
    target = torch.randint(0, 3, (3, 8, 9), generator=generator)
    target[0, 2:] = 0  # images differ in how much they hold
    target[:, :, 0] = 255
    return logits, target


def one_hot(target, num_classes=3):
    valid = (target != 255).float()
    return F.one_hot(torch.where(target == 255, 0, target), num_classes).permute(0, 3, 1, 2) * valid[:, None], valid


def soft_dice(probabilities, truth, alpha=0.5, beta=0.5):
    """Of each class, pixels summed over all dimensions but the class's; a class that is absent costs nothing."""
    tp = (probabilities * truth).sum(dim=(0, 2, 3))
    fp, fn = probabilities.sum(dim=(0, 2, 3)) - tp, truth.sum(dim=(0, 2, 3)) - tp
    score = tp / (tp + alpha * fp + beta * fn).clamp(min=1e-7)
    return ((1 - score) * (truth.sum(dim=(0, 2, 3)) > 0)).mean()


def test_dice_over_the_batch_and_over_images_differ_and_are_what_their_names_say(batch):
    logits, target = batch
    truth, valid = one_hot(target)
    probabilities = logits.softmax(dim=1) * valid[:, None]
    together = soft_dice(probabilities, truth)
    each = torch.stack([soft_dice(probabilities[i : i + 1], truth[i : i + 1]) for i in range(3)]).mean()
    assert abs(together - each) > 1e-3
    torch.testing.assert_close(only("dice_per_batch")(logits, target), together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(only("dice_per_image")(logits, target), each, atol=1e-5, rtol=1e-5)


def test_tversky_weighs_what_is_missed(batch):
    logits, target = batch
    truth, valid = one_hot(target)
    expected = soft_dice(logits.softmax(dim=1) * valid[:, None], truth, alpha=0.2, beta=0.8)
    found = only("tversky", tversky_alpha=0.2, tversky_beta=0.8)(logits, target)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_cross_entropy_is_divided_by_labelled_pixels(batch):
    logits, target = batch
    expected = F.cross_entropy(logits, target, ignore_index=255, label_smoothing=0.1)
    torch.testing.assert_close(only("cross_entropy", label_smoothing=0.1)(logits, target), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_that_overlap_are_told_from_their_absence(batch, smoothing):
    logits, _ = batch
    target = (torch.rand(3, 3, 8, 9, generator=torch.Generator().manual_seed(1)) > 0.6).long()
    target[1, 2, :4] = 255
    valid = target != 255
    p = logits.sigmoid()
    wanted = target.float() * (1 - smoothing) + smoothing / 2
    each = -(wanted * p.log() + (1 - wanted) * (1 - p).log())
    found = only("cross_entropy", multilabel=True, label_smoothing=smoothing)(logits, target)
    torch.testing.assert_close(found, each[valid].mean(), atol=1e-5, rtol=1e-5)
    truth = torch.where(valid, target, 0).float()
    dice = only("dice_per_batch", multilabel=True)(logits, target)
    torch.testing.assert_close(dice, soft_dice(p * valid, truth), atol=1e-5, rtol=1e-5)
    right = torch.where(target == 1, p, 1 - p)[valid]
    focal = only("focal", multilabel=True)(logits, target)
    torch.testing.assert_close(focal, ((1 - right) ** 2 * -right.log()).mean(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["cross_entropy", "dice_per_batch", "dice_per_image", "focal", "lovasz", "tversky"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_every_part_learns_and_a_batch_without_labels_costs_nothing(batch, name, multilabel):
    logits, target = batch
    if multilabel:
        target = one_hot(target)[0].long()
    logits = logits.clone().requires_grad_()
    loss = only(name, multilabel=multilabel)
    optimizer = torch.optim.SGD([logits], lr=5.0)
    first = loss(logits, target)
    for _ in range(20):
        optimizer.zero_grad()
        loss(logits, target).backward()
        optimizer.step()
    assert loss(logits, target) < first
    nothing = loss(logits, torch.full_like(target, 255))
    nothing.backward()
    assert nothing == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"focal": -1.0}, "task.loss.focal"),
        ({"cross_entropy": 0.0, "dice_per_batch": 0.0}, "all weights are 0"),
        ({"label_smoothing": 2}, "label_smoothing"),
        ({"tversky_alpha": -1}, "tversky_alpha"),
        ({"cross_entropy": 0.0, "class_weights": [1, 2]}, "class_weights"),
    ],
)
def test_bad_arguments(given, words):
    with pytest.raises(UserError, match=words):
        MedicalLoss(**given)
