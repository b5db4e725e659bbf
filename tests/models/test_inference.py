import functools
import weakref

import pytest
import torch
import torch.nn.functional as F

from dense_heads.errors import UserError
from dense_heads.models import inference
from dense_heads.models.inference import Inference, infer
from dense_heads.models.looks import Window, mean
from dense_heads.ops.pad import Placement

NUM_CLASSES = 4


class StandIn:
    """Two candidates that look beyond a pixel, and at where it lies in the crop: no window equals another."""

    def __init__(self, resolution: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kernels = [torch.randn(NUM_CLASSES, 3, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
        self.resolution = resolution  # pixels of a patch
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, crops: torch.Tensor) -> list[torch.Tensor]:
        self.batches.append(tuple(crops.shape))
        height, width = crops.shape[-2:]
        place = torch.linspace(0, 1, height, dtype=crops.dtype)[:, None] + torch.linspace(
            0, 2, width, dtype=crops.dtype
        )
        maps = [F.conv2d(crops, kernel.to(crops.dtype), padding=2, stride=self.resolution) for kernel in self.kernels]
        return [F.interpolate(map, size=(height, width), mode="bilinear") + place for map in maps]


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(dim=0)


probabilities = functools.partial(mean, activate=softmax)


def at_pixels(predict):
    """What `infer` calls, from a model that answers at its crops' own pixels."""
    return lambda crops: (predict(crops), Placement((crops.shape[-2], crops.shape[-1])))


def images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator, dtype=torch.float64) for size in sizes]


def plain_loop(predict, views, size, window, stride, flip, activate) -> list[torch.Tensor]:
    """One image, the protocol spelt out: one window at a time, no batches, nothing shared with the real thing."""
    totals, looks = None, 0
    for view in views:
        for mirrored in (False, True) if flip else (False,):
            seen = view.flip(-1) if mirrored else view
            height, width = seen.shape[-2:]
            sums = [torch.zeros(NUM_CLASSES, height, width, dtype=torch.float64) for _ in range(2)]
            count = torch.zeros(height, width, dtype=torch.float64)
            tops = range(0, max(height - window, 0) + stride, stride) if height > window else [0]
            lefts = range(0, max(width - window, 0) + stride, stride) if width > window else [0]
            done = set()
            for top in tops:
                for left in lefts:
                    top_in, left_in = min(top, max(height - window, 0)), min(left, max(width - window, 0))
                    if (top_in, left_in) in done:
                        continue
                    done.add((top_in, left_in))
                    rows, columns = slice(top_in, top_in + window), slice(left_in, left_in + window)
                    for total, map in zip(sums, predict(seen[None, :, rows, columns]), strict=True):
                        total[:, rows, columns] += map[0]
                    count[rows, columns] += 1
            scored = []
            for total in sums:
                at_size = F.interpolate((total / count)[None], size=size, mode="bilinear", align_corners=False)[0]
                scored.append(activate(at_size))
            scored = [map.flip(-1) for map in scored] if mirrored else scored
            totals = scored if totals is None else [a + b for a, b in zip(totals, scored, strict=True)]
            looks += 1
    return [total / looks for total in totals]


# Larger than the window and no multiple of the stride; one side smaller; both smaller; equal sizes that share a batch.
SIZES = [(47, 61), (20, 83), (11, 17), (47, 61), (24, 24)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("window_batch", [1, 3, 64])
@pytest.mark.parametrize("resolution", [1, 4])
def test_windows_equal_a_plain_loop(flip, window_batch, resolution):
    predict = StandIn(resolution)
    seen = images(*SIZES)
    sizes = [(55, 40), (20, 83), (23, 35), (47, 61), (100, 90)]
    settings = Inference(window=24, stride=17, flip=flip, window_batch=window_batch)
    result = infer(at_pixels(predict), [[image] for image in seen], sizes, settings, probabilities)
    assert max(shape[0] for shape in predict.batches) == (
        1 if window_batch == 1 else min(window_batch, max_group(flip))
    )
    assert len(result) == 2
    for index, (image, size) in enumerate(zip(seen, sizes, strict=True)):
        expected = plain_loop(predict, [image], size, 24, 17, flip, softmax)
        for candidate in range(2):
            assert result[candidate][index].shape == (NUM_CLASSES, *size)
            torch.testing.assert_close(result[candidate][index], expected[candidate], rtol=1e-10, atol=1e-12)


def max_group(flip: bool) -> int:
    """Windows of 24 x 24 among SIZES: 3 x 4 of each 47 x 61 image, and one whole image."""
    return (12 + 12 + 1) * (2 if flip else 1)


def test_ten_view_test_time_augmentation_equals_a_plain_loop():
    predict = StandIn(resolution=4)
    bases = images((30, 41), (30, 41), (26, 50))
    ratios = (1.0, 1.32, 1.73, 2.28, 3.0)  # the facts sheet's
    views = [
        [F.interpolate(base[None], size=[int(side * ratio) for side in base.shape[-2:]])[0] for ratio in ratios]
        for base in bases
    ]
    sizes = [(37, 52), (33, 41), (26, 50)]
    result = infer(at_pixels(predict), views, sizes, Inference(window=32, stride=16, flip=True), probabilities)
    for index, size in enumerate(sizes):
        expected = plain_loop(predict, views[index], size, 32, 16, True, softmax)
        for candidate in range(2):
            got = result[candidate][index]
            torch.testing.assert_close(got, expected[candidate], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(got.sum(dim=0), torch.ones(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [(24, 24), (24, 9), (5, 23)])
def test_an_image_no_larger_than_the_window_equals_the_whole_image_exactly(size):
    predict = StandIn(resolution=4)
    (image,) = images(size)
    image = image.float()
    windows = infer(at_pixels(predict), [[image]], [(31, 29)], Inference(window=24, stride=7), probabilities)
    whole = infer(at_pixels(predict), [[image]], [(31, 29)], Inference(), probabilities)
    by_hand = [F.interpolate(map, size=(31, 29), mode="bilinear")[0].softmax(dim=0) for map in predict(image[None])]
    for candidate in range(2):
        assert torch.equal(windows[candidate][0], whole[candidate][0])
        assert torch.equal(whole[candidate][0], by_hand[candidate])


def test_whole_images_of_equal_size_share_a_batch_and_others_are_not_padded():
    predict = StandIn()
    infer(
        at_pixels(predict),
        [[image] for image in images((8, 9), (8, 9), (9, 8), (8, 9))],
        [(8, 9)] * 4,
        Inference(),
        probabilities,
    )
    assert sorted(predict.batches) == [(1, 3, 9, 8), (3, 3, 8, 9)]


def test_one_pixel_lines_come_back_unchanged():
    """Through a model that answers at its window's own pixels nothing may blur or shift (design 10.19)."""
    label = torch.zeros(50, 70)
    label[:, 33], label[21, :], label[[0, -1], :] = 1.0, 1.0, 1.0
    image = label.expand(3, 50, 70)

    def predict(crops):
        return [crops[:, :2] * torch.tensor([-5.0, 5.0]).view(1, 2, 1, 1)]

    settings = Inference(window=32, stride=19, flip=True)
    ((found,),) = infer(at_pixels(predict), [[image]], [(50, 70)], settings, probabilities)
    assert torch.equal(found.argmax(dim=0).float(), label)


def test_identity_averages_values_for_depth():
    def predict(crops):
        return [crops[:, :1] + torch.arange(crops.shape[-1])]  # mirrored, the ramp runs the other way

    ((depth,),) = infer(at_pixels(predict), [[torch.zeros(3, 4, 6)]], [(4, 6)], Inference(flip=True), mean)
    assert torch.equal(depth, torch.full((1, 4, 6), 2.5))


def test_half_precision_predictions_are_averaged_in_float32():
    def predict(crops):
        return [crops[:, :2].to(torch.bfloat16)]

    ((found,),) = infer(
        at_pixels(predict), [[torch.randn(3, 9, 9)]], [(20, 20)], Inference(window=6, stride=4), probabilities
    )
    assert found.dtype == torch.float32
    assert (found.sum(dim=0) - 1).abs().max() < 1e-6


def test_maps_of_finished_images_are_let_go(monkeypatch):
    """Many images share batches, but their maps must not pile up."""
    alive, num_made, num_alive = set(), 0, []

    class Counted(Window):
        def __init__(self, *args):
            nonlocal num_made
            super().__init__(*args)
            number = num_made
            num_made += 1
            alive.add(number)
            weakref.finalize(self, alive.discard, number)
            num_alive.append(len(alive))

    monkeypatch.setattr(inference, "Window", Counted)
    views = [[image] for image in images(*[(40, 40)] * 12)]
    settings = Inference(window=24, stride=16, window_batch=3)  # 4 windows each
    infer(at_pixels(StandIn()), views, [(5, 5)] * 12, settings, probabilities)
    assert num_made == 12 * 4 * 2
    assert max(num_alive) <= 2 * (4 + 3)  # one image's for two candidates, and those of a batch
    assert not alive


def test_no_images_no_results():
    assert infer(at_pixels(StandIn()), [], [], Inference(), probabilities) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0, "stride": 1}, "window=0"),
        ({"window": 512.0, "stride": 341}, r"window=512\.0"),
        ({"window": 512, "stride": 513}, "stride=513.*leave pixels out"),
        ({"window": 512, "stride": 0}, "stride=0"),
        ({"window_batch": 0}, "window_batch=0"),
        ({"flip": "yes"}, "flip='yes'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Inference(**arguments)


def test_null_stride_is_two_thirds_of_the_window_as_published():
    size = (512, 1100)
    assert Inference(window=512).boxes(size) == Inference(window=512, stride=341).boxes(size)
    assert len(Inference(window=1).boxes((2, 2))) == 4


def test_null_window_switches_windows_off_whatever_the_protocols_stride():
    settings = Inference(window=None, stride=341)
    predict = StandIn()
    infer(at_pixels(predict), [images((60, 70))], [(60, 70)], settings, probabilities)
    assert predict.batches == [(1, 3, 60, 70)]
