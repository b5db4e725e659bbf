"""Training steps without chance."""

import albumentations as A
import numpy as np
import pytest

from dense_heads.data.depth_transforms import ColorAug, FixedCrop, RandomRotate
from dense_heads.data.transforms import PhotoMetricDistortion, RandomCrop, RandomScale, TrainPipeline
from dense_heads.data.unaugmented import is_random, without_chance

STEPS = {
    "border": FixedCrop(2, 4, 46, 60),
    "scale": RandomScale(40, (0.5, 2.0)),
    "rotate": RandomRotate(),
    "crop": RandomCrop(32),
    "flip": A.HorizontalFlip(p=0.5),
    "photometric": PhotoMetricDistortion(),
    "colour": ColorAug(),
    "nothing": None,
}


def test_what_is_left_depends_on_no_seed():
    left = without_chance(STEPS)
    assert [name for name, step in left.items() if step is not None] == ["border", "scale", "crop"]
    assert not any(is_random(step) for step in left.values() if step is not None)
    pipeline = TrainPipeline(left, 32)
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), rng.integers(0, 3, (48, 64), dtype=np.uint8)
    outputs = []
    for seed in range(3):
        pipeline.set_random_seed(seed)
        outputs.append(pipeline(image, mask))
    assert all(image.equal(outputs[0][0]) and mask.equal(outputs[0][1]) for image, mask in outputs)
    # The middle of the image at the protocol's own size: 44 x 56 -> 40 x 51 -> rows 4:36, columns 9:41.
    assert outputs[0][1].shape == (32, 32)
    import cv2

    whole = cv2.resize(mask[2:46, 4:60], (51, 40), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(outputs[0][1].numpy(), whole[4:36, 9:41])


@pytest.mark.parametrize(("ratio", "kept"), [((0.5, 2.0), 1.0), ((1.5, 3.0), 1.5), ((0.25, 0.5), 0.5)])
def test_a_random_size_becomes_the_nearest_to_the_size_itself(ratio, kept):
    assert without_chance({"scale": RandomScale(40, ratio)})["scale"].ratio == (kept, kept)


@pytest.mark.parametrize(
    ("step", "random"),
    [
        (A.Resize(8, 8), False),
        (A.CenterCrop(8, 8), False),
        (A.HorizontalFlip(p=1.0), True),
        (A.GaussianBlur(), True),
        (FixedCrop(0, 0, 4, 4), False),
        (RandomScale(8, (1.0, 1.0)), False),
        (A.OneOf([A.HorizontalFlip(), A.VerticalFlip()]), True),
    ],
)
def test_what_counts_as_random(step, random):
    assert is_random(step) == random
