import json
import multiprocessing

import numpy as np
import pytest
from PIL import Image

from dense_heads.data.classes import read_classes
from dense_heads.data.datasets.scenes import DEPTH_SCALE, SceneDepth, SceneMasks, draw_scenes, scene_objects, scene_seed
from dense_heads.data.labels import LabelRule
from dense_heads.data.scene_rays import rotation_about_z
from dense_heads.data.scene_world import BOX, CEILING, DOOR, FLOOR, RUG, SPHERE, WALL, WINDOW
from dense_heads.data.scenes import CLASSES, THINGS, camera_intrinsics, render_scene
from dense_heads.errors import UserError
from dense_heads.paths import TASKS_DIR

SMALL = (60, 80)


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(seed, SMALL) for seed in range(50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_scenes(tmp_path_factory.mktemp("scenes"), 3, 2, SMALL)


def world_points(scene):
    """Back-projection written out by the book: K^-1 (x, y, 1) * depth, then the camera's pose."""
    height, width = scene.depth_m.shape
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x, y, np.ones_like(x)]).reshape(3, -1)
    camera = np.linalg.inv(scene.intrinsics) @ pixels * scene.depth_m.reshape(-1).astype(np.float64)
    pose = scene.world.camera_to_world
    return (pose[:3, :3] @ camera + pose[:3, 3:]).reshape(3, height, width)


def test_shapes_types_and_ranges(scenes):
    for scene in scenes:
        n = len(scene.boxes)
        assert scene.image.shape == (*SMALL, 3) and scene.image.dtype == np.uint8
        assert scene.depth_m.shape == SMALL and scene.depth_m.dtype == np.float32
        assert scene.labels.shape == SMALL and scene.labels.dtype == np.int64
        assert scene.instances.shape == SMALL and scene.instances.dtype == np.int32
        assert scene.masks.shape == (n, *SMALL) and scene.masks.dtype == bool
        assert scene.boxes.shape == (n, 4) and scene.box_labels.shape == (n,) and len(scene.solids) == n
        assert np.isfinite(scene.depth_m).all() and scene.depth_m.min() > 0.1 and scene.depth_m.max() < 10
        assert scene.labels.min() >= 0 and scene.labels.max() < len(CLASSES)
        assert scene.image.std() > 10  # neither black nor burnt out
        pose = scene.world.camera_to_world
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)


def test_depth_satisfies_the_equations_of_the_planes(scenes):
    for scene in scenes:
        point, room = world_points(scene), scene.world.room_m
        for label, axis, value in ((FLOOR, 2, 0.0), (RUG, 2, 0.0), (CEILING, 2, room[2])):
            np.testing.assert_allclose(point[axis][scene.labels == label], value, atol=2e-5)
        on_walls = np.isin(scene.labels, (WALL, DOOR, WINDOW))
        off = np.abs(np.stack([point[0], point[0] - room[0], point[1], point[1] - room[1]]))[:, on_walls].min(axis=0)
        assert off.max() < 2e-5
        assert (point > -2e-5).all() and (point < room[:, None, None] + 2e-5).all()


def test_depth_satisfies_the_equations_of_the_solids(scenes):
    for scene in scenes:
        point = world_points(scene)
        for mask, solid in zip(scene.masks, scene.solids, strict=True):
            offset = point[:, mask] - solid.centre[:, None]
            if solid.label == SPHERE:
                np.testing.assert_allclose(np.linalg.norm(offset, axis=0), solid.half[0], atol=2e-5)
            else:
                own = np.abs(rotation_about_z(solid.yaw).T @ offset) - solid.half[:, None]
                np.testing.assert_allclose(own.max(axis=0), 0, atol=2e-5)  # on a face and beyond none


def test_what_is_nearer_hides_what_is_farther(scenes):
    """No ray passes through a solid on its way: points on it, at 60 parts of its length, lie outside all of them."""
    for scene in scenes[:12]:
        end, eye = world_points(scene), scene.world.camera_to_world[:3, 3, None, None]
        for part in np.linspace(0, 0.999, 60):
            point = eye + part * (end - eye)
            for solid in scene.world.solids:
                offset = point.reshape(3, -1) - solid.centre[:, None]
                if solid.label == SPHERE:
                    assert np.linalg.norm(offset, axis=0).min() > solid.half[0] - 1e-3
                else:
                    own = np.abs(rotation_about_z(solid.yaw).T @ offset) - solid.half[:, None]
                    assert own.max(axis=0).min() > -1e-2


def test_solids_stand_apart_inside_the_room(scenes):
    for scene in scenes:
        for solid in scene.world.solids:
            reach = solid.half[0] if solid.label == SPHERE else np.hypot(*solid.half[:2])
            assert (solid.centre[:2] > reach - 1e-9).all() and (solid.centre[:2] < scene.world.room_m[:2] - reach).all()
            bottom = solid.centre[2] - solid.half[2]
            tops = [s.centre[2] + s.half[2] for s in scene.world.solids if np.allclose(s.centre[:2], solid.centre[:2])]
            assert min(abs(bottom - top) for top in [0.0, *tops]) < 1e-9  # on the floor or on another


def test_boxes_are_the_extents_of_the_masks(scenes):
    for scene in scenes:
        assert set(np.unique(scene.instances)) <= set(range(len(scene.boxes) + 1))
        np.testing.assert_array_equal(scene.instances > 0, np.isin(scene.labels, THINGS))
        for i, (mask, box, label) in enumerate(zip(scene.masks, scene.boxes, scene.box_labels, strict=True)):
            np.testing.assert_array_equal(mask, scene.instances == i + 1)
            rows, columns = np.nonzero(mask)
            np.testing.assert_array_equal(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (scene.labels[mask] == label).all() and scene.solids[i].label == label


def test_all_classes_occur(scenes):
    images = [sum((scene.labels == k).any() for scene in scenes) for k in range(len(CLASSES))]
    assert min(images) >= 8, dict(zip(CLASSES, images, strict=True))
    assert {int(label) for scene in scenes for label in scene.box_labels} == {BOX, SPHERE}


def test_colour_alone_does_not_tell_the_class(scenes):
    """The best answer to each of 512 colours, learnt on 40 scenes, does little better than 'wall' on the others."""
    colours = np.stack([scene.image for scene in scenes]).astype(int) // 32 @ [64, 8, 1]
    labels = np.stack([scene.labels for scene in scenes])
    counts = np.zeros((512, len(CLASSES)))
    np.add.at(counts, (colours[:40], labels[:40]), 1)
    for votes in (counts, counts / counts.sum(axis=0)):  # by frequency, and each class alike
        guess, truth = votes.argmax(axis=1)[colours[40:]], labels[40:]
        ious = [((guess == k) & (truth == k)).sum() / ((guess == k) | (truth == k)).sum() for k in range(len(CLASSES))]
        assert np.mean(ious) < 0.2
    spread = [np.std([s.image[s.labels == k].mean() for s in scenes if (s.labels == k).any()]) for k in range(8)]
    assert min(spread) > 8  # a class is lighter in one scene than in another


def test_the_same_seed_gives_the_same_bits():
    for seed in (0, 5, 2**62 + 1):
        first, again = render_scene(seed, SMALL), render_scene(seed, SMALL)
        for key in ("image", "depth_m", "labels", "instances", "boxes", "box_labels", "intrinsics"):
            assert getattr(first, key).tobytes() == getattr(again, key).tobytes()
    assert (render_scene(1, SMALL).labels != render_scene(2, SMALL).labels).any()


@pytest.mark.parametrize("seed", range(6))
def test_another_size_shows_the_same_room(seed):
    small, large = render_scene(seed, (60, 80)), render_scene(seed, (180, 240))
    np.testing.assert_array_equal(small.world.camera_to_world, large.world.camera_to_world)
    # Every pixel centre of the small image is one of the large image.
    np.testing.assert_array_equal(large.labels[1::3, 1::3], small.labels)
    np.testing.assert_allclose(large.depth_m[1::3, 1::3], small.depth_m, rtol=1e-5)
    means = large.image.reshape(60, 3, 80, 3, 3).mean(axis=(1, 3))
    assert np.abs(means - small.image).mean() < 8  # also its colours, patterns and light


@pytest.mark.parametrize(("seed", "size"), [(-1, (60, 80)), (0, (4, 80)), (0, (60, 0))])
def test_scenes_that_cannot_be(seed, size):
    with pytest.raises(UserError, match="expected seed >= 0"):
        render_scene(seed, size)


def test_readers_give_what_was_rendered(folder):
    masks, depth = (reader(folder.parent, 3, 2, SMALL) for reader in (SceneMasks, SceneDepth))
    rule = LabelRule(len(CLASSES))
    for split, num in (("train", 3), ("val", 2)):
        assert masks.available() == depth.available() == ["train", "val"]
        assert len(masks.samples(split)) == len(depth.samples(split)) == num
        for i, (with_mask, with_depth) in enumerate(zip(masks.samples(split), depth.samples(split), strict=True)):
            scene = render_scene(scene_seed(split, i), SMALL)
            np.testing.assert_array_equal(np.array(Image.open(with_mask.image)), scene.image)
            np.testing.assert_array_equal(rule.read(with_mask.mask), scene.labels)
            stored = np.array(Image.open(with_depth.depth))
            assert stored.dtype == np.uint16 and np.abs(stored / DEPTH_SCALE - scene.depth_m).max() < 0.00051
            assert with_depth.image == with_mask.image and with_depth.focal == scene.intrinsics[0, 0]
            instances = np.array(Image.open(folder / "instances" / split / with_mask.mask.name))
            np.testing.assert_array_equal(instances, scene.instances)
    assert masks.samples("test") == depth.samples("test") == [] and masks.notices == depth.notices == []


def test_objects_of_a_drawn_scene_are_those_that_were_rendered(folder):
    num = 0
    for split, count in (("train", 3), ("val", 2)):
        samples = SceneMasks(folder.parent, 3, 2, SMALL).samples(split)
        for i in range(count):
            scene, stored = render_scene(scene_seed(split, i), SMALL), scene_objects(folder, split, samples[i].image_id)
            np.testing.assert_array_equal(stored.boxes, scene.boxes)
            np.testing.assert_array_equal(stored.masks, scene.masks)
            np.testing.assert_array_equal(stored.labels, [{BOX: 0, SPHERE: 1}[int(k)] for k in scene.box_labels])
            assert stored.boxes.dtype == np.float32 and stored.masks.dtype == bool and stored.labels.dtype == np.int64
            for box, mask in zip(stored.boxes, stored.masks, strict=True):
                rows, columns = np.nonzero(mask)
                assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            num += len(stored.boxes)
    assert num > 5
    with pytest.raises(UserError, match=r"000009\.png: no such file"):
        scene_objects(folder, "val", "000009")


def test_a_scene_without_objects_has_empty_ones(tmp_path):
    for kind in ("instances", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / kind / "train" / "000000.png")
    stored = scene_objects(tmp_path, "train", "000000")
    assert stored.boxes.shape == (0, 4) and stored.labels.shape == (0,) and stored.masks.shape == (0, 8, 9)


def test_splits_share_no_scene(folder):
    seeds = json.loads((folder / "scenes.json").read_text())["seeds"]
    assert [len(seeds["train"]), len(seeds["val"])] == [3, 2] and not set(seeds["train"]) & set(seeds["val"])
    ids = [scene_seed(split, i) for split in ("train", "val") for i in range(2000)]
    assert len(set(ids)) == 4000


def test_scenes_are_drawn_once_and_other_numbers_beside_them(folder, monkeypatch):
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(times) == 5 * 4
    other = draw_scenes(folder.parent, 1, 1, SMALL)
    assert other != folder and other.parent == folder.parent
    first = "images/train/000000.png"
    assert (other / first).read_bytes() == (folder / first).read_bytes()
    monkeypatch.setattr("dense_heads.data.datasets.scenes.render_scene", None)  # nothing is drawn a second time
    assert draw_scenes(folder.parent, 3, 2, SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == times


def test_a_drawing_that_was_stopped_leaves_nothing_that_counts(tmp_path, monkeypatch):
    def stopped(seed, size):
        if seed == scene_seed("val", 0):
            raise KeyboardInterrupt
        return render_scene(seed, size)

    monkeypatch.setattr("dense_heads.data.datasets.scenes.render_scene", stopped)
    with pytest.raises(KeyboardInterrupt):
        draw_scenes(tmp_path, 2, 1, SMALL)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    monkeypatch.undo()
    reader = SceneMasks(tmp_path, 2, 1, SMALL)
    assert len(reader.samples("train")) == 2 and len(reader.samples("val")) == 1
    assert not list(tmp_path.glob(".*.part"))


def test_processes_that_want_the_same_scenes(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=draw_scenes, args=(tmp_path, 2, 1, SMALL)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(SceneMasks(tmp_path, 2, 1, SMALL).samples("train")) == 2


def test_bad_requests(tmp_path):
    for options, message in (
        ({"num_train": 0}, "0 training"),
        ({"num_val": -2}, "-2 validation"),
        ({"size": [240]}, r"\[240\]"),
        ({"size": [4, 320]}, "at least 8"),
    ):
        with pytest.raises(UserError, match=message):
            SceneMasks(tmp_path, **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be drawn into .*Set data\.root=FOLDER"):
        SceneDepth(tmp_path / "file", 1, 1, SMALL)


def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(tmp_path):
    ours = draw_scenes(tmp_path / "elsewhere", 1, 1, SMALL).name
    kept = tmp_path / ours / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(UserError, match=r"has no scenes\.json.*Move it away"):
        draw_scenes(tmp_path, 1, 1, SMALL)
    assert kept.read_text() == "mine"


def test_the_benchmarks_name_the_classes_of_the_generator():
    assert read_classes(TASKS_DIR / "scenes_segmentation/classes.txt", len(CLASSES)).names == CLASSES


def test_intrinsics_scale_with_the_image():
    small, large = camera_intrinsics((60, 80)), camera_intrinsics((240, 320))
    assert large[0, 0] == pytest.approx(4 * small[0, 0]) and small[0, 0] == small[1, 1]
    assert np.rad2deg(2 * np.arctan(160 / large[0, 0])) == pytest.approx(70)
