"""Labels decided a few channels at a time, against the plain way: everything at full size, softmax, mean, argmax."""

import random

import pytest
import torch
import torch.nn.functional as F

from dense_heads.metrics.segmentation import ConfusionMatrix
from dense_heads.models import looks as module
from dense_heads.models.looks import Look, Window, mean, most_probable
from dense_heads.ops.pad import Placement
from dense_heads.ops.windows import window_boxes
from dense_heads.structures import Padding


def plain(looks):
    """The protocol spelt out, one full-size tensor after the other."""
    total = None
    for look in looks:
        sums = torch.zeros(len(look.windows[0].map), *look.view_size)
        count = torch.zeros(look.view_size)
        for window in look.windows:
            top, left, bottom, right = window.box
            (height, width), padding = window.placement
            padded = (height + padding.top + padding.bottom, width + padding.left + padding.right)
            enlarged = F.interpolate(window.map[None], size=padded, mode="bilinear", align_corners=False)[0]
            enlarged = enlarged[:, padding.top : padding.top + height, padding.left : padding.left + width]
            sums[:, top:bottom, left:right] += enlarged
            count[top:bottom, left:right] += 1
        logits = sums / count
        if look.view_size != look.size:
            logits = F.interpolate(logits[None], size=look.size, mode="bilinear", align_corners=False)[0]
        probabilities = logits.softmax(dim=0)
        probabilities = probabilities.flip(-1) if look.flip else probabilities
        total = probabilities if total is None else total + probabilities
    return (total / len(looks)).argmax(dim=0)


def looks_at(size, num_classes, ratios=(1.0,), flip=False, window=None, exact=False, scale=3.0, seed=0):
    """Looks with random maps at a fourteenth of the pixels; with `exact` the padding is cut off."""
    generator = torch.Generator().manual_seed(seed)
    looks = []
    for ratio in ratios:
        view_size = (max(1, int(ratio * size[0])), max(1, int(ratio * size[1])))
        boxes = window_boxes(view_size, window, max(1, 2 * window // 3)) if window else [(0, 0, *view_size)]
        for mirrored in (False, True) if flip else (False,):
            windows = []
            for top, left, bottom, right in boxes:
                height, width = bottom - top, right - left
                rows, columns = -(-height // 14), -(-width // 14)
                extra = 14 * columns - width, 14 * rows - height
                cut = Padding(extra[0] // 2, extra[1] // 2, extra[0] - extra[0] // 2, extra[1] - extra[1] // 2)
                map = scale * torch.randn(num_classes, rows, columns, generator=generator)
                placement = Placement((height, width), cut if exact else Padding())
                windows.append(Window((top, left, bottom, right), map, placement))
            looks.append(Look(view_size, mirrored, size, windows))
    return looks


@pytest.fixture(params=[(1, 0), (2**22, 2**30)], ids=["least memory", "as usual"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", request.param[0])
    monkeypatch.setattr(module, "_KEPT_BYTES", request.param[1])


KINDS = {
    "whole": {},
    "windows": {"window": 56},
    "windows, resized": {"window": 56, "ratios": (1.3,)},
    "flip": {"flip": True, "window": 100},
    "scales and flip": {"ratios": (1.0, 0.7, 1.4), "flip": True, "window": 80},
    "padding cut off": {"window": 60, "exact": True},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("num_classes", [2, 3, 11, 150])
@pytest.mark.usefixtures("chunks")
def test_labels_and_confusion_matrix_are_exactly_the_plain_ones(kind, num_classes):
    size = (131, 173)
    looks = looks_at(size, num_classes, **kind)
    found, expected = most_probable(looks), plain(looks)
    assert found.dtype == torch.int64 and torch.equal(found, expected)
    target = torch.randint(0, num_classes, size, generator=torch.Generator().manual_seed(1))
    target[:9] = 255
    ours, theirs = ConfusionMatrix(num_classes), ConfusionMatrix(num_classes)
    ours.update(found, target)
    theirs.update(expected, target)
    assert torch.equal(ours.compute(), theirs.compute())
    assert torch.equal(mean(looks, lambda logits: logits.softmax(dim=0)).argmax(dim=0), expected)


def test_random_sizes_scales_and_thread_numbers(monkeypatch):
    dice = random.Random(0)
    before = torch.get_num_threads()
    for trial in range(40):
        torch.set_num_threads(1 + trial % 2)
        monkeypatch.setattr(module, "_CHUNK_BYTES", dice.choice([1, 2**17]))
        monkeypatch.setattr(module, "_KEPT_BYTES", dice.choice([0, 2**30]))
        looks = looks_at(
            (dice.randint(3, 90), dice.randint(3, 90)),
            dice.choice([2, 3, 5, 12, 19, 37]),
            ratios=dice.choice([(1.0,), (0.6,), (1.0, 1.5)]),
            flip=dice.random() < 0.5,
            window=dice.choice([None, 20, 33]),
            scale=dice.choice([0.02, 1.0, 30.0]),
            seed=trial,
        )
        assert torch.equal(most_probable(looks), plain(looks)), trial
    torch.set_num_threads(before)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.usefixtures("chunks")
def test_of_equal_classes_the_first_is_taken(flip):
    looks = looks_at((60, 70), 30, flip=flip)
    doubled = [
        Look(
            look.view_size,
            look.flip,
            look.size,
            [Window(window.box, window.map.repeat(2, 1, 1), window.placement) for window in look.windows],
        )
        for look in looks
    ]
    assert torch.equal(most_probable(doubled), most_probable(looks))
    assert torch.equal(most_probable(doubled), plain(doubled))


@pytest.mark.parametrize("flip", [False, True])
def test_logits_that_the_softmax_cannot_tell_apart_go_to_the_first(flip):
    """The largest logit is class 1's, by less than a float32 probability can show; the plain way says 0."""
    map = torch.full((3, 2, 2), -1.0)
    map[0], map[1] = 0.1, 0.1 + 1.5e-8
    assert (map[1] > map[0]).all()
    window = Window((0, 0, 28, 28), map, Placement((28, 28)))
    looks = [Look((28, 28), mirrored, (28, 28), [window]) for mirrored in ((False, True) if flip else (False,))]
    assert (plain(looks) == 0).all()
    assert torch.equal(most_probable(looks), plain(looks))


@pytest.mark.parametrize("flip", [False, True])
def test_the_second_look_at_close_pixels_is_needed(flip, monkeypatch):
    looks = looks_at((120, 160), 40, flip=flip, scale=1e-6)
    expected = plain(looks)
    assert torch.equal(most_probable(looks), expected)
    monkeypatch.setattr(module._Scores, "settled", lambda _, pixels: torch.full_like(pixels, -1, dtype=torch.int16))
    assert not torch.equal(most_probable(looks), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("flip", [False, True])
def test_logits_that_are_not_finite_end_as_in_the_plain_way(value, flip):
    looks = looks_at((40, 50), 20, flip=flip)
    for look in looks:
        look.windows[0].map[7] = value
    assert torch.equal(most_probable(looks), plain(looks))


def test_maps_are_left_as_they_are():
    """Also where a map has the result's size already, so that nothing is copied on the way."""
    map = torch.randn(5, 20, 30, generator=torch.Generator().manual_seed(0))
    window = Window((0, 0, 20, 30), map, Placement((20, 30)))
    looks = [Look((20, 30), mirrored, (20, 30), [window]) for mirrored in (False, True)]
    before = map.clone()
    assert torch.equal(most_probable(looks), plain(looks))
    assert torch.equal(map, before)


def test_works_in_inference_mode():
    with torch.inference_mode():
        looks = looks_at((40, 50), 20, flip=True)
        assert torch.equal(most_probable(looks), plain(looks))


def test_no_full_size_channels_pile_up():
    """Of 150 classes no tensor of more than a chunk's channels is made, counted by what PyTorch asks memory for."""
    looks = looks_at((512, 512), 150, window=256, flip=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        most_probable(looks)
    largest = max(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0)
    plane = 4 * 512 * 512
    assert largest <= 24 * plane  # two chunks of 8 to 15 channels within one operation, at the most
