"""Multi-crop augmentation: probabilities, sizes, determinism; the fast way beside the published one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dense_heads.data.crops import CropDraw, cut, published_crops
from dense_heads.data.fast_crops import cut_batch
from dense_heads.data.unlabelled import CropDataset, ImageFiles, InMemory, collate_crops, find_images, sample_patches
from dense_heads.errors import UserError
from dense_heads.structures import IMAGENET_MEAN, IMAGENET_STD
from tests.factories import fake_pair, save


@pytest.fixture(scope="module")
def picture():
    rows, columns = np.mgrid[0:120, 0:160]
    return np.stack([rows * 2, columns, 255 - rows - columns // 2], -1).clip(0, 255).astype(np.uint8)


def test_the_recipe_is_the_published_one():
    crops = published_crops(seed=0)
    assert [recipe.size for recipe in crops.recipes] == [224] * 2 + [98] * 8
    assert [recipe.blur for recipe in crops.recipes[:3]] == [1.0, 0.1, 0.5]
    assert [recipe.solarize for recipe in crops.recipes[:3]] == [0.0, 0.2, 0.0]
    released = published_crops(seed=0, blur="released")
    assert [recipe.blur for recipe in released.recipes[:3]] == [0.0, 0.9, 0.5]
    plain = published_crops(seed=0, blur="none", solarize=0.0)
    assert {(recipe.blur, recipe.solarize) for recipe in plain.recipes} == {(0.0, 0.0)}
    assert (crops.recipes[0].scale, crops.recipes[2].scale) == ((0.32, 1.0), (0.05, 0.32))


def test_what_is_drawn_has_the_published_frequencies():
    draws = [published_crops(seed=0).draws((100, 120), 0, index) for index in range(600)]
    second, local = [d[1] for d in draws], [d[2] for d in draws]
    share = lambda kind: sum(map(bool, kind)) / len(draws)  # noqa: E731
    assert all(d[0].blur_sigma for d in draws)
    assert share(d.blur_sigma for d in second) == pytest.approx(0.1, abs=0.05)
    assert share(d.blur_sigma for d in local) == pytest.approx(0.5, abs=0.07)
    assert share(d.solarize for d in second) == pytest.approx(0.2, abs=0.06)
    assert share(d.flip for d in local) == pytest.approx(0.5, abs=0.07)
    assert share(d.grey for d in local) == pytest.approx(0.2, abs=0.06)
    assert share(d.jitter for d in local) == pytest.approx(0.8, abs=0.06)
    areas = [d.box[2] * d.box[3] / 12000 for d in local]
    assert 0.04 < min(areas) and max(areas) < 0.34
    assert {name for d in local for name, _ in d.jitter} == {"brightness", "contrast", "saturation", "hue"}
    assert len({tuple(name for name, _ in d.jitter) for d in local}) > 10  # in any order


def test_crops_are_a_function_of_seed_epoch_and_index(picture):
    crops = published_crops(seed=3, global_size=28, local_size=14, num_local=2)
    again = published_crops(seed=3, global_size=28, local_size=14, num_local=2)
    again(picture, 0, 5)  # whatever came before
    for ours, theirs in zip(crops(picture, 1, 2), again(picture, 1, 2), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(crops(picture, 2, 2)[0], crops(picture, 1, 2)[0])


def test_the_fast_way_gives_nearly_the_published_pixels(picture):
    muted = (90 + picture * 0.3).astype(np.uint8)  # nothing is clipped: the fast way clips once, at the end
    crops = published_crops(seed=0, global_size=56, local_size=28, num_local=1)
    differences, apart = [], []
    for index in range(20):
        for draw, recipe in zip(crops.draws(muted.shape[:2], 0, index), crops.recipes, strict=True):
            plain = replace(draw, jitter=tuple(step for step in draw.jitter if step[0] != "hue"), solarize=False)
            fast, published = cut_batch([muted], [plain], recipe.size)[0], cut(muted, plain, recipe.size)
            differences.append(float((fast - published).abs().mean()))
            apart.append(float((published - cut(muted, replace(plain, jitter=()), recipe.size)).abs().mean()))
    assert max(differences) < 0.06  # in deviations of ImageNet's pixels
    assert np.median(apart) > 0.1  # what the colour steps do is far more


def test_the_fast_hue_turns_as_far_as_the_published_one():
    grey = np.full((28, 28, 3), (140, 110, 110), np.uint8)  # a little red
    for factor, lower in ((0.1, 2), (-0.1, 1)):  # towards yellow: blue falls behind green; towards magenta the reverse
        draw = CropDraw((0, 0, 28, 28), False, (("hue", factor),), False, None, False)
        for pixels in (cut_batch([grey], [draw], 28)[0], cut(grey, draw, 28)):
            means = (pixels.mean((1, 2)) * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)).tolist()
            assert np.argmin(means) == lower and np.argmax(means) == 0


def test_a_batch_is_laid_out_view_by_view(tmp_path, picture):
    for index in range(3):
        save(tmp_path / f"{index}.png", fake_pair(index)[0])
    crops = published_crops(seed=0, global_size=28, local_size=14, num_local=2)
    dataset = CropDataset(find_images(tmp_path), crops)
    keys = [(0, 2), (0, 0), (1, 1)]
    batch = collate_crops(dataset.__getitems__(keys))
    assert [tuple(group.shape) for group in batch["crops"]] == [(6, 3, 28, 28), (6, 3, 14, 14)]
    assert torch.equal(batch["crops"][0][4], dataset[(0, 0)][1])
    assert torch.equal(batch["crops"][1][2], dataset[(1, 1)][2])
    fast = CropDataset(InMemory(find_images(tmp_path), 40), crops, fast=True)
    assert [tuple(group.shape) for group in collate_crops(fast.__getitems__(keys))["crops"]] == [
        (6, 3, 28, 28),
        (6, 3, 14, 14),
    ]
    alone = fast.__getitems__([(0, 0)])["crops"][0]
    assert torch.allclose(alone[1], fast.__getitems__(keys)["crops"][0][4])  # whatever else is in the batch


def test_images_are_found_in_folders_lists_and_shards(tmp_path):
    import tarfile

    for index in range(3):
        save(tmp_path / "images" / f"sub{index % 2}" / f"{index}.png", fake_pair(index)[0])
    folder = find_images(tmp_path / "images")
    assert isinstance(folder, ImageFiles) and len(folder) == 3
    (tmp_path / "list.txt").write_text("images/sub0/0.png\nimages/sub1/1.png\n")
    assert np.array_equal(find_images(tmp_path / "list.txt").read(1), folder.read(2))
    with tarfile.open(tmp_path / "shard-0000.tar", "w") as archive:
        archive.add(tmp_path / "images" / "sub1" / "1.png", "1.png")
        archive.add(tmp_path / "list.txt", "1.txt")
    shards = find_images(tmp_path)
    assert len(shards) == 1 and np.array_equal(shards.read(0), folder.read(2))


def test_sampled_patches_are_pieces_of_the_images(tmp_path):
    for index in range(2):
        save(tmp_path / f"{index}.png", np.full((20, 16, 3), (40 + 100 * index, 90, 10), np.uint8))
    patches = sample_patches(find_images(tmp_path), 14, seed=0, number=6).view(6, 3, 14 * 14)
    pixels = patches * torch.tensor(IMAGENET_STD).view(1, 3, 1) + torch.tensor(IMAGENET_MEAN).view(1, 3, 1)
    assert sorted(pixels[:, 0, 0].round().tolist()) == [40.0] * 3 + [140.0] * 3
    assert torch.allclose(pixels[:, 1:], torch.tensor([90.0, 10.0]).view(1, 2, 1).expand(6, 2, 196), atol=1e-3)
    with pytest.raises(UserError, match="20 x 20"):
        sample_patches(find_images(tmp_path), 20, seed=0)


def test_mistakes_are_named(tmp_path):
    (tmp_path / "list.txt").write_text("gone.png\n")
    with pytest.raises(UserError, match="gone"):
        find_images(tmp_path / "list.txt")
    with pytest.raises(UserError, match="no images"):
        find_images(tmp_path)
    (tmp_path / "bad.tar").write_bytes(b"x" * 600)
    with pytest.raises(UserError, match="tar"):
        find_images(tmp_path)
    with pytest.raises(UserError, match="multiples"):
        published_crops(0, global_size=100)
    with pytest.raises(UserError, match="released"):
        published_crops(0, blur="sometimes")
    with pytest.raises(UserError, match="scale"):
        published_crops(0, global_scale=(0.5, 0.2))


def test_a_crop_of_a_tiny_image_still_works():
    image = np.array(Image.new("RGB", (3, 40), (200, 10, 30)))
    first = published_crops(seed=0, global_size=28, local_size=14, num_local=1)(image, 0, 0)
    assert [tuple(crop.shape) for crop in first] == [(3, 28, 28), (3, 28, 28), (3, 14, 14)]
