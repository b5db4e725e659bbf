import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dense_heads.data.datasets.base import Sample, read_pairs
from dense_heads.data.datasets.depth_folders import DepthFolders
from dense_heads.data.datasets.kitti import KITTIEigen
from dense_heads.data.datasets.nyu import NYUDepth
from dense_heads.data.datasets.sun_rgbd import SUNRGBD
from dense_heads.data.depth import DepthDataset, collate_eval, collate_train
from dense_heads.data.depth_checks import check_depth, find_depth_problems
from dense_heads.data.depth_maps import DepthRule
from dense_heads.data.depth_transforms import ColorAug, DepthEvalTransform, DepthTrainPipeline, RandomRotate
from dense_heads.data.transforms import RandomCrop, normalise
from dense_heads.errors import UserError
from tests.factories import (
    DATA,
    fake_depth,
    make_depth_folders,
    make_kitti,
    make_nyu_depth,
    make_sun_rgbd,
    save,
    save_depth,
)

SPLITS = {"train": "training", "val": "validation"}
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")


def ids(samples):
    return [sample.image_id for sample in samples]


def test_nyu_layout(tmp_path):
    reader = NYUDepth(make_nyu_depth(tmp_path))
    assert reader.available() == ["train", "val"] and reader.samples("test") == []
    train = reader.samples("train")
    assert ids(train) == ["bedroom/rgb_00000", "bedroom/rgb_00002", "kitchen/rgb_00001"]  # sorted; the list is not
    assert train[0].image == tmp_path / "sync/bedroom/rgb_00000.jpg"
    assert train[0].depth == tmp_path / "sync/bedroom/sync_depth_00000.png" and train[0].focal == 518.8579
    assert reader.samples("val")[0].image == tmp_path / "official_splits/test/bedroom/rgb_00000.jpg"


def test_nyu_that_is_not_whole(tmp_path):
    with pytest.raises(UserError, match=r"nyudepthv2_train_files_with_gt(.|\n)*How to get it: ask"):
        NYUDepth(tmp_path / "gone", hint="ask")
    make_nyu_depth(tmp_path)
    (tmp_path / "sync/kitchen/sync_depth_00001.png").unlink()
    with pytest.raises(UserError, match=r"1 of the files .*sync_depth_00001\.png"):
        NYUDepth(tmp_path).samples("train")
    (tmp_path / "nyudepthv2_test_files_with_gt.txt").unlink()
    assert NYUDepth(tmp_path).available() == ["train"]
    with pytest.raises(UserError, match="nyudepthv2_test_files_with_gt"):
        NYUDepth(tmp_path).samples("val")


def test_kitti_drops_lines_without_depth_and_says_so(tmp_path):
    reader = KITTIEigen(make_kitti(tmp_path))
    val = reader.samples("val")
    assert len(val) == 2 and val == sorted(val, key=lambda s: str(s.image)) and len(reader.samples("train")) == 3
    assert reader.samples("val") and reader.notices == ["val: 1 of the 3 lines of kitti_eigen_test.txt have no depth"]
    assert val[0].focal == 721.5377 and val[0].depth.parts[-5] == "2011_09_26_drive_0100_sync"


def test_kitti_under_other_customary_names(tmp_path):
    make_kitti(tmp_path, train=1, val=1)
    (tmp_path / "input").rename(tmp_path / "raw")
    depths = tmp_path / "data_depth_annotated"
    depths.mkdir()
    (tmp_path / "gt_depth").rename(depths / "train")
    (tmp_path / "kitti_eigen_train.txt").rename(tmp_path / "eigen_train_files_with_gt.txt")
    reader = KITTIEigen(tmp_path)
    assert reader.available() == ["train", "val"] and "data_depth_annotated" in str(reader.samples("train")[0].depth)
    shutil.rmtree(depths)
    with pytest.raises(UserError, match="gt_depth does not exist"):
        KITTIEigen(tmp_path)


def test_sun_rgbd_is_there_to_be_measured(tmp_path):
    reader = SUNRGBD(make_sun_rgbd(tmp_path))
    assert reader.available() == ["test"] and reader.samples("val") == []
    test = reader.samples("test")
    assert ids(test) == ["SUNRGBD/kv1/a0/image/0000", "SUNRGBD/kv2/a1/image/0001"] and test[0].focal is None
    with pytest.raises(UserError, match="task=nyu_depth"):
        reader.samples("train")
    with pytest.raises(UserError, match="SUNRGBD_val_splits"):
        SUNRGBD(tmp_path / "SUNRGBD")


@pytest.mark.parametrize(
    "line",
    ["a.png", "a.png b.png c d", "a.png b.png far", "../a.png b.png 5", "a.png /x/../../b.png", "a b 0", "a b nan"],
)
def test_lists_of_another_form(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"ok.png ok_depth.png 500\n{line}\n")
    with pytest.raises(UserError, match=f"list.txt: the line '{re.escape(line)}'; expected"):
        read_pairs(tmp_path / "list.txt")


def test_lists_name_an_image_once(tmp_path):
    (tmp_path / "list.txt").write_text("/a.png b.png\na.png c.png\n")
    with pytest.raises(UserError, match=r"a\.png is named more than once"):
        read_pairs(tmp_path / "list.txt")


def test_folders(tmp_path):
    reader = DepthFolders(make_depth_folders(tmp_path), splits=SPLITS)
    train = reader.samples("train")
    assert ids(train) == [f"pic{i:03d}" for i in range(4)] and train[1].mask is None
    assert train[1].depth == tmp_path / "depth/training/pic001.png" and reader.samples("test") == []
    assert len(reader.samples("val")) == 2 and reader.made_split is None and reader.notices == []


def test_folders_without_splits_and_with_an_ending(tmp_path):
    for i in range(10):
        save(tmp_path / "images" / f"{i:02d}.png", fake_depth(i)[0])
        (tmp_path / "depth").mkdir(exist_ok=True)
        np.save(tmp_path / "depth" / f"{i:02d}_metres.npy", fake_depth(i)[1])
    reader = DepthFolders(tmp_path)
    assert len(reader.samples("train")) == 8 and len(reader.samples("val")) == 2
    assert any("'_metres'" in notice for notice in reader.notices)
    again = DepthFolders(tmp_path, split=reader.made_split, depth_suffix="_metres")
    assert again.samples("val") == reader.samples("val")


def test_folders_name_a_missing_partner(tmp_path):
    make_depth_folders(tmp_path)
    (tmp_path / "depth/training/pic002.png").unlink()
    with pytest.raises(UserError, match=r"no partner: .*training/pic002\.jpg\. Expected an image and a depth map"):
        DepthFolders(tmp_path, splits=SPLITS).samples("train")
    skipping = DepthFolders(tmp_path, splits=SPLITS, unpaired="skip")
    assert ids(skipping.samples("train")) == ["pic000", "pic001", "pic003"] and "pic002.jpg" in skipping.notices[0]
    save_depth(tmp_path / "depth/validation/extra.png", fake_depth(0)[1])
    with pytest.raises(UserError, match=r"no partner: .*validation/extra\.png"):
        DepthFolders(tmp_path, splits=SPLITS).samples("val")
    for path in (tmp_path / "depth/training").iterdir():
        path.rename(path.with_suffix(".jpg"))
    with pytest.raises(UserError, match=r"pic000, pic001, pic002 and 1 more beside nothing(.|\n)*\.npy"):
        DepthFolders(tmp_path, splits=SPLITS).samples("train")
    shutil.rmtree(tmp_path / "depth")
    with pytest.raises(UserError, match="depth/training"):
        DepthFolders(tmp_path, splits=SPLITS).samples("train")


def test_folders_with_two_depths_of_one_name(tmp_path):
    make_depth_folders(tmp_path)
    np.save(tmp_path / "depth/training/pic000.npy", fake_depth(0)[1])
    with pytest.raises(UserError, match="have one name"):
        DepthFolders(tmp_path, splits=SPLITS).samples("train")


def dataset(tmp_path, transform, scale=1000, **options):
    samples = DepthFolders(make_depth_folders(tmp_path, **options), splits=SPLITS).samples("train")
    return DepthDataset(samples, DepthRule(scale), transform, seed=3)


def augmented(size=(32, 40)):
    steps = {"rotate": RandomRotate(), "crop": RandomCrop(size, cat_max_ratio=1.0), "colour": ColorAug()}
    return DepthTrainPipeline(steps, size)


def test_train_items_are_functions_of_seed_epoch_and_index(tmp_path):
    one = dataset(tmp_path, augmented())
    two = DepthDataset(one.samples, DepthRule(1000), augmented(), seed=3)
    other = DepthDataset(one.samples, DepthRule(1000), augmented(), seed=4)
    keys = [(0, 0), (0, 1), (1, 0), (5, 3)]
    items = {key: one[key] for key in keys}
    for key in reversed(keys):
        again = two[key]
        assert torch.equal(again["image"], items[key]["image"])
        assert torch.equal(again["depth_m"], items[key]["depth_m"])
    assert not torch.equal(items[0, 0]["image"], items[1, 0]["image"])
    assert not torch.equal(other[0, 0]["image"], items[0, 0]["image"])
    item = items[0, 1]
    assert item["image"].shape == (3, 32, 40) and item["depth_m"].shape == (32, 40) and item["size"] == (32, 40)
    assert item["depth_m"].dtype == torch.float32 and item["original_size"] == (48, 64) and "intrinsics" not in item
    batch = collate_train(list(items.values()))
    assert batch["depth_m"].shape == (4, 32, 40) and batch["image"].shape == (4, 3, 32, 40)
    assert batch["image_id"] == ["pic000", "pic001", "pic000", "pic003"] and "mask" not in batch


def test_train_items_do_not_depend_on_workers(tmp_path):
    data = dataset(tmp_path, augmented())
    batches = [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(1, 1), (1, 0)]]
    loads = [list(DataLoader(data, batch_sampler=batches, collate_fn=collate_train, num_workers=num)) for num in (0, 2)]
    for plain, worked in zip(*loads, strict=True):
        assert torch.equal(plain["image"], worked["image"]) and torch.equal(plain["depth_m"], worked["depth_m"])


def test_eval_items_keep_their_own_size(tmp_path):
    root = make_nyu_depth(tmp_path, val=1)
    sample = NYUDepth(root).samples("val")[0]
    item = DepthDataset([sample], DepthRule(1000), DepthEvalTransform(short_side=240))[0]
    assert item["image"].shape == (3, 240, 320) and item["depth_m"].shape == (480, 640)
    expected = np.array(Image.open(sample.depth)).astype(np.float32) / np.float32(1000)
    np.testing.assert_allclose(item["depth_m"].numpy(), expected, rtol=1e-6)
    assert (item["depth_m"][:60, :80] == 0).all()  # the hole stays one
    # The focal length of the list, the axis through the middle, for the label's pixels.
    torch.testing.assert_close(
        item["intrinsics"], torch.tensor([[518.8579, 0, 319.5], [0, 518.8579, 239.5], [0, 0, 1]])
    )


def test_eval_crops_image_label_and_intrinsics_alike(tmp_path):
    samples = KITTIEigen(make_kitti(tmp_path, train=1)).samples("val")
    data = DepthDataset(samples, DepthRule(256), DepthEvalTransform(crop="kb"))
    batch = collate_eval([data[0], data[1]])
    for i, (top, left, height, width) in enumerate([(23, 13, 375, 1242), (18, 5, 370, 1226)]):
        image = np.array(Image.open(samples[i].image))[top:, left : left + 1216]
        np.testing.assert_array_equal(batch["image"][i].permute(1, 2, 0).numpy(), normalise(image))
        depth = np.array(Image.open(samples[i].depth))[top:, left : left + 1216] / np.float32(256)
        np.testing.assert_array_equal(batch["depth_m"][i].numpy(), depth)
        assert batch["original_size"][i].tolist() == [height, width] and batch["size"][i].tolist() == [352, 1216]
        assert batch["intrinsics"][i, 0, 2] == (width - 1) / 2 - left
        assert batch["intrinsics"][i, 1, 2] == (height - 1) / 2 - top
    assert batch["depth_m"][0].gt(0).float().mean() < 0.3


def test_eval_of_sun_rgbd_ignores_the_shape_and_cuts_depth_at_8_m(tmp_path):
    samples = SUNRGBD(make_sun_rgbd(tmp_path)).samples("test")
    rule = DepthRule(1000, 0, "sun_rgbd")
    data = DepthDataset(samples, rule, DepthEvalTransform(size=[480, 640]))
    batch = collate_eval([data[0], data[1]])
    assert [tuple(image.shape) for image in batch["image"]] == [(3, 480, 640)] * 2
    assert [tuple(depth.shape) for depth in batch["depth_m"]] == [(427, 561), (530, 730)] and "intrinsics" not in batch
    metres = np.minimum(np.round(fake_depth(1, (530, 730), far=9.5)[1] * 1000), 8000) / 1000
    np.testing.assert_allclose(batch["depth_m"][1].numpy(), metres, rtol=1e-6)


def test_several_scales_become_views_and_unlabelled_images_have_no_depth(tmp_path):
    image = save(tmp_path / "a.png", fake_depth(0)[0])
    data = DepthDataset([Sample("a", image)], DepthRule(), DepthEvalTransform(short_side=24, scales=(1.0, 2.0)))
    batch = collate_eval([data[0]])
    assert [tuple(view.shape) for view in batch["views"][0]] == [(3, 24, 32), (3, 48, 64)]
    assert "depth_m" not in batch and "image" not in batch


def test_items_name_the_file(tmp_path):
    data = dataset(tmp_path, augmented())
    save_depth(data.samples[0].depth, fake_depth(0, (20, 30))[1])
    with pytest.raises(UserError, match=r"pic000\.jpg is 48 x 64 .*pic000\.png is 20 x 30"):
        data[0, 0]
    data.samples[1].depth.write_bytes(b"no")
    with pytest.raises(UserError, match=r"pic001\.png: not an image"):
        data[0, 1]
    small = DepthDataset(data.samples, DepthRule(), DepthEvalTransform(crop="kb"))
    with pytest.raises(UserError, match=r"pic002\.jpg: an image of 48 x 64"):
        small[2]


def checked(root, scale=1000, min_m=0.001, max_m=10.0, **options):
    reader = DepthFolders(root, splits=SPLITS, **options)
    splits = {split: reader.samples(split) for split in ("train", "val")}
    return list(find_depth_problems(splits, DepthRule(scale), min_m, max_m))


def test_good_data_have_no_problems(tmp_path):
    make_depth_folders(tmp_path)
    save_depth(tmp_path / "depth/training/pic000.png", np.zeros((48, 64)))  # one empty map among others is none
    assert checked(tmp_path) == []


def test_a_forgotten_scale_is_found_with_the_one_that_fits(tmp_path):
    make_depth_folders(tmp_path)
    problems = checked(tmp_path, scale=1)
    assert len(problems) == 2
    depths = np.concatenate([np.array(Image.open(p)).ravel() for p in (tmp_path / "depth/training").iterdir()])
    median = float(re.match(r"train: median (\d+(\.\d+)?) m: is data\.depth_scale missing\?", problems[0])[1])
    assert abs(median - np.median(depths[depths > 0])) < 0.02 * median and 2000 < median < 5000
    assert "0 % of them are inside task.depth_range (0.001 to 10 m)" in problems[0] and ", such as 1000" in problems[0]


def test_metres_that_are_divided_once_more_are_found(tmp_path):
    for path in sorted(make_depth_folders(tmp_path).glob("depth/*/*.png")):
        np.save(path.with_suffix(".npy"), np.array(Image.open(path)).astype(np.float32) / 1000)
        path.unlink()
    assert checked(tmp_path, scale=1) == []
    problems = checked(tmp_path, scale=1000)
    assert len(problems) == 2 and "99 % of them are in the first hundredth" in problems[0]
    assert ", such as 1 (" in problems[0]


def test_no_measured_pixel(tmp_path):
    for path in make_depth_folders(tmp_path).glob("depth/validation/*"):
        save_depth(path, np.zeros((48, 64)))
    assert len(checked(tmp_path)) == 1
    with pytest.raises(UserError, match=r"1 problem in the data:\n- val: none of its 2 depth maps has a measured"):
        reader = DepthFolders(tmp_path, splits=SPLITS)
        check_depth({split: reader.samples(split) for split in ("train", "val")}, DepthRule(), 0.001, 10)


def test_a_measured_pixel_is_looked_for_beyond_the_first_maps(tmp_path):
    make_depth_folders(tmp_path, train=6)
    for i in (0, 1, 2, 4, 5):
        save_depth(tmp_path / f"depth/training/pic{i:03d}.png", np.zeros((48, 64)))
    samples = DepthFolders(tmp_path, splits=SPLITS).samples("train")
    assert list(find_depth_problems({"train": samples}, DepthRule(), 0.001, 10, max_maps=2)) == []


def test_broken_files_and_sizes_are_named_once(tmp_path):
    make_depth_folders(tmp_path)
    (tmp_path / "images/training/pic000.jpg").write_bytes(b"no image")
    save_depth(tmp_path / "depth/training/pic001.png", fake_depth(0, (10, 12))[1])
    np.save(tmp_path / "depth/training/pic002.npy", np.zeros((2, 3, 4)))
    (tmp_path / "depth/training/pic002.png").unlink()
    save(tmp_path / "depth/validation/pic100.png", np.zeros((48, 64, 3), np.uint8))
    problems = checked(tmp_path)
    assert len(problems) == 4
    for problem, text in zip(
        problems,
        [r"pic000\.jpg: not an image", r"pic001\.png is 10 x 12", r"pic002\.npy: .*shape \(2, 3, 4\)", r"pic100\.png"],
        strict=True,
    ):
        assert re.search(text, problem)
    gone = Sample("x", tmp_path / "images/training/pic003.jpg", depth=tmp_path / "gone.png")
    assert "gone.png: no such file" in "".join(find_depth_problems({"train": [gone]}, DepthRule(), 0.001, 10))


def test_a_file_in_two_splits_and_no_samples(tmp_path):
    samples = DepthFolders(make_depth_folders(tmp_path), splits=SPLITS).samples("train")
    both = list(find_depth_problems({"train": samples, "val": samples[:1]}, DepthRule(), 0.001, 10))
    assert len(both) == 1 and "is in val and in train" in both[0]
    assert list(find_depth_problems({"train": [], "val": []}, DepthRule(), 0.001, 10)) == [
        "there are no samples at all"
    ]


@real_data
def test_real_sets_pass_their_checks():
    nyu = NYUDepth(DATA / "nyu_depth_v2")
    official = {split: nyu.samples(split) for split in ("train", "val")}
    assert [len(samples) for samples in official.values()] == [3, 6]
    check_depth(official, DepthRule(1000), 0.001, 10)
    for name, counts in (("nyu_depth", (150, 60)), ("rgbd_scenes", (20, 10))):
        reader = DepthFolders(DATA / name, splits=SPLITS)
        splits = {split: reader.samples(split) for split in ("train", "val")}
        assert tuple(len(samples) for samples in splits.values()) == counts
        check_depth(splits, DepthRule(1000), 0.001, 10, max_maps=8)
        found = "\n".join(find_depth_problems(splits, DepthRule(1), 0.001, 10, max_headers=0, max_maps=8))
        assert found.count("scale missing?") == 2 and found.count(", such as 1000") == 2


@real_data
def test_real_official_frames_are_the_same_as_in_the_pairs():
    val = {s.image_id[-5:]: s for s in NYUDepth(DATA / "nyu_depth_v2").samples("val")}
    pairs = {s.image_id[-5:]: s for s in DepthFolders(DATA / "nyu_depth", splits=SPLITS).samples("val")}
    shared = val.keys() & pairs.keys()
    assert shared
    for name in shared:
        np.testing.assert_array_equal(DepthRule().read(val[name].depth), DepthRule().read(pairs[name].depth))
