import shutil

import numpy as np
import pytest

from dense_heads.data.datasets.cityscapes import Cityscapes
from dense_heads.data.datasets.folders import PairedFolders
from dense_heads.data.datasets.voc import VOCSegmentation
from dense_heads.data.labels import LabelRule
from dense_heads.errors import UserError
from tests.factories import DATA, make_ade20k, make_cityscapes, make_pairs, make_voc

ADE = {"images": "images/{split}", "masks": "annotations/{split}"}
ADE_SPLITS = {"train": "training", "val": "validation"}
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")


def ids(samples):
    return [sample.image_id for sample in samples]


def own(root, num=10, **options):
    make_pairs(root / "images", root / "masks", num, **options)
    return root


def test_ade20k_layout(tmp_path):
    reader = PairedFolders(make_ade20k(tmp_path), **ADE, splits=ADE_SPLITS)
    train, val = reader.samples("train"), reader.samples("val")
    assert ids(train) == [f"pic{i:03d}" for i in range(6)] and ids(val) == ["pic100", "pic101", "pic102"]
    assert train[0].image == tmp_path / "images/training/pic000.jpg"
    assert train[0].mask == tmp_path / "annotations/training/pic000.png"
    assert reader.samples("test") == [] and reader.made_split is None and reader.notices == []


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@pytest.mark.parametrize("swapped", [False, True])
def test_own_data_with_split_folders(tmp_path, name, swapped):
    for split, num in (("train", 3), (name, 2)):
        folders = [tmp_path / split / kind if swapped else tmp_path / kind / split for kind in ("images", "masks")]
        make_pairs(*folders, num)
    reader = PairedFolders(tmp_path)
    assert len(reader.samples("train")) == 3 and len(reader.samples("val")) == 2 and reader.samples("test") == []


def test_a_test_split_without_masks_can_be_predicted(tmp_path):
    make_pairs(tmp_path / "images/train", tmp_path / "masks/train", 4)
    make_pairs(tmp_path / "images/test", tmp_path / "gone", 2)
    reader = PairedFolders(tmp_path)
    assert [s.mask for s in reader.samples("test")] == [None, None]
    assert any("only be predicted" in notice for notice in reader.notices)


def test_lists(tmp_path):
    own(tmp_path, 5)
    (tmp_path / "train.txt").write_text("pic003\n./images/pic001.png\n\n")
    (tmp_path / "val.txt").write_text("pic000.png\n")
    reader = PairedFolders(tmp_path)
    assert ids(reader.samples("train")) == ["pic001", "pic003"]
    assert ids(reader.samples("val")) == ["pic000"] and reader.made_split is None
    (tmp_path / "val.txt").write_text("pic000\nnowhere\n")
    with pytest.raises(UserError, match=r"val\.txt names 1 samples.*nowhere"):
        reader.samples("val")
    (tmp_path / "val.txt").write_text("pic000\npic000\n")
    with pytest.raises(UserError, match="more than once"):
        reader.samples("val")
    (tmp_path / "val.txt").write_text("\n")
    with pytest.raises(UserError, match="empty"):
        reader.samples("val")


def test_a_train_list_alone_leaves_validation_to_be_drawn_from_it(tmp_path):
    own(tmp_path, 10)
    (tmp_path / "train.txt").write_text("\n".join(f"pic{i:03d}" for i in range(5)))
    reader = PairedFolders(tmp_path)
    assert sorted(ids(reader.samples("train")) + ids(reader.samples("val"))) == [f"pic{i:03d}" for i in range(5)]


def test_drawn_split_is_seeded_announced_and_can_be_kept(tmp_path):
    own(tmp_path, 20)
    reader = PairedFolders(tmp_path)
    train, val = ids(reader.samples("train")), ids(reader.samples("val"))
    assert len(val) == 4 and sorted(train + val) == [f"pic{i:03d}" for i in range(20)]
    assert reader.made_split == {"train": train, "val": val} and reader.available() == ["train", "val"]
    assert "4 of 20 images are held out" in reader.notices[0]
    assert ids(PairedFolders(tmp_path).samples("val")) == val
    assert any(ids(PairedFolders(tmp_path, seed=seed).samples("val")) != val for seed in (1, 2))

    kept = reader.made_split
    own(tmp_path, 10, first_seed=20)  # more images; a resumed run must not change sides
    resumed = PairedFolders(tmp_path, split=kept)
    assert ids(resumed.samples("train")) == train and ids(resumed.samples("val")) == val
    # And a fresh draw moves few: an image stays on its side unless the border passes over it.
    fresh = set(ids(PairedFolders(tmp_path).samples("val")))
    assert len(set(val) - fresh) <= 2
    (tmp_path / "images" / f"{val[0]}.png").unlink()
    (tmp_path / "masks" / f"{val[0]}.png").unlink()
    with pytest.raises(UserError, match=f"the kept split names 1 samples.*{val[0]}"):
        resumed.samples("val")


def test_two_images_are_enough_one_is_not(tmp_path):
    reader = PairedFolders(own(tmp_path / "two", 2))
    assert len(reader.samples("train")) == len(reader.samples("val")) == 1
    with pytest.raises(UserError, match="expected at least 2"):
        PairedFolders(own(tmp_path / "one", 1))


@pytest.mark.parametrize("ending", ["_mask", "-seg", ".label", "_L"])
def test_mask_suffix_is_found_and_announced(tmp_path, ending):
    reader = PairedFolders(own(tmp_path, 12, mask_end=f"{ending}.png"))
    assert len(reader.samples("train")) + len(reader.samples("val")) == 12
    assert all(s.mask.name == f"{s.image_id}{ending}.png" for s in reader.samples("train"))
    assert sum(repr(ending) in notice for notice in reader.notices) == 1


def test_numbered_names_do_not_make_a_suffix_of_digits(tmp_path):
    own(tmp_path, 12, mask_end="_m.png")
    for folder, end in (("images", ""), ("masks", "_m")):
        for i in range(12):  # 1, 2, ..., 12: every "1x_m" also begins with "1"
            (tmp_path / folder / f"pic{i:03d}{end}.png").rename(tmp_path / folder / f"{i + 1}{end}.png")
    reader = PairedFolders(tmp_path)
    assert all(s.mask.name == f"{s.image_id}_m.png" for s in reader.samples("train") + reader.samples("val"))


def test_unpaired_files_are_named_and_can_be_skipped(tmp_path):
    own(tmp_path, 6)
    (tmp_path / "masks/pic002.png").unlink()
    (tmp_path / "images/pic004.png").unlink()
    with pytest.raises(UserError, match=r"2 files.*images/pic002\.png.*masks/pic004\.png.*unpaired=skip"):
        PairedFolders(tmp_path)
    reader = PairedFolders(tmp_path, unpaired="skip")
    assert len(reader.samples("train")) + len(reader.samples("val")) == 4
    assert any("pic002" in notice for notice in reader.notices)
    with pytest.raises(UserError, match="unpaired"):
        PairedFolders(tmp_path, unpaired="ignore")


def test_nothing_pairs(tmp_path):
    own(tmp_path, 3)
    for path in list((tmp_path / "masks").iterdir()):
        path.rename(path.with_name("x" + path.name))
    with pytest.raises(UserError, match="mask_suffix"):
        PairedFolders(tmp_path)
    with pytest.raises(UserError, match=r"No image in .*pic000.*xpic000"):
        PairedFolders(tmp_path, unpaired="skip")


def test_two_files_of_one_name(tmp_path):
    own(tmp_path, 3)
    shutil.copy(tmp_path / "images/pic001.png", tmp_path / "images/pic001.jpg")
    with pytest.raises(UserError, match=r"pic001\.jpg and .*pic001\.png have one name"):
        PairedFolders(tmp_path)


def test_nested_folders_pair_by_their_path(tmp_path):
    for patient in ("a", "b"):
        make_pairs(tmp_path / "images" / patient, tmp_path / "masks" / patient, 2)
    reader = PairedFolders(tmp_path)
    assert sorted(ids(reader.samples("train") + reader.samples("val"))) == [
        "a/pic000",
        "a/pic001",
        "b/pic000",
        "b/pic001",
    ]


def test_missing_data_say_where_what_and_how(tmp_path):
    with pytest.raises(UserError) as error:
        PairedFolders(tmp_path / "nowhere", **ADE, splits=ADE_SPLITS, hint="fetch ade.zip")
    message = str(error.value)
    assert str(tmp_path / "nowhere") in message and "How to get it: fetch ade.zip" in message
    assert "annotations/training/NAME.png" in message and "images/validation/NAME.jpg" in message
    with pytest.raises(UserError, match="images/training does not exist"):
        PairedFolders(tmp_path, **ADE, splits=ADE_SPLITS)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="no images in this folder"):
        PairedFolders(tmp_path)
    make_pairs(tmp_path / "images", tmp_path / "elsewhere", 2)
    with pytest.raises(UserError, match="masks does not exist"):
        PairedFolders(tmp_path)


def test_wrong_settings(tmp_path):
    for options, message in (
        ({"splits": {"training": "train"}}, "Unknown split 'training'. Did you mean 'train'"),
        ({"val_fraction": 1.5}, "val_fraction is 1.5"),
        ({"images": str(tmp_path / "images")}, "absolute path"),
    ):
        with pytest.raises(UserError, match=message):
            PairedFolders(own(tmp_path), **options)


def test_an_official_split_that_is_missing_is_not_replaced_by_a_drawn_one(tmp_path):
    make_ade20k(tmp_path)
    shutil.rmtree(tmp_path / "images/validation")
    reader = PairedFolders(tmp_path, **ADE, splits=ADE_SPLITS)
    assert reader.available() == ["train"] and len(reader.samples("train")) == 6
    with pytest.raises(UserError, match="images/validation does not exist"):
        reader.samples("val")


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_train_plus_aug(tmp_path, below):
    make_voc(tmp_path)
    reader = VOCSegmentation(tmp_path / below)
    train = reader.samples("train")
    assert ids(train) == [f"2007_{i:06d}" for i in (0, 1, 2, 3, 6, 7, 8)]
    assert [s.mask.parent.name for s in train] == ["SegmentationClass"] * 4 + ["SegmentationClassAug"] * 3
    assert ids(reader.samples("val")) == ["2007_000004", "2007_000005"]
    assert reader.samples("test") == [] and reader.notices == [] and reader.available() == ["train", "val"]
    assert set(np.unique(LabelRule(21).read(train[0].mask))) <= {*range(21), 255}


def test_voc_with_the_trainaug_list(tmp_path):
    lists = make_voc(tmp_path) / "VOC2012/ImageSets/Segmentation"
    (lists / "trainaug.txt").write_text((lists / "train.txt").read_text() + (lists / "aug.txt").read_text())
    expected = ids(VOCSegmentation(tmp_path).samples("train"))
    (lists / "aug.txt").unlink()
    assert ids(VOCSegmentation(tmp_path).samples("train")) == expected


def test_voc_without_aug_is_not_comparable(tmp_path):
    reader = VOCSegmentation(make_voc(tmp_path, aug=0))
    assert len(reader.samples("train")) == 4
    assert len(reader.notices) == 1 and reader.notices[0].startswith("not comparable")


def test_voc_bad_input(tmp_path):
    with pytest.raises(UserError, match=r"(?s)VOC2012.*JPEGImages.*How to get it: from Oxford"):
        VOCSegmentation(tmp_path, hint="from Oxford")
    folder = make_voc(tmp_path) / "VOC2012"
    (folder / "SegmentationClass/2007_000001.png").unlink()
    with pytest.raises(UserError, match=r"train\.txt: 1 of the files.*SegmentationClass/2007_000001\.png"):
        VOCSegmentation(tmp_path).samples("train")
    (folder / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(UserError, match=r"val\.txt does not exist"):
        VOCSegmentation(tmp_path).samples("val")


def test_cityscapes(tmp_path):
    reader = Cityscapes(make_cityscapes(tmp_path))
    train = reader.samples("train")
    assert ids(train) == [
        "aachen/aachen_000000_000019", "aachen/aachen_000002_000019", "bochum/bochum_000001_000019"
    ]  # fmt: skip
    assert train[0].mask.name == "aachen_000000_000019_gtFine_labelIds.png"
    assert len(reader.samples("val")) == 2 and reader.samples("test") == []
    assert reader.available() == ["train", "val"]
    train[1].mask.unlink()
    with pytest.raises(UserError, match="aachen_000002_000019_gtFine_labelIds"):
        reader.samples("train")
    shutil.rmtree(tmp_path / "leftImg8bit/val/aachen")
    shutil.rmtree(tmp_path / "leftImg8bit/val/bochum")
    with pytest.raises(UserError, match="no images"):
        reader.samples("val")
    shutil.rmtree(tmp_path / "gtFine")
    with pytest.raises(UserError, match=r"(?s)gtFine does not exist.*leftImg8bit/\{train,val\}"):
        Cityscapes(tmp_path)


@real_data
@pytest.mark.parametrize(
    ("reader", "folder", "options", "sizes"),
    [
        (PairedFolders, "camvid", {**ADE, "splits": ADE_SPLITS}, (367, 101)),
        (PairedFolders, "dsb2018", {**ADE, "splits": ADE_SPLITS}, (169, 40)),
        (PairedFolders, "ADEChallengeData2016", {**ADE, "splits": ADE_SPLITS}, (None, 3)),
        (VOCSegmentation, "VOCdevkit", {}, (2, 1)),
        (Cityscapes, "cityscapes", {}, (2, 1)),
    ],
)
def test_the_official_layouts_of_real_data(reader, folder, options, sizes):
    reader = reader(DATA / folder, **options)
    assert reader.available() == [split for split, num in zip(("train", "val"), sizes, strict=True) if num]
    for split, num in zip(("train", "val"), sizes, strict=True):
        if num is None:
            with pytest.raises(UserError, match="images/training does not exist"):
                reader.samples(split)
        else:
            assert len(reader.samples(split)) == num
