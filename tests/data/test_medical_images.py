import numpy as np
import pytest

from dense_heads.data.field_of_view import bright_field
from dense_heads.data.medical import with_borders
from dense_heads.data.medical_transforms import ForegroundCrop
from dense_heads.errors import UserError


def test_borders_part_objects_that_touch():
    objects = np.zeros((12, 16), int)
    objects[2:10, 2:8], objects[2:10, 8:14] = 1, 2
    classes = with_borders(objects, 1)
    assert (classes[objects == 0] == 0).all() and (classes[3:9, 7:9] == 2).all()
    assert (classes[3:9, 3:7] == 1).all() and (classes[3:9, 9:13] == 1).all()
    assert (classes[2, 2:14] == 2).all()
    wide = with_borders(objects, 2)
    assert (wide == 2).sum() > (classes == 2).sum() and (wide == 1).any()
    whole = with_borders(np.ones((6, 6), int), 2)
    assert (whole == 1).all()  # the image's edge is no border


def test_the_field_of_view_is_the_largest_bright_part_without_holes():
    rows, columns = np.indices((60, 60))
    disc = (rows - 30) ** 2 + (columns - 30) ** 2 < 26**2
    image = np.where(disc[..., None], (150, 60, 20), 4).astype(np.uint8)
    image[28:32, 28:32] = 0  # a dark spot inside
    image[0:5, 0:5] = 200  # a mark outside
    field = bright_field(image, 20)
    assert field[30, 30] and not field[2, 2] and (field != disc).mean() < 0.01
    assert bright_field(np.zeros((5, 5, 3), np.uint8), 20).all()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_crops_hold_foreground_as_often_as_said_and_lie_inside(share):
    mask = np.zeros((100, 120), np.uint8)
    mask[90, 117] = 1
    image = np.zeros((100, 120, 3), np.uint8)
    crop = ForegroundCrop(24, foreground=share)
    held = 0
    for seed in range(40):
        crop.set_random_state(np.random.default_rng(seed), None)
        params = crop.get_params_dependent_on_data({"shape": image.shape}, {"mask": mask})
        cut = crop.apply_to_mask(mask, **params)
        assert cut.shape == (24, 24)
        held += bool(cut.any())
    assert held == 40 if share == 1 else held < 8
    places = set()
    for seed in range(40):
        crop.set_random_state(np.random.default_rng(seed), None)
        places.add(tuple(crop.get_params_dependent_on_data({"shape": image.shape}, {"mask": mask}).values()))
    assert len(places) > 10  # not always in the middle


def test_small_images_are_kept_whole_and_bad_shares_refused():
    crop = ForegroundCrop(50, foreground=1.0)
    crop.set_random_state(np.random.default_rng(0), None)
    mask = np.ones((30, 80), np.uint8)
    params = crop.get_params_dependent_on_data({"shape": (30, 80)}, {"mask": mask})
    assert params["top"] == 0 and 0 <= params["left"] <= 30
    with pytest.raises(UserError, match="foreground"):
        ForegroundCrop(50, foreground=2)
