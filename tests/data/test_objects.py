"""Readers of objects: what they read, and the rule for each kind of bad annotation."""

import json
import math
import re

import numpy as np
import pytest

from dense_heads.data.datasets.coco import CocoJson
from dense_heads.data.datasets.detection_formats import find_format
from dense_heads.data.datasets.voc_xml import VocXml
from dense_heads.data.datasets.yolo import YoloTxt
from dense_heads.data.detection_checks import find_detection_problems
from dense_heads.errors import UserError
from dense_heads.ops import masks
from tests.factories import DATA, SHAPES, fake_objects, make_coco, make_voc_xml, make_yolo, save

real_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real samples are not here")


def changed(root, change, split="train"):
    """The data set with one file of annotations changed by `change(content)`."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return root


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path, train=4, val=2)


def test_coco_is_read_with_gaps_in_ids_and_images_without_objects(coco):
    reader = CocoJson(coco)
    assert reader.categories == list(SHAPES) and reader.category_ids == [2, 5, 9]
    assert reader.available() == ["train", "val"] and reader.samples("test") == []
    samples = reader.samples("train")
    assert [s.image_id for s in samples] == ["train0", "train1", "train2", "train3"] and samples[0].coco_id == 7
    _, boxes, labels, shapes = fake_objects(0)
    np.testing.assert_array_equal(samples[0].objects.boxes, boxes)
    np.testing.assert_array_equal(samples[0].objects.labels, labels)
    np.testing.assert_array_equal(samples[0].objects.area, shapes.sum(axis=(1, 2)))
    codes = samples[0].objects.codes()
    np.testing.assert_array_equal([masks.decode(code, (84, 112)) for code in codes], shapes)
    assert len(samples[1].objects) == 0 and reader.notices == []
    assert list(find_detection_problems({"train": samples, "val": reader.samples("val")}, with_masks=True)) == []


def add(content, **values):
    content["annotations"].append(
        {"id": 77, "image_id": 8, "category_id": 2, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0, **values}
    )


def objects_of_8(root):
    reader = CocoJson(root)
    return reader.samples("train")[1].objects, reader.notices


def test_a_box_of_zero_area_is_left_out_and_counted(coco):
    def change(content):
        add(content, bbox=[5, 5, 0, 9])
        add(content, bbox=[5, 5, 9, -3], id=78)
        add(content, id=79)

    objects, notices = objects_of_8(changed(coco, change))
    assert objects.boxes.tolist() == [[5, 5, 25, 25]]
    assert len(notices) == 1 and notices[0].endswith("2 boxes of zero area left out: annotation 77, annotation 78")


def test_boxes_outside_the_image_are_cut_or_left_out_and_counted(coco):
    def change(content):
        add(content, bbox=[-10, 70, 30, 40])
        add(content, bbox=[200, 5, 9, 9], id=78)
        add(content, bbox=[100, 5, 12.7, 9], id=79)  # rounding: within a pixel

    objects, notices = objects_of_8(changed(coco, change))
    assert objects.boxes.tolist() == [[0, 70, 20, 84], [100, 5, 112.7, 14]]
    assert sorted(re.sub(r".*: (?=\d)", "", notice, count=1) for notice in notices) == [
        "1 boxes outside their image left out: annotation 78",
        "1 boxes that reach outside their image cut: annotation 77",
    ]


def test_an_unknown_category_is_refused_with_path_and_id(coco):
    with pytest.raises(
        UserError, match=r"instances_train\.json: annotation 77 has category 3; expected one of 2, 5, 9"
    ):
        CocoJson(changed(coco, lambda content: add(content, category_id=3)))


def test_an_annotation_of_a_missing_image_is_refused_with_path_and_id(coco):
    with pytest.raises(UserError, match=r"instances_train\.json: annotation 77 is of image 999, which is not among"):
        CocoJson(changed(coco, lambda content: add(content, image_id=999)))


def test_an_image_that_is_not_on_disk_is_refused(coco):
    (coco / "train" / "train2.png").unlink()
    with pytest.raises(UserError, match=r"1 of the files that belong to it do not exist: .*train2\.png"):
        CocoJson(coco)


def test_polygons_of_fewer_than_three_points_are_left_out_and_counted(coco):
    def change(content):
        add(content, segmentation=[[1, 1, 9, 9], [10, 10, 30, 10, 30, 30, 10, 30]])
        add(content, segmentation=[[1, 1, 9, 9]], id=78)

    objects, notices = objects_of_8(changed(coco, change))
    assert len(objects) == 2 and objects.outlines[1] is None  # a box still
    assert len(notices) == 1 and "2 polygons of fewer than three points" in notices[0]
    whole = masks.decode(objects.codes()[0], (84, 112))
    assert whole.sum() == 400 and whole[10:30, 10:30].all()


def test_crowds_are_kept_as_such_and_their_runs_read(coco):
    runs = [84 * 10, 84 * 5, 84 * (112 - 15)]
    segmentation = {"size": [84, 112], "counts": runs}
    objects, _ = objects_of_8(changed(coco, lambda c: add(c, iscrowd=1, segmentation=segmentation, area=420)))
    assert objects.iscrowd.tolist() == [True]
    np.testing.assert_array_equal(masks.decode(objects.codes()[0], (84, 112)).any(0).nonzero()[0], np.arange(10, 15))


def test_without_a_box_or_an_area_they_follow_from_the_outline(coco):
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]

    def change(content):
        add(content, segmentation=square, bbox=None, area=None)
        add(content, bbox=[3, 3, 4, 5], area=0, id=78)

    objects, _ = objects_of_8(changed(coco, change))
    assert objects.boxes.tolist() == [[10, 10, 30, 30], [3, 3, 7, 8]] and objects.area.tolist() == [400, 20]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bbox": [1, 2, 3]}, r"annotation 77: its bbox is \[1, 2, 3\]"),
        ({"bbox": "wide"}, r"annotation 77: its bbox is 'wide'"),
        ({"bbox": [1, math.nan, 3, 4]}, r"annotation 77: its box is \[1(\.0)?, nan"),
        ({"area": "big"}, r"annotation 77: its area is 'big'"),
        ({"segmentation": [[1, 2, 1e12, 4, 5, 6]]}, r"annotation 77: its polygon is \[1, 2, 1000000000000\.0"),
        ({"segmentation": {"size": [5, 5], "counts": "x"}}, r"run lengths are of size \[5, 5\]; expected \[84, 112\]"),
        ({"segmentation": {"size": [84, 112], "counts": "04"}}, r"run lengths are '04'; expected a code of 9408 pix"),
        ({"segmentation": {"size": [84, 112], "counts": [-1, 9409]}}, r"run lengths are \[-1, 9409\]"),
        ({"segmentation": 3}, r"segmentation is 3; expected a list of polygons"),
        ({"category_id": "2"}, r"annotations, id 77: `category_id` is '2'; expected int"),
    ],
)
def test_numbers_that_are_none_are_refused_with_path_and_id(coco, values, words):
    with pytest.raises(UserError, match=r"instances_train\.json: .*" + words):
        CocoJson(changed(coco, lambda content: add(content, **values)))


def test_files_that_are_no_coco_are_refused(coco):
    path = coco / "annotations" / "instances_train.json"
    for text, words in (
        ('{"images": [', "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1]", "holds a list"),
        ('{"images": 3, "categories": []}', "`categories` is|`images` is no list|categories"),
        ('{"images": [], "annotations": [], "categories": []}', "expected at least one"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            CocoJson(coco)


def test_names_do_not_lead_out_of_the_folder(coco):
    def change(content):
        content["images"][0]["file_name"] = "../../etc/passwd"

    with pytest.raises(UserError, match="expected a path below"):
        CocoJson(changed(coco, change))


def test_an_image_of_another_size_than_annotated_is_found_before_training(coco):
    save(coco / "train" / "train0.png", np.zeros((50, 60, 3), np.uint8))
    reader = CocoJson(coco)
    problems = list(find_detection_problems({split: reader.samples(split) for split in ("train", "val")}))
    assert len(problems) == 1
    assert re.search(r"train0\.png is 50 x 60 \(H x W\) and its annotations are of 84 x 112", problems[0])


def test_data_without_any_object_or_outline_are_refused(coco):
    reader = CocoJson(changed(coco, lambda content: content["annotations"].clear()))
    splits = {split: reader.samples(split) for split in ("train", "val")}
    assert "train: not one object in its 4 images" in next(iter(find_detection_problems(splits)))

    def boxes_alone(content):
        for record in content["annotations"]:
            del record["segmentation"]

    splits = {"val": CocoJson(changed(coco, boxes_alone, "val")).samples("val")}
    assert list(find_detection_problems(splits)) == []
    assert "val: not one object has an outline" in next(iter(find_detection_problems(splits, with_masks=True)))


def test_two_splits_of_different_categories_are_refused(coco):
    def change(content):
        content["categories"][0]["name"] = "blob"

    with pytest.raises(UserError, match="another split's are 2 blob"):
        CocoJson(changed(coco, change))


def test_a_split_is_drawn_once_and_kept(coco):
    (coco / "annotations" / "instances_val.json").unlink()
    reader = CocoJson(coco)
    assert reader.available() == ["train", "val"] and "1 of 4 images are held out" in reader.notices[0]
    drawn = reader.made_split
    assert {s.image_id for s in reader.samples("val")} == set(drawn["val"])
    assert len(reader.samples("train")) == 3
    kept = {"train": drawn["val"], "val": drawn["train"]}
    assert {s.image_id for s in CocoJson(coco, split=kept).samples("val")} == set(drawn["train"])


def test_roboflows_export_is_read_as_it_is(tmp_path):
    make_coco(tmp_path, annotations="{}/_annotations.coco.json")
    (tmp_path / "val").rename(tmp_path / "valid")
    for split in ("train", "valid"):
        path = tmp_path / split / "_annotations.coco.json"
        content = json.loads(path.read_text())
        content["categories"].insert(0, {"id": 0, "name": "shape", "supercategory": "none"})  # Roboflow's habit
        path.write_text(json.dumps(content))
    reader = find_format(tmp_path)
    assert reader.categories == list(SHAPES) and reader.available() == ["train", "val"]
    assert len(reader.samples("val")) == 3


def test_voc_boxes_are_counted_from_1_and_inclusive(tmp_path):
    root = make_voc_xml(tmp_path)
    reader = VocXml(root, 2007, {"train": "trainval", "val": "test"}, {"train": "train", "val": "val"})
    assert reader.categories == ["cat", "dog", "person"] and reader.notices == []
    sample = reader.samples("val")[1]
    _, boxes, labels, _ = fake_objects(101)
    np.testing.assert_array_equal(sample.objects.boxes, boxes)
    np.testing.assert_array_equal(sample.objects.labels, labels)
    assert sample.objects.difficult.tolist() == [True] + [False] * (len(boxes) - 1)


def test_voc_falls_back_to_other_lists_and_says_so(tmp_path):
    root = make_voc_xml(tmp_path, lists=(("train", 3), ("val", 2)))
    reader = VocXml(root, 2007, {"train": "trainval", "val": "test"}, {"train": "train", "val": "val"})
    assert [len(reader.samples(split)) for split in ("train", "val")] == [3, 2]
    assert "not comparable" in reader.notices[0]
    plain = find_format(root / "VOC2007")
    assert [len(plain.samples(split)) for split in ("train", "val")] == [3, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation>", "cannot be read as XML"),
        ("<annotation><size><width>9</width></size></annotation>", "<size/height> is None"),
        (
            "<annotation><size><width>112</width><height>84</height></size><object><bndbox><xmin>a</xmin></bndbox>"
            "</object></annotation>",
            "<bndbox/xmin> is 'a'",
        ),
        ('<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>', "cannot be read as XML"),
    ],
)
def test_broken_xml_is_refused_with_its_path(tmp_path, text, words):
    root = make_voc_xml(tmp_path)
    (root / "VOC2007" / "Annotations" / "000001.xml").write_text(text)
    with pytest.raises(UserError, match=r"000001\.xml.*" + words):
        VocXml(root, 2007, {"train": "trainval", "val": "test"})
    (root / "VOC2007" / "Annotations" / "000001.xml").unlink()
    with pytest.raises(UserError, match=r"000001\.xml: no annotations of this image"):
        VocXml(root, 2007, {"train": "trainval", "val": "test"})


@pytest.mark.parametrize("polygons", [False, True])
def test_yolo_is_read_as_it_is(tmp_path, polygons):
    reader = find_format(make_yolo(tmp_path, polygons=polygons))
    assert isinstance(reader, YoloTxt) and reader.categories == list(SHAPES)
    sample = reader.samples("val")[1]
    _, boxes, labels, _ = fake_objects(101)
    np.testing.assert_allclose(sample.objects.boxes, boxes, atol=1e-3)
    np.testing.assert_array_equal(sample.objects.labels, labels)
    assert all((outline is not None) == polygons for outline in sample.objects.outlines)
    (tmp_path / "labels" / "val" / "100.txt").unlink()
    assert len(find_format(tmp_path).samples("val")[0].objects) == 0  # an image without objects stays in


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("7 0.5 0.5 0.1 0.1", "class 7 has no name"),
        ("0 0.5 0.5 0.1", "expected `class x y width height`"),
        ("0 0.5 0.5 0.1 0.1 0.2", "expected `class x y width height`"),
        ("a b", "expected `class x y width height`"),
        ("0 0.5 nan 0.1 0.1", "expected four finite numbers"),
    ],
)
def test_bad_lines_of_yolo_are_refused_with_path_and_line(tmp_path, line, words):
    make_yolo(tmp_path)
    path = tmp_path / "labels" / "train" / "002.txt"
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    with pytest.raises(UserError, match=words) as error:
        YoloTxt(tmp_path)
    assert "002.txt, line" in str(error.value)


def test_yolo_boxes_outside_are_repaired_too(tmp_path):
    make_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "002.txt").write_text("0 0.5 0.5 0 0.2\n1 1.0 0.5 0.5 0.5\n")
    reader = YoloTxt(tmp_path)
    assert reader.samples("train")[2].objects.boxes.tolist() == [[84, 21, 112, 63]]
    assert len(reader.notices) == 2


def test_a_folder_of_no_known_format_lists_them_all(tmp_path):
    with pytest.raises(UserError, match="Roboflow") as error:
        find_format(tmp_path)
    assert all(word in str(error.value) for word in ("COCO JSON", "YOLO", "Pascal VOC", "data.yaml"))


@real_data
def test_real_samples():
    blood = CocoJson(DATA / "bccd")
    assert [len(blood.samples(split)) for split in ("train", "val")] == [205, 87] and blood.notices == []
    assert sum(len(sample.objects) for sample in blood.samples("train")) == 2804
    photos = find_format(DATA / "coco")
    assert len(photos.categories) == 80 and photos.category_ids[-1] == 90 and photos.notices == []
    crowds = [sum(int(s.objects.iscrowd.sum()) for s in photos.samples(split)) for split in ("train", "val")]
    assert crowds == [3, 2]
    voc = find_format(DATA / "VOCdevkit" / "VOC2007")
    assert voc.samples("train")[0].objects.size == (500, 335)


@real_data
def test_polygons_are_filled_as_pycocotools_does():
    from pycocotools.coco import COCO

    theirs = COCO(str(DATA / "coco/annotations/instances_val2017.json"))
    for sample in find_format(DATA / "coco").samples("val"):
        records = theirs.loadAnns(theirs.getAnnIds([sample.coco_id]))
        assert len(records) == len(sample.objects)
        for record, code in zip(records, sample.objects.codes(), strict=True):
            np.testing.assert_array_equal(masks.decode(code, sample.objects.size), theirs.annToMask(record))
