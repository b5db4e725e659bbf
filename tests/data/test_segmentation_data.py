import pickle

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dense_heads.data.checks import check_segmentation, find_problems
from dense_heads.data.datasets.base import Sample
from dense_heads.data.datasets.folders import PairedFolders
from dense_heads.data.labels import LabelRule
from dense_heads.data.sampler import StepBatchSampler
from dense_heads.data.segmentation import SegmentationDataset, collate_eval, collate_train
from dense_heads.data.transforms import (
    EvalTransform,
    PhotoMetricDistortion,
    RandomCrop,
    RandomScale,
    TrainPipeline,
    normalise,
)
from dense_heads.errors import UserError
from tests.factories import DATA, fake_pair, make_pairs, save


def make_samples(root, num=6, **options):
    make_pairs(root / "images", root / "masks", num, **options)
    return [
        Sample(p.stem, p, root / "masks" / f"{p.stem}.png") for p in sorted((root / "images").iterdir())
    ]  # fmt: skip


def train_set(samples, seed=0, num_classes=3):
    steps = {
        "scale": RandomScale(40, (0.5, 2.0)),
        "crop": RandomCrop(32),
        "flip": A.HorizontalFlip(p=0.5),
        "photometric": PhotoMetricDistortion(),
    }
    return SegmentationDataset(samples, LabelRule(num_classes), TrainPipeline(steps, 32), seed)


def test_train_items(tmp_path):
    item = train_set(make_samples(tmp_path))[(3, 2)]
    assert item["image"].shape == (3, 32, 32) and item["image"].dtype == torch.float32
    assert item["mask"].shape == (32, 32) and item["mask"].dtype == torch.int64
    assert set(item["mask"].unique().tolist()) <= {0, 1, 2, 255}
    assert item["image_id"] == "pic002" and item["path"].endswith("images/pic002.png")
    assert item["size"] == (32, 32) and item["original_size"] == (48, 64)


def test_random_choices_depend_on_seed_epoch_and_index_alone(tmp_path):
    samples = make_samples(tmp_path)
    dataset = train_set(samples)
    first = dataset[(0, 1)]["image"]
    dataset[(5, 3)], dataset[(0, 0)]
    assert torch.equal(dataset[(0, 1)]["image"], first)
    assert torch.equal(train_set(samples)[(0, 1)]["image"], first)
    assert not torch.equal(dataset[(1, 1)]["image"], first)
    assert not torch.equal(train_set(samples, seed=1)[(0, 1)]["image"], first)


def test_any_number_of_workers_gives_the_same_bits(tmp_path):
    samples = make_samples(tmp_path, 5)

    def run(workers, start=0):
        sampler = StepBatchSampler(5, 4, seed=7, max_steps=8, start_step=start)
        loader = DataLoader(
            train_set(samples), batch_sampler=sampler, num_workers=workers, collate_fn=collate_train
        )  # fmt: skip
        return [(batch["image"], batch["mask"], batch["image_id"]) for batch in loader]

    alone, two, late = run(0), run(2), run(2, start=3)
    assert len(alone) == len(two) == 8
    for (a, am, ai), (b, bm, bi) in zip(alone + alone[3:], two + late, strict=True):
        assert torch.equal(a, b) and torch.equal(am, bm) and ai == bi
    # 32 places over 5 images: whole epochs, and no image looks the same twice
    assert len({image.numpy().tobytes() for batch in alone for image in batch[0]}) == 32


def test_eval_items_and_batches(tmp_path):
    samples = make_samples(tmp_path, 2) + make_samples(tmp_path / "more", 1, first_seed=9, size=(30, 20))
    dataset = SegmentationDataset(samples, LabelRule(3), EvalTransform(24))
    batch = collate_eval([dataset[i] for i in range(3)])
    assert [tuple(image.shape) for image in batch["image"]] == [(3, 24, 32), (3, 24, 32), (3, 36, 24)]
    assert [tuple(mask.shape) for mask in batch["mask"]] == [(48, 64), (48, 64), (30, 20)]
    np.testing.assert_array_equal(batch["mask"][2].numpy(), fake_pair(9, (30, 20))[1])
    assert batch["original_size"].tolist() == [[48, 64], [48, 64], [30, 20]]
    assert batch["size"].tolist() == [[24, 32], [24, 32], [36, 24]]
    assert batch["image_id"] == ["pic000", "pic001", "pic009"] and "views" not in batch
    own_size = SegmentationDataset(samples, LabelRule(3), EvalTransform(None))[2]["image"]
    np.testing.assert_array_equal(own_size.permute(1, 2, 0).numpy(), normalise(fake_pair(9, (30, 20))[0]))


def test_eval_with_several_scales_gives_views(tmp_path):
    dataset = SegmentationDataset(make_samples(tmp_path, 2), LabelRule(3), EvalTransform(24, scales=(1.0, 2.0)))
    batch = collate_eval([dataset[0], dataset[1]])
    assert "image" not in batch
    assert [[tuple(v.shape[1:]) for v in views] for views in batch["views"]] == [[(24, 32), (48, 64)]] * 2


def test_samples_without_masks(tmp_path):
    samples = [Sample(s.image_id, s.image, None) for s in make_samples(tmp_path, 2)]
    dataset = SegmentationDataset(samples, LabelRule(3), EvalTransform(24))
    assert "mask" not in collate_eval([dataset[0], dataset[1]])


def test_collate_train_stacks(tmp_path):
    dataset = train_set(make_samples(tmp_path))
    batch = collate_train([dataset[(0, i)] for i in range(3)])
    assert batch["image"].shape == (3, 3, 32, 32) and batch["mask"].shape == (3, 32, 32)
    assert batch["original_size"].tolist() == [[48, 64]] * 3


def test_binary_masks_are_decided_for_the_whole_data_set(tmp_path):
    samples = make_samples(tmp_path, 4, num_classes=2)
    for sample in samples[1:]:
        save(sample.mask, np.array(Image.open(sample.mask)) * 255)
    save(samples[0].mask, np.zeros((48, 64), np.uint8))  # this one alone would say: class ids
    dataset = SegmentationDataset(samples, LabelRule(2), EvalTransform(None))
    np.testing.assert_array_equal(dataset[1]["mask"].numpy(), fake_pair(1, num_classes=2)[1])


def test_the_data_set_can_be_sent_to_another_process(tmp_path):
    dataset = pickle.loads(pickle.dumps(train_set(make_samples(tmp_path))))
    assert dataset[(0, 0)]["image"].shape == (3, 32, 32)


def test_mismatched_sizes_name_both_files(tmp_path):
    samples = make_samples(tmp_path, 2)
    save(samples[1].mask, np.zeros((64, 48), np.uint8))
    dataset = SegmentationDataset(samples, LabelRule(3), EvalTransform(None))
    with pytest.raises(UserError, match=r"pic001\.png is 48 x 64 .*masks/pic001\.png is 64 x 48"):
        dataset[1]


def test_a_rotated_image_beside_an_unrotated_mask_says_why(tmp_path):
    samples = make_samples(tmp_path, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(samples[0].image, fake_pair(0)[0], exif=exif)
    with pytest.raises(UserError, match=r"is 64 x 48 .*EXIF rotation"):
        SegmentationDataset(samples, LabelRule(3), EvalTransform(None))[0]


def test_errors_name_the_file(tmp_path):
    samples = make_samples(tmp_path, 3)
    save(samples[1].mask, np.full((48, 64), 7, np.uint8))
    with pytest.raises(UserError, match=r"pic001\.png: mask values outside the classes: 7"):
        train_set(samples)[(0, 1)]
    samples[2].image.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"pic002\.png: not an image"):
        train_set(samples)[(0, 2)]
    no_crop = SegmentationDataset(samples, LabelRule(3), TrainPipeline({}, 16))
    with pytest.raises(UserError, match=r"pic000\.png: after the steps"):
        no_crop[(0, 0)]


def test_a_user_error_in_a_worker_can_be_found(tmp_path):
    from dense_heads.errors import user_error_in

    samples = make_samples(tmp_path, 2)
    samples[1].image.write_bytes(b"no image")
    dataset = SegmentationDataset(samples, LabelRule(3), EvalTransform(None))
    with pytest.raises(Exception, match="not an image") as error:
        list(DataLoader(dataset, num_workers=1, collate_fn=collate_eval))
    assert user_error_in(error.value) is not None


# --- checks -----------------------------------------------------------------------------------------------------------


def problems(splits, num_classes=3, **options):
    return list(find_problems(splits, LabelRule(num_classes), **options))


def test_good_data_pass(tmp_path):
    splits = {"train": make_samples(tmp_path / "a"), "val": make_samples(tmp_path / "b", 2), "test": []}
    check_segmentation(splits, LabelRule(3))
    assert problems(splits) == []


def test_all_problems_stand_in_one_message(tmp_path):
    train = make_samples(tmp_path / "a", 9)
    for sample in train[:2]:
        sample.image.write_bytes(b"no image")
    for sample in train[2:4]:
        save(sample.mask, np.zeros((5, 5), np.uint8))
    for sample in train[4:7]:
        save(sample.mask, np.full((48, 64), 9, np.uint8))
    assert len(problems({"train": train})) == 7
    with pytest.raises(UserError) as error:
        check_segmentation({"train": train}, LabelRule(3))
    message = str(error.value)
    assert message.startswith("7 problems in the data:") and message.endswith("... and 2 more")
    assert message.count("\n- ") == 5 and "pic000.png: not an image" in message and "5 x 5" in message
    assert "outside the classes: 9" in message


def test_masks_that_cannot_be_read_are_a_problem_not_a_crash(tmp_path):
    train = make_samples(tmp_path, 3)
    train[0].mask.write_bytes(train[0].mask.read_bytes()[:80])  # the header is whole, the pixels are not
    train[1].mask.unlink()
    found = problems({"train": train})
    assert len(found) == 2
    assert any("pic000.png: the image cannot be read" in p for p in found)
    assert any("pic001.png: no such file" in p for p in found)


@pytest.mark.parametrize("value", [1, 255])
def test_a_split_of_one_class_is_refused(tmp_path, value):
    train, val = make_samples(tmp_path / "a"), make_samples(tmp_path / "b", 3)
    for sample in val:
        save(sample.mask, np.full((48, 64), value, np.uint8))
    expected = "all labelled pixels of its 3 masks are class 1" if value == 1 else "no pixel of its 3 masks is labelled"
    assert [expected in p and p.startswith("val") for p in problems({"train": train, "val": val})] == [True]


def test_a_rare_second_class_beyond_the_first_masks_is_looked_for(tmp_path):
    train = make_samples(tmp_path, 12)
    for sample in train[:11]:
        save(sample.mask, np.zeros((48, 64), np.uint8))
    save(train[11].mask, np.zeros((48, 64), np.uint8))
    save(train[7].mask, np.eye(48, 64, dtype=np.uint8))
    assert problems({"train": train}, max_masks=3) == []


def test_the_same_file_in_two_splits_also_through_a_link(tmp_path):
    train, val = make_samples(tmp_path / "a", 3), make_samples(tmp_path / "b", 2, first_seed=20)
    assert len(problems({"train": train, "val": [*val, train[1]]})) == 1
    link = tmp_path / "link.png"
    link.symlink_to(train[2].image)
    found = problems({"train": train, "val": [*val, Sample("new", link, val[0].mask)]})
    assert len(found) == 1 and "link.png is in val and in train" in found[0] and "pic002.png" in found[0]


def test_duplicate_ids_and_no_samples(tmp_path):
    train = make_samples(tmp_path, 3)
    copy = Sample("pic001", train[2].image, train[2].mask)
    assert any("more than once: pic001" in p for p in problems({"train": [*train, copy]}))
    with pytest.raises(UserError, match="1 problem in the data:\n- there are no samples"):
        check_segmentation({"train": [], "val": []}, LabelRule(3))


def test_headers_are_spread_evenly(tmp_path):
    train = make_samples(tmp_path, 9)
    for i in (0, 4, 8):
        train[i].image.write_bytes(b"no image")
    assert len(problems({"train": train}, max_headers=3)) == 3
    assert len(problems({"train": train}, max_headers=2)) == 2


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")
@pytest.mark.parametrize(
    ("folder", "rule", "masks"),
    [
        ("camvid", {"num_classes": 11, "ignore": [11]}, "annotations/{split}"),
        ("dsb2018", {"num_classes": 2}, "annotations/{split}"),
        ("chasedb1", {"num_classes": 2}, "annotations/{split}"),
        ("isbi2012_membrane", {"num_classes": 2}, "annotations/{split}"),
    ],
)
def test_real_data_pass_the_checks_and_load(folder, rule, masks):
    reader = PairedFolders(DATA / folder, masks=masks, splits={"train": "training", "val": "validation"})
    splits = {"train": reader.samples("train"), "val": reader.samples("val")}
    labels = LabelRule(**rule)
    check_segmentation(splits, labels, max_masks=8)
    assert labels.notices == []
    steps = {"scale": RandomScale(64), "crop": RandomCrop(64), "flip": A.HorizontalFlip(p=0.5)}
    item = SegmentationDataset(splits["train"], labels, TrainPipeline(steps, 64))[(0, 0)]
    assert item["image"].shape == (3, 64, 64) and item["mask"].max() <= 255
    val = SegmentationDataset(splits["val"], labels, EvalTransform(64))[0]
    assert tuple(val["mask"].shape) == val["original_size"]
