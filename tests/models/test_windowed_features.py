"""A head that asks for windows sees each block near and far: in windows, and in the image made small."""

import pytest
import torch
import torch.nn.functional as F

import dense_heads
from dense_heads.data.records import decode, encode
from dense_heads.heads.plain_detr import PlainDETR
from dense_heads.models.dense import FrozenBackbone
from dense_heads.structures import FeatureRequest, SeenView


@pytest.fixture(scope="module")
def backbone():
    torch.set_num_threads(1)
    return FrozenBackbone(dense_heads.load_backbone("vitn14_reg", None), "pad")


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 3, 70, 98, generator=torch.Generator().manual_seed(0))  # 5 x 7 patches


NEAR_AND_FAR = FeatureRequest((5, 7), False, 2)
WHOLE = FeatureRequest((5, 7), False)


def test_windows_are_tiled_beside_a_global_view(backbone, image):
    """2 x 2 windows of 3 x 4 patches, the last row and column smaller; then the first half of the channels."""
    (*_, found) = backbone(image, [NEAR_AND_FAR]).features(NEAR_AND_FAR).patch_maps
    assert found.shape == (1, 2 * 192, 5, 7)
    for top, bottom in ((0, 3), (3, 5)):
        for left, right in ((0, 4), (4, 7)):
            window = image[..., 14 * top : 14 * bottom, 14 * left : 14 * right]
            (*_, alone) = backbone(window, [WHOLE]).features(WHOLE).patch_maps
            torch.testing.assert_close(found[:, 192:, top:bottom, left:right], alone)
    small = F.interpolate(image, (42, 56), mode="bilinear", antialias=True)
    seen = backbone(small, [WHOLE]).features(WHOLE)
    far = F.interpolate(seen.patch_maps[-1], (5, 7), mode="bilinear")
    torch.testing.assert_close(found[:, :192], far)
    torch.testing.assert_close(backbone(image, [NEAR_AND_FAR]).features(NEAR_AND_FAR).cls_tokens, seen.cls_tokens)


def test_heads_with_and_without_windows_share_a_pass(backbone, image):
    both = backbone(image, [NEAR_AND_FAR, WHOLE])
    for request in (NEAR_AND_FAR, WHOLE):
        alone = backbone(image, [request]).features(request)
        torch.testing.assert_close(both.features(request).patch_maps, alone.patch_maps)


def test_more_windows_than_patches_are_windows_of_one_patch(backbone, image):
    request = FeatureRequest((7,), True, 9)
    assert backbone(image, [request]).features(request).patch_maps[0].shape == (1, 384, 5, 7)


def test_cached_records_keep_both(backbone, image):
    seen = backbone(image, [NEAR_AND_FAR, WHOLE])
    item = decode(encode({}, [SeenView((70, 98), [seen])], training=True, dtype=torch.float32))
    for request in (NEAR_AND_FAR, WHOLE):
        assert all(map(torch.equal, item["features"].features(request).patch_maps, seen.features(request).patch_maps))


def test_a_head_asks_for_what_it_was_made_for(backbone, image):
    arguments = {"blocks": "quarters", "norm": False, "windows": 3}
    head = PlainDETR(backbone.widths(arguments), 2, channels=32, num_heads=4, queries=9, **arguments)
    assert head.in_channels == (384,) * 4 and backbone.request(head) == FeatureRequest((1, 3, 5, 7), False, 3)
    features = backbone(image, [backbone.request(head)]).features(backbone.request(head))
    assert len(head.eval().detect(features, [(70, 98)])[0]["scores"]) > 0
