import subprocess
import sys

import albumentations as A
import cv2
import numpy as np
import pytest
import torch

from dense_heads.data.transforms import (
    EvalTransform,
    PadTo,
    PhotoMetricDistortion,
    RandomCrop,
    RandomScale,
    TrainPipeline,
    normalise,
    rescale_size,
)
from dense_heads.errors import UserError

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8)
MASK = RNG.integers(0, 5, (60, 80), dtype=np.uint8)


def draw(step, seed, **data):
    step.set_random_seed(seed)
    return step(**data)


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((480, 640), 512, None, (512, 683)),  # 640 * 512/480 = 682.67
        ((500, 375), 512, None, (683, 512)),  # 500 * 512/375 = 682.67
        ((333, 500), 512, None, (512, 769)),  # 500 * 512/333 = 768.77
        ((2, 5), 3, None, (3, 8)),  # 7.5 rounds up
        ((300, 2400), 512, 2048, (256, 2048)),  # the long side binds
        ((300, 1200), 512, 2048, (512, 2048)),
        ((512, 683), 512, None, (512, 683)),
    ],
)
def test_rescale_size_by_hand(size, short, long, expected):
    assert rescale_size(size, short, long) == expected


def test_a_thin_strip_is_refused():
    with pytest.raises(UserError, match="1 x 200000"):
        rescale_size((1, 200000), 512)


def test_random_scale_rounds_the_limit_down_first():
    # int(512 * 0.7) = 358, then 640 * 358 / 480 = 477.33
    step = RandomScale(512, ratio=(0.7, 0.7))
    out = draw(step, 0, image=np.zeros((480, 640, 3), np.uint8), mask=np.zeros((480, 640), np.uint8))
    assert out["image"].shape == (358, 477, 3) and out["mask"].shape == (358, 477)
    # int(2048 * 0.7) = 1433 binds: height 300 * 1433 / 2400 = 179.1
    out = draw(RandomScale(512, (0.7, 0.7), long_side=2048), 0, image=np.zeros((300, 2400, 3), np.uint8))
    assert out["image"].shape == (179, 1433, 3)


def test_random_scale_draws_its_ratio_uniformly():
    step = RandomScale(100, ratio=(0.5, 2.0))
    sides = [draw(step, seed, image=IMAGE)["image"].shape[0] for seed in range(300)]
    assert min(sides) >= 50 and max(sides) < 200 and abs(np.mean(sides) - 125) < 8
    assert len(set(sides)) > 80


def test_random_scale_resizes_bilinearly_without_antialias_and_masks_to_the_nearest():
    out = draw(RandomScale(30, (1, 1)), 0, image=IMAGE, mask=MASK)
    pixels = torch.from_numpy(IMAGE).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(pixels, (30, 40), mode="bilinear", align_corners=False, antialias=False)
    assert np.abs(out["image"].astype(float) - expected[0].permute(1, 2, 0).numpy()).max() <= 0.51
    np.testing.assert_array_equal(out["mask"], MASK[::2, ::2])


@pytest.mark.parametrize(
    "options",
    [
        {"short_side": 0},
        {"short_side": 9, "long_side": 8},
        {"short_side": 9, "ratio": (2, 1)},
        {"short_side": 9, "ratio": (0, 1)},
    ],
)
def test_random_scale_refuses(options):
    with pytest.raises(UserError, match="RandomScale"):
        RandomScale(**options)


def test_random_crop_windows_cover_the_image_and_stay_inside():
    position = np.stack(np.meshgrid(np.arange(10), np.arange(12), indexing="ij"), -1).astype(np.uint8)
    image = np.dstack([position, np.zeros((10, 12), np.uint8)])
    corners = set()
    for seed in range(400):
        out = draw(RandomCrop((4, 5)), seed, image=image, mask=image[..., 0])
        assert out["image"].shape == (4, 5, 3)
        np.testing.assert_array_equal(out["mask"], out["image"][..., 0])
        corners.add(tuple(out["image"][0, 0, :2].tolist()))
    assert corners == {(top, left) for top in range(7) for left in range(8)}  # both ends included


def test_random_crop_keeps_a_short_side_whole():
    assert draw(RandomCrop(64), 0, image=IMAGE, mask=MASK)["image"].shape == (60, 64, 3)


def crop_by_the_rule(seed, mask, size, ratio, retries=10):
    """mmseg's loop, written out: the first window and up to `retries` more, the last one stands."""
    rng = np.random.default_rng(seed)
    tried = 0
    while True:
        top = rng.integers(0, mask.shape[0] - size + 1)
        left = rng.integers(0, mask.shape[1] - size + 1)
        counts = [int((mask[top : top + size, left : left + size] == c).sum()) for c in range(255)]
        present = [c for c in counts if c]
        if tried == retries or (len(present) > 1 and max(present) / sum(present) < ratio):
            return (top, left), tried
        tried += 1


def test_random_crop_category_rule():
    mask = np.zeros((40, 40), np.uint8)
    mask[:, 30:] = 1
    mask[:20, :12] = 255  # ignored pixels count on neither side
    image = np.dstack([*np.meshgrid(np.arange(40), np.arange(40), indexing="ij"), mask]).astype(np.uint8)
    redrawn = []
    for seed in range(60):
        out = draw(RandomCrop(16, cat_max_ratio=0.75), seed, image=image, mask=mask)
        corner, tried = crop_by_the_rule(seed, mask, 16, 0.75)
        assert tuple(out["image"][0, 0, :2]) == corner
        redrawn.append(tried)
    assert min(redrawn) == 0 and max(redrawn) > 3


def test_random_crop_gives_up_after_its_retries():
    out = draw(RandomCrop(8), 3, image=np.zeros((30, 30, 3), np.uint8), mask=np.zeros((30, 30), np.uint8))
    assert out["image"].shape == (8, 8, 3)


def distort(image, p):
    """Photometric distortion from the facts sheet, in plain arithmetic."""

    def clip(x):
        return np.floor(np.clip(x, 0, 255)).astype(np.uint8)

    def scaled(x, factor):
        return clip(np.float32(factor) * x.astype(np.float32)) if factor is not None else x

    if p["brightness"] is not None:
        image = clip(image.astype(np.float32) + np.float32(p["brightness"]))
    if p["contrast_first"]:
        image = scaled(image, p["contrast"])
    if p["saturation"] is not None:
        h, s, v = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
        image = cv2.cvtColor(cv2.merge([h, scaled(s, p["saturation"]), v]), cv2.COLOR_HSV2RGB)
    if p["hue"] is not None:
        h, s, v = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
        image = cv2.cvtColor(cv2.merge([((h.astype(int) + p["hue"]) % 180).astype(np.uint8), s, v]), cv2.COLOR_HSV2RGB)
    if not p["contrast_first"]:
        image = scaled(image, p["contrast"])
    return image


def test_photometric_distortion_equals_plain_arithmetic():
    step = PhotoMetricDistortion()
    changed = 0
    for seed in range(200):
        out = draw(step, seed, image=IMAGE)["image"]
        np.testing.assert_array_equal(out, distort(IMAGE, step.params))
        changed += not np.array_equal(out, IMAGE)
    assert 150 < changed < 200  # 1/16 of the draws takes no step


def test_photometric_distortion_draws_the_official_ranges():
    step = PhotoMetricDistortion()
    drawn = []
    for seed in range(2000):
        step.set_random_seed(seed)
        drawn.append(step.get_params())
    for key, low, high in (("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5), ("hue", -18, 17)):
        values = [d[key] for d in drawn if d[key] is not None]
        assert 900 < len(values) < 1100
        assert low <= min(values) < low + 0.06 * (high - low) and high - 0.06 * (high - low) < max(values) <= high
    assert 900 < sum(d["contrast_first"] for d in drawn) < 1100
    assert len({d["hue"] for d in drawn}) == 37  # -18 .. 17 and None


@pytest.mark.parametrize("options", [{"brightness": -1}, {"contrast": (2, 1)}, {"hue": 99}])
def test_photometric_distortion_refuses(options):
    with pytest.raises(UserError, match="PhotoMetricDistortion"):
        PhotoMetricDistortion(**options)


def test_normalise():
    pixel = normalise(np.array([[[124, 116, 104]]], np.uint8))
    assert pixel.dtype == np.float32
    np.testing.assert_allclose(pixel[0, 0], [0.325 / 58.395, -0.28 / 57.12, 0.47 / 57.375], rtol=1e-5)


def steps(**options):
    return {
        "scale": RandomScale(48, (0.5, 2.0)),
        "crop": RandomCrop(48),
        "flip": A.HorizontalFlip(p=0.5),
        "photometric": PhotoMetricDistortion(),
        **options,
    }


def test_pipeline_pads_with_zeros_after_normalising_and_255():
    pipeline = TrainPipeline({"crop": RandomCrop(50)}, size=(70, 50))
    pipeline.set_random_seed(0)
    image, mask = pipeline(IMAGE[:, :30], MASK[:, :30])
    assert image.shape == (3, 70, 50) and image.dtype == torch.float32
    assert mask.shape == (70, 50) and mask.dtype == torch.int64
    assert (image[:, 60:] == 0).all() and (image[:, :, 30:] == 0).all()
    assert (mask[60:] == 255).all() and (mask[:, 30:] == 255).all() and (mask[:50, :30] < 5).all()
    start = next(t for t in range(11) if np.array_equal(MASK[t : t + 50, :30], mask[:50, :30].numpy()))
    expected = normalise(IMAGE[start : start + 50, :30])
    np.testing.assert_array_equal(image[:, :50, :30].permute(1, 2, 0).numpy(), expected)


def test_pipeline_without_a_crop_says_so():
    with pytest.raises(UserError, match=r"60 x 80 .*larger than the 48 x 48.*RandomCrop"):
        TrainPipeline({}, size=48)(IMAGE, MASK)
    with pytest.raises(UserError, match="size 0"):
        PadTo(0)


def test_pipeline_moves_image_and_mask_together():
    image = np.repeat(MASK[..., None], 3, 2)
    pipeline = TrainPipeline({"crop": RandomCrop(32), "flip": A.HorizontalFlip(p=0.5)}, size=32)
    for seed in range(20):
        pipeline.set_random_seed(seed)
        out, mask = pipeline(image, MASK)
        np.testing.assert_allclose(out[0].numpy() * 58.395 + 123.675, mask.numpy(), atol=1e-3)


def test_pipeline_is_a_function_of_the_seed():
    first, second = TrainPipeline(steps(), 48), TrainPipeline(steps(), 48)
    outs = []
    for seed in range(8):
        first.set_random_seed(seed)
        outs.append(first(IMAGE, MASK))
    for seed in reversed(range(8)):
        second.set_random_seed(seed)
        image, mask = second(IMAGE, MASK)
        assert torch.equal(image, outs[seed][0]) and torch.equal(mask, outs[seed][1])
    assert len({tuple(image.flatten()[:200].tolist()) for image, _ in outs}) == 8


def test_pipeline_takes_images_without_masks():
    pipeline = TrainPipeline(steps(), 48)
    pipeline.set_random_seed(1)
    image, mask = pipeline(IMAGE)
    assert image.shape == (3, 48, 48) and mask is None


def test_steps_draw_independently_of_each_other():
    """albumentations' own seeding gives all steps one stream: two flips would then always agree."""
    scale, crop, flip, other = (
        RandomScale(96, (0.5, 2.0)),
        RandomCrop(48),
        A.HorizontalFlip(p=0.5),
        A.VerticalFlip(p=0.5),
    )
    pipeline = TrainPipeline({"scale": scale, "crop": crop, "flip": flip, "other": other}, 48)
    flipped, sides, agree, places = [], [], 0, []
    for seed in range(300):
        pipeline.set_random_seed(seed)
        pipeline(IMAGE, MASK)
        flipped.append(bool(flip.params))
        agree += bool(flip.params) == bool(other.params)
        sides.append(scale.params["size"][0])
        places.append(crop.params["top"] / (sides[-1] - 47))
    assert 110 < sum(flipped) < 190 and 110 < agree < 190
    assert abs(np.corrcoef(places, sides)[0, 1]) < 0.2
    assert abs(np.corrcoef(flipped, sides)[0, 1]) < 0.2


def test_leaving_a_step_out_does_not_move_the_others():
    full, less = TrainPipeline(steps(), 48), TrainPipeline(steps(photometric=None), 48)
    for seed in range(5):
        full.set_random_seed(seed), less.set_random_seed(seed)
        assert torch.equal(full(IMAGE, MASK)[1], less(IMAGE, MASK)[1])


def test_eval_views_come_from_the_original_image():
    transform = EvalTransform(30, None, scales=(1.0, 1.32, 3.0))
    views = transform(IMAGE)
    # int(30 * 1.32) = 39; 80 * 39 / 60 = 52
    assert [tuple(view.shape) for view in views] == [(3, 30, 40), (3, 39, 52), (3, 90, 120)]
    assert transform.sizes((60, 80)) == [(30, 40), (39, 52), (90, 120)]
    expected = normalise(cv2.resize(IMAGE, (52, 39), interpolation=cv2.INTER_LINEAR))
    np.testing.assert_array_equal(views[1].permute(1, 2, 0).numpy(), expected)


def test_eval_official_sizes():
    assert EvalTransform(512).sizes((683, 512)) == [(683, 512)]
    assert EvalTransform(512, 2048).sizes((300, 2400)) == [(256, 2048)]
    # ms: short side 640 times the ratio, rounded down: 844, 1107, 1459, 1920
    sizes = EvalTransform(640, scales=(1.0, 1.32, 1.73, 2.28, 3.0)).sizes((480, 640))
    assert [size[0] for size in sizes] == [640, 844, 1107, 1459, 1920]
    assert sizes[1][1] == 1125 and sizes[0][1] == 853  # 640 * 844 / 480 = 1125.3; 853.3


def test_eval_own_size_and_a_limit_to_it():
    assert EvalTransform(None).sizes((60, 81)) == [(60, 81)]
    assert EvalTransform(None, 40).sizes((60, 80)) == [(30, 40)]
    assert EvalTransform(None, 400).sizes((60, 80)) == [(60, 80)]
    assert EvalTransform(None, scales=(0.5, 2.0)).sizes((60, 80)) == [(30, 40), (120, 160)]
    np.testing.assert_array_equal(EvalTransform(None)(IMAGE)[0].permute(1, 2, 0).numpy(), normalise(IMAGE))


@pytest.mark.parametrize(
    "options",
    [
        {"short_side": 0},
        {"short_side": 9, "long_side": 8},
        {"short_side": 9, "scales": ()},
        {"short_side": 9, "scales": (0,)},
    ],
)
def test_eval_refuses(options):
    with pytest.raises(UserError):
        EvalTransform(**options)


def test_importing_does_not_ask_for_updates():
    code = "import os, dense_heads.data.transforms; print(os.environ['NO_ALBUMENTATIONS_UPDATE'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "1"
