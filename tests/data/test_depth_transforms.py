import albumentations as A
import numpy as np
import pytest
import torch

from dense_heads.data.depth_transforms import (
    ColorAug,
    DepthEvalTransform,
    DepthTrainPipeline,
    FixedCrop,
    KBCrop,
    RandomRotate,
)
from dense_heads.data.transforms import RandomCrop, RandomScale, normalise
from dense_heads.errors import UserError

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8)
DEPTH = RNG.uniform(0.5, 9.5, (60, 80)).astype(np.float32)


def draw(step, seed, **data):
    step.set_random_seed(seed)
    return step(**data)


def places(height, width):
    """Depths that say where they are: row * 10,000 + column."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return (rows * 10000 + columns).astype(np.float32)


def test_nyu_crop():
    step = FixedCrop(top=45, left=43, bottom=472, right=608)
    depth = places(480, 640)
    out = step(image=np.zeros((480, 640, 3), np.uint8), mask=depth)
    assert out["image"].shape == (427, 565, 3)
    np.testing.assert_array_equal(out["mask"], depth[45:472, 43:608])
    with pytest.raises(UserError, match=r"240 x 320 .*rows 45:472"):
        step(image=np.zeros((240, 320, 3), np.uint8))


@pytest.mark.parametrize(("size", "corner"), [((375, 1242), (23, 13)), ((370, 1226), (18, 5)), ((376, 1241), (24, 12))])
def test_kb_crop(size, corner):
    depth = places(*size)
    image = np.zeros((*size, 3), np.uint8)
    image[corner] = 7
    out = KBCrop()(image=image, mask=depth)
    assert out["image"].shape == (352, 1216, 3) and out["mask"].shape == (352, 1216)
    assert out["mask"][0, 0] == corner[0] * 10000 + corner[1] and (out["image"][0, 0] == 7).all()
    assert out["mask"][-1, -1] == (size[0] - 1) * 10000 + corner[1] + 1215  # the last row stays


def test_crops_refuse():
    with pytest.raises(UserError, match="FixedCrop"):
        FixedCrop(5, 0, 5, 9)
    with pytest.raises(UserError, match="FixedCrop"):
        KBCrop(0, 5)
    with pytest.raises(UserError, match="351 x 1300"):
        KBCrop()(image=np.zeros((351, 1300, 3), np.uint8))


def test_rotation_moves_depth_to_the_nearest_pixel_and_fills_with_zero():
    step = RandomRotate(30, p=1.0)
    filled = 0
    for seed in range(5):
        out = draw(step, seed, image=IMAGE, mask=DEPTH)
        assert out["mask"].dtype == np.float32 and out["mask"].shape == DEPTH.shape
        assert set(np.unique(out["mask"])) <= {0.0, *np.unique(DEPTH)}  # nothing in between
        angle = np.deg2rad(step.params["angle"])
        rows, columns = np.meshgrid(np.arange(60) - 29.5, np.arange(80) - 39.5, indexing="ij")
        # Clockwise on the screen: a pixel shows what stood where turning it back leads to.
        source_column = np.cos(angle) * columns + np.sin(angle) * rows + 39.5
        source_row = -np.sin(angle) * columns + np.cos(angle) * rows + 29.5
        nearest_row, nearest_column = np.round(source_row).astype(int), np.round(source_column).astype(int)
        inside = (nearest_row >= 0) & (nearest_row < 60) & (nearest_column >= 0) & (nearest_column < 80)
        expected = np.where(inside, DEPTH[nearest_row.clip(0, 59), nearest_column.clip(0, 79)], 0)
        assert (out["mask"] == expected).mean() > 0.97  # the rest: places half way between two pixels
        outside = (source_row < -1) | (source_row > 60) | (source_column < -1) | (source_column > 80)
        assert (out["mask"][outside] == 0).all() and (out["image"][outside] == 0).all()
        filled += int(outside.sum())
    assert filled > 500


def test_rotation_draws_its_angle_and_its_half():
    step, angles = RandomRotate(), []
    for seed in range(400):
        out = draw(step, seed, image=IMAGE, mask=DEPTH)
        if step.params:
            angles.append(step.params["angle"])
        else:
            np.testing.assert_array_equal(out["mask"], DEPTH)
    assert 160 < len(angles) < 240 and -2.5 <= min(angles) < -2.3 and 2.3 < max(angles) <= 2.5
    with pytest.raises(UserError, match="RandomRotate"):
        RandomRotate(-1)


def test_color_aug_equals_plain_arithmetic_in_order():
    step = ColorAug(p=1.0)
    for seed in range(20):
        out = draw(step, seed, image=IMAGE, mask=DEPTH)
        p = step.params
        by_hand = IMAGE.astype(np.float64) ** p["exponent"] * p["factor"]
        by_hand = np.clip(by_hand * p["factors"][None, None, :], 0, 255)
        np.testing.assert_allclose(out["image"], by_hand, rtol=1e-6)
        assert out["image"].dtype == np.float32 and out["mask"] is not None
        np.testing.assert_array_equal(out["mask"], DEPTH)


def test_color_aug_ranges():
    step, drawn, taken = ColorAug(brightness=(0.75, 1.25)), [], 0
    for seed in range(600):
        step.set_random_seed(seed)
        drawn.append(step.get_params())
        taken += not np.array_equal(draw(step, seed, image=IMAGE[:4, :4])["image"], IMAGE[:4, :4])
    for values, low, high in (
        ([d["exponent"] for d in drawn], 0.9, 1.1),
        ([d["factor"] for d in drawn], 0.75, 1.25),
        ([f for d in drawn for f in d["factors"]], 0.9, 1.1),
    ):
        margin = 0.02 * (high - low)
        assert low <= min(values) < low + margin and high - margin < max(values) <= high
    assert len({tuple(d["factors"]) for d in drawn}) == 600 and all(len(set(d["factors"])) == 3 for d in drawn)
    assert 240 < taken < 360
    for options in ({"gamma": (1.1, 0.9)}, {"brightness": (0, 1)}, {"color": (1,)}):
        with pytest.raises(UserError, match="ColorAug"):
            ColorAug(**options)


def steps(size, **options):
    return {
        "border": None,
        "rotate": RandomRotate(),
        "flip": A.HorizontalFlip(p=0.5),
        "crop": RandomCrop(size, cat_max_ratio=1.0),
        "colour": ColorAug(),
        **options,
    }


def test_pipeline_gives_metres_and_pads_with_no_measurement():
    pipeline = DepthTrainPipeline({"crop": RandomCrop((50, 50), cat_max_ratio=1.0)}, (70, 50))
    pipeline.set_random_seed(0)
    image, depth_m = pipeline(IMAGE[:, :30], DEPTH[:, :30])
    assert image.shape == (3, 70, 50) and depth_m.shape == (70, 50) and depth_m.dtype == torch.float32
    assert (image[:, 50:] == 0).all() and (depth_m[50:] == 0).all() and (depth_m[:, 30:] == 0).all()
    start = next(t for t in range(11) if np.array_equal(DEPTH[t : t + 50, :30], depth_m[:50, :30].numpy()))
    np.testing.assert_array_equal(
        image[:, :50, :30].permute(1, 2, 0).numpy(), normalise(IMAGE[start : start + 50, :30])
    )
    pipeline.set_random_seed(0)
    assert torch.equal(pipeline(IMAGE[:, :30])[0], image) and pipeline(IMAGE[:, :30])[1] is None


def test_pipeline_moves_image_and_depth_together():
    image = np.repeat((DEPTH * 20).astype(np.uint8)[..., None], 3, 2)
    depth = image[..., 0].astype(np.float32)
    geometry = {"scale": RandomScale(60, (1, 1)), "flip": A.HorizontalFlip(p=0.5), "crop": RandomCrop((40, 48), 1.0)}
    pipeline = DepthTrainPipeline(geometry, (40, 48))
    first = set()
    for seed in range(20):
        pipeline.set_random_seed(seed)
        out, depth_m = pipeline(image, depth)
        np.testing.assert_allclose(out[0].numpy() * 58.395 + 123.675, depth_m.numpy(), atol=1e-3)
        first.add(depth_m[0, 0].item())
    assert len(first) > 5


def test_pipeline_is_a_function_of_the_seed():
    one, two = DepthTrainPipeline(steps((40, 48)), (40, 48)), DepthTrainPipeline(steps((40, 48)), (40, 48))
    outs = []
    for seed in range(8):
        one.set_random_seed(seed)
        outs.append(one(IMAGE, DEPTH))
    for seed in reversed(range(8)):
        two.set_random_seed(seed)
        image, depth_m = two(IMAGE, DEPTH)
        assert torch.equal(image, outs[seed][0]) and torch.equal(depth_m, outs[seed][1])
    assert len({tuple(depth_m[20].tolist()) for _, depth_m in outs}) == 8


def test_eval_cuts_only_where_it_is_asked_for_a_window():
    kb = DepthEvalTransform(crop="kb")
    assert kb.window((375, 1242)) == (23, 13, 375, 1229)
    assert kb(np.zeros((375, 1242, 3), np.uint8))[0].shape == (3, 375, 1242)
    assert DepthEvalTransform().window((60, 80)) == (0, 0, 60, 80)
    with pytest.raises(UserError, match="300 x 400"):
        kb.window((300, 400))


def test_eval_sizes():
    fixed = DepthEvalTransform(size=[480, 640], scales=[1.0, 0.5])
    assert fixed.sizes((427, 561)) == fixed.sizes((2000, 100)) == [(480, 640), (240, 320)]
    assert [tuple(view.shape) for view in fixed(IMAGE)] == [(3, 480, 640), (3, 240, 320)]
    assert DepthEvalTransform(short_side=30).sizes((60, 80)) == [(30, 40)]
    np.testing.assert_array_equal(DepthEvalTransform()(IMAGE)[0].permute(1, 2, 0).numpy(), normalise(IMAGE))
    for options in ({"size": [480]}, {"size": [0, 5]}, {"size": [4, 5], "short_side": 4}):
        with pytest.raises(UserError, match="size"):
            DepthEvalTransform(**options)
    with pytest.raises(UserError, match=r"Unknown crop.*'kbb'.*Did you mean 'kb'"):
        DepthEvalTransform(crop="kbb")
