import numpy as np
import pytest
from PIL import Image

from dense_heads.data.classes import default_palette, read_classes
from dense_heads.data.labels import LabelRule
from dense_heads.errors import UserError
from tests.factories import DATA, save


def mask_file(path, values, **options):
    return save(path, np.asarray(values, options.pop("dtype", np.uint8)), **options)


def rule_for(paths, *args, **options):
    rule = LabelRule(*args, **options)
    rule.prepare(paths)
    return rule


def test_ids_are_the_default(tmp_path):
    path = mask_file(tmp_path / "a.png", [[0, 1, 2, 255]])
    ids = rule_for([path], 3).read(path)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, [[0, 1, 2, 255]])


def test_reduce_zero_as_ade20k():
    rule = LabelRule(150, reduce_zero=True)
    np.testing.assert_array_equal(rule(np.array([[0, 1, 150, 255]])), [[255, 0, 149, 255]])
    np.testing.assert_array_equal(rule.to_raw(np.array([[255, 0, 149]])), [[0, 1, 150]])
    with pytest.raises(UserError, match="151"):
        rule(np.array([[151]]))


def test_map_and_ignore():
    rule = LabelRule(2, map={7: 0, 8: 1, 9: 1}, ignore=[0, 255])
    np.testing.assert_array_equal(rule(np.array([[7, 8, 9, 0, 255]])), [[0, 1, 1, 255, 255]])
    np.testing.assert_array_equal(rule.to_raw(np.array([[0, 1, 255]])), [[7, 8, 0]])
    with pytest.raises(UserError, match=r"outside the classes: 3\..*0, 7, 8, 9, 255.*labels\.ignore.*labels\.map"):
        rule(np.array([[7, 3]]))


def test_camvid_void():
    np.testing.assert_array_equal(LabelRule(11, ignore=[11])(np.array([[10, 11]])), [[10, 255]])


def test_large_raw_ids_come_back_as_16_bit(tmp_path):
    path = mask_file(tmp_path / "a.png", [[1000, 2000]], dtype=np.uint16)
    rule = rule_for([path], 2, map={1000: 0, 2000: 1})
    ids = rule.read(path)
    np.testing.assert_array_equal(ids, [[0, 1]])
    raw = rule.to_raw(ids)
    assert raw.dtype == np.uint16
    np.testing.assert_array_equal(raw, [[1000, 2000]])


@pytest.mark.parametrize("foreground", [255, 200, 2])
def test_binary_masks_are_found_and_announced_once(tmp_path, foreground):
    paths = [mask_file(tmp_path / "a.png", [[0, 0]]), mask_file(tmp_path / "b.png", [[0, foreground]])]
    rule = rule_for(paths, 2)
    rule.prepare(paths)
    np.testing.assert_array_equal(rule.read(paths[1]), [[0, 1]])
    np.testing.assert_array_equal(rule.read(paths[0]), [[0, 0]])
    assert len(rule.notices) == 1 and str(foreground) in rule.notices[0]
    np.testing.assert_array_equal(rule.to_raw(np.array([[0, 1]])), [[0, foreground]])


def test_255_is_ignored_where_other_masks_hold_ids(tmp_path):
    paths = [mask_file(tmp_path / "a.png", [[0, 255]]), mask_file(tmp_path / "b.png", [[0, 1]])]
    rule = rule_for(paths, 2)
    np.testing.assert_array_equal(rule.read(paths[0]), [[0, 255]])
    assert not rule.notices


def test_a_binary_data_set_refuses_a_third_value_later(tmp_path):
    rule = rule_for([mask_file(tmp_path / "a.png", [[0, 255]])], 2)
    with pytest.raises(UserError, match=r"b\.png: mask values outside the classes: 1\."):
        rule.read(mask_file(tmp_path / "b.png", [[0, 1, 255]]))


def test_an_ignored_value_does_not_count_for_the_decision(tmp_path):
    path = mask_file(tmp_path / "a.png", [[0, 128, 255]])
    np.testing.assert_array_equal(rule_for([path], 2, ignore=[128]).read(path), [[0, 255, 1]])


@pytest.mark.parametrize("options", [{"reduce_zero": True}, {"map": {0: 0, 2: 1}}])
def test_what_the_user_said_is_not_guessed_over(tmp_path, options):
    path = mask_file(tmp_path / "a.png", [[0, 2]])
    rule = rule_for([path], 2, **options)
    np.testing.assert_array_equal(rule.read(path), [[255, 1]] if "reduce_zero" in options else [[0, 1]])
    assert not rule.notices


def test_jpeg_masks(tmp_path):
    values = np.zeros((32, 32), np.uint8)
    values[5:21, 9:26] = 255
    path = mask_file(tmp_path / "a.jpg", values, quality=75)
    assert len(np.unique(np.array(Image.open(path)))) > 2  # the loss is real
    np.testing.assert_array_equal(rule_for([path], 2).read(path), values // 255)
    with pytest.raises(UserError, match=r"a\.jpg: a JPEG mask with 3 classes.*PNG"):
        LabelRule(3).read(path)


def test_palette_masks_are_indices(tmp_path):
    image = Image.fromarray(np.array([[0, 5, 255]], np.uint8), mode="P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(LabelRule(21).read(tmp_path / "a.png"), [[0, 5, 255]])


COLOURS = [(0, 0, 0), (128, 64, 0), (10, 20, 30)]


def test_rgb_masks_are_read_through_the_colours(tmp_path):
    rgb = np.array([[COLOURS[2], COLOURS[0], COLOURS[1], (9, 9, 9)]], np.uint8)
    path = mask_file(tmp_path / "a.png", rgb)
    black = mask_file(tmp_path / "b.png", np.zeros((1, 2, 3)))
    rule = rule_for([black, path], 3, colours=COLOURS, ignore=[[9, 9, 9]])
    ids = rule.read(path)
    np.testing.assert_array_equal(ids, [[2, 0, 1, 255]])
    np.testing.assert_array_equal(rule.read(black), [[0, 0]])
    np.testing.assert_array_equal(rule.to_raw(ids), rgb)
    assert len(rule.notices) == 1
    rgba = mask_file(tmp_path / "c.png", np.dstack([rgb, np.full((1, 4), 255, np.uint8)]))
    np.testing.assert_array_equal(rule.read(rgba), ids)


def test_strange_colours_are_named(tmp_path):
    path = mask_file(tmp_path / "a.png", [[COLOURS[1], (1, 2, 3)]])
    with pytest.raises(UserError, match=r"a\.png: 1 colours.*\(1,2,3\).*labels\.ignore"):
        rule_for([path], 3, colours=COLOURS).read(path)
    with pytest.raises(UserError, match="gives none"):
        rule_for([path], 3)
    with pytest.raises(UserError, match="two classes"):
        rule_for([path], 3, colours=[(0, 0, 0), (1, 2, 3), (1, 2, 3)])


def test_grey_saved_as_rgb_is_read_as_ids(tmp_path):
    ids = np.array([[0, 1, 2]], np.uint8)
    path = mask_file(tmp_path / "a.png", np.stack([ids] * 3, -1))
    np.testing.assert_array_equal(rule_for([path], 3, colours=COLOURS).read(path), ids)
    binary = mask_file(tmp_path / "b.png", np.stack([ids // 2 * 255] * 3, -1))
    np.testing.assert_array_equal(rule_for([binary], 2).read(binary), [[0, 0, 1]])


def test_grey_colours_are_colours(tmp_path):
    greys = [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
    path = mask_file(tmp_path / "a.png", [greys])
    np.testing.assert_array_equal(rule_for([path], 3, colours=greys).read(path), [[0, 1, 2]])


def test_settings_rebuild_the_rule_with_its_decisions(tmp_path):
    path = mask_file(tmp_path / "a.png", [[0, 255]])
    settings = rule_for([path], 2).settings()
    again = LabelRule(**settings)
    again.prepare([mask_file(tmp_path / "b.png", [[0, 1]])])  # must not decide anew
    np.testing.assert_array_equal(again.read(path), [[0, 1]])
    assert again.settings() == settings


@pytest.mark.parametrize("values", [np.array([[0.5, 1]], np.float32), np.array([[np.nan, 1]], np.float32)])
def test_masks_of_fractions_are_refused(tmp_path, values):
    path = save(tmp_path / "a.tif", values)
    with pytest.raises(UserError, match=r"a\.tif: mask values.*float32"):
        LabelRule(3).read(path)


def test_masks_of_whole_floats_and_wide_integers(tmp_path):
    np.testing.assert_array_equal(LabelRule(3).read(save(tmp_path / "a.tif", np.array([[0, 2]], np.float32))), [[0, 2]])
    with pytest.raises(UserError, match=r"b\.tif: mask values -1\.\.70000"):
        LabelRule(3).read(save(tmp_path / "b.tif", np.array([[-1, 70000]], np.int32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"num_classes": 256}, "num_classes is 256"),
        ({"num_classes": 255, "reduce_zero": True}, "2 to 254"),
        ({"num_classes": 3, "map": {0: 3}}, "labels.map says 0: 3"),
        ({"num_classes": 3, "map": {-1: 0}}, "labels.map says -1: 0"),
        ({"num_classes": 3, "map": {0: 0}, "reduce_zero": True}, "both set"),
        ({"num_classes": 3, "map": {4: 0}, "ignore": [4]}, "names 4"),
        ({"num_classes": 3, "ignore": [70000]}, "names 70000"),
        ({"num_classes": 3, "ignore": [[1, 2]]}, "R,G,B"),
        ({"num_classes": 3, "colours": [(0, 0, 0)]}, "1 colours for 3"),
        ({"num_classes": 3, "encoding": "colours"}, "classes.txt gives none"),
        ({"num_classes": 3, "encoding": "color"}, "Did you mean 'colours'"),
    ],
)
def test_contradicting_settings(options, message):
    with pytest.raises(UserError, match=message):
        LabelRule(**options)


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")
def test_cityscapes_label_ids_become_the_official_train_ids():
    official = dict(zip([7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33], range(19), strict=True))
    folder = DATA / "cityscapes/gtFine/val/frankfurt"
    rule = LabelRule(19, map=official, ignore=[i for i in range(35) if i not in official])
    expected = np.array(Image.open(folder / "frankfurt_000000_000294_gtFine_labelTrainIds.png"))
    path = folder / "frankfurt_000000_000294_gtFine_labelIds.png"
    found, raw = rule.read(path), np.array(Image.open(path))
    # The two files were made smaller independently: they differ in some pixels on the borders of objects.
    assert (found == expected).mean() > 0.997
    for value in np.unique(raw):
        assert (found[raw == value] == np.bincount(expected[raw == value]).argmax()).all()
    assert len(np.unique(found)) > 5


def test_classes_with_and_without_colours(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffroad\t128,64,128\r\nköter\t0, 0,7\r\n\n".encode())
    classes = read_classes(path, 2)
    assert classes.names == ("road", "köter") and classes.own_colours
    np.testing.assert_array_equal(classes.colours, [[128, 64, 128], [0, 0, 7]])
    path.write_text("a, or b\nc")
    plain = read_classes(path, 2)
    assert plain.names == ("a, or b", "c") and not plain.own_colours and plain.colours.shape == (2, 3)
    assert read_classes(None, 3).names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize("num", [1, 2, 19, 150, 255])
def test_default_palette_has_no_colour_twice(num):
    palette = default_palette(num)
    assert palette.shape == (num, 3) and palette.dtype == np.uint8
    assert len({tuple(colour) for colour in palette.tolist()}) == num


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb", "2 classes, but num_classes is 3"),
        ("a\n\nc", "line 2: empty"),
        ("a\nb\na", "line 3: 'a' stands there twice"),
        ("a\t1,2,3\nb\nc", "1 of 3 lines"),
        ("a\t1,2\nb\nc", "line 1: '1,2' is no colour"),
        ("a\t1,2,256\nb\nc", "no colour"),
        ("a\tred\nb\nc", "no colour"),
    ],
)
def test_bad_classes(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / "classes.txt", 3)


def test_unreadable_classes(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "classes.txt", tmp_path / "no.txt"):
        with pytest.raises(UserError, match="no list of classes"):
            read_classes(path, 3)
