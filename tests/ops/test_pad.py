import pytest
import torch
import torch.nn.functional as F

from dense_heads.errors import UserError
from dense_heads.ops.pad import POLICIES, fit_to_patch, unpad_map
from dense_heads.structures import Padding


# DINOv2's own sizes: image side -> padded side and what is added before it (facts 2.6).
@pytest.mark.parametrize(
    ("side", "padded", "before"),
    [(512, 518, 3), (640, 644, 2), (480, 490, 5), (352, 364, 6), (1216, 1218, 1), (341, 350, 4), (5, 14, 4)],
)
@pytest.mark.parametrize("policy", ["pad", "pad_exact"])
def test_padding_is_centred_zeros(side, padded, before, policy):
    images = torch.ones(2, 1, side, 28)
    fitted, padding = fit_to_patch(images, 14, policy)
    assert fitted.shape == (2, 1, padded, 28)
    assert padding == Padding(left=0, top=before, right=0, bottom=padded - side - before)
    assert torch.equal(fitted[:, :, before : before + side], images)
    assert fitted.sum() == images.sum()  # nothing but zeros was added

    turned, turned_padding = fit_to_patch(images.transpose(2, 3), 14, policy)
    assert torch.equal(turned, fitted.transpose(2, 3))
    assert (turned_padding.left, turned_padding.right) == (padding.top, padding.bottom)


def test_crop_keeps_the_centre():
    images = torch.arange(31 * 45).float().view(1, 1, 31, 45)
    fitted, padding = fit_to_patch(images, 14, "crop")
    assert torch.equal(fitted, images[:, :, 1:29, 1:43])
    assert padding == Padding()


@pytest.mark.parametrize(("size", "fitted_size"), [((20, 36), (14, 42)), ((21, 35), (28, 42)), ((3, 100), (14, 98))])
def test_resize_goes_to_the_nearest_multiple_and_at_least_one_patch(size, fitted_size):
    images = torch.randn(1, 3, *size)
    fitted, padding = fit_to_patch(images, 14, "resize")
    assert padding == Padding()
    assert torch.equal(fitted, F.interpolate(images, size=fitted_size, mode="bilinear", align_corners=False))


@pytest.mark.parametrize("policy", POLICIES)
def test_images_that_fit_are_left_alone(policy):
    images = torch.randn(1, 3, 28, 42)
    fitted, padding = fit_to_patch(images, 14, policy)
    assert fitted is images
    assert padding == Padding()


def test_errors_say_what_is_wrong():
    with pytest.raises(UserError, match=r"'padd'.*Did you mean 'pad'.*crop"):
        fit_to_patch(torch.zeros(1, 3, 28, 28), 14, "padd")
    with pytest.raises(UserError, match=r"13 x 40.*14 x 14.*'pad'"):
        fit_to_patch(torch.zeros(1, 3, 13, 40), 14, "crop")
    with pytest.raises(UserError, match="0 x 40"):
        fit_to_patch(torch.zeros(1, 3, 0, 40), 14, "pad")


def test_unpad_map_gives_every_pixel_its_own_place_back():
    images = torch.randn(2, 3, 30, 47)
    fitted, padding = fit_to_patch(images, 14, "pad_exact")
    assert torch.equal(unpad_map(fitted, padding, (42, 56), (30, 47)), images)


def test_unpad_map_of_a_patch_map_is_the_resized_map_cut_out():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 3, 4)  # a map of 3 x 4 patches of 14 pixels
    padding = Padding(left=4, top=6, right=5, bottom=6)
    cut = unpad_map(ramp, padding, (42, 56), (30, 47))
    assert cut.shape == (1, 1, 30, 47)
    # Pixel x of the padded image lies at (x + 0.5) / 14 - 0.5 on the ramp, held at its ends.
    expected = ((torch.arange(4, 51) + 0.5) / 14 - 0.5).clamp(0, 3)
    torch.testing.assert_close(cut[0, 0, 0], expected, atol=1e-5, rtol=0)
