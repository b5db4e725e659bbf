import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from run_folders import NAMES, PALETTE, coarse, scenes
from torch.utils.data import DataLoader

from dense_heads.errors import UserError
from dense_heads.report.depth_panel import depth_colours, depth_panel, depth_picture
from dense_heads.report.panel import colour_map, overlay, segmentation_panel
from dense_heads.report.pictures import PictureCallback
from dense_heads.structures import IMAGENET_MEAN, IMAGENET_STD

TWO = np.array([(30, 40, 60), (255, 200, 0)], dtype=np.uint8)


def panel(image, label, prediction, title):
    return segmentation_panel(image, label, prediction, TWO, ["a", "b"], title)


def test_colour_map_takes_the_palette_and_black_for_ignored():
    mask = np.array([[0, 1], [255, 1]])
    assert colour_map(mask, TWO).tolist() == [[[30, 40, 60], [255, 200, 0]], [[0, 0, 0], [255, 200, 0]]]


@pytest.mark.parametrize("value", [-1, 2, 254, 256])
def test_values_outside_the_classes_are_named(value):
    with pytest.raises(UserError, match=rf"\[{value}\].*0 to 1"):
        colour_map(np.array([[0, value]]), TWO)


def test_overlay_mixes_by_alpha_and_leaves_ignored_pixels():
    image = np.full((4, 6, 3), 100, np.uint8)
    mask = np.zeros((4, 6), int)
    mask[:, 3:] = 1
    mask[0] = 255
    mixed = overlay(image, mask, TWO, alpha=0.25, contours=False)
    assert (mixed[0] == 100).all()
    assert mixed[2, 0].tolist() == [82, 85, 90]  # 100 + (30, 40, 60 - 100) / 4, half to even
    assert mixed[2, 5].tolist() == [139, 125, 75]
    drawn = overlay(image, mask, TWO, alpha=0.25)
    assert drawn[2, 2].tolist() == [30, 40, 60] and drawn[2, 3].tolist() == [255, 200, 0]
    assert (drawn[3, [0, 5]] == mixed[3, [0, 5]]).all() and (drawn[0] == 100).all()


def test_overlay_refuses_another_size():
    with pytest.raises(UserError, match=r"\(4, 6\).*\(4, 5\)"):
        overlay(np.zeros((4, 6, 3), np.uint8), np.zeros((4, 5), int), TWO)


def test_panel_shows_four_tiles_and_counts_errors_once():
    image_id, image, label = scenes(1)[0]
    panel = np.asarray(segmentation_panel(image, label, coarse(label), PALETTE, NAMES, image_id))
    perfect = np.asarray(segmentation_panel(image, label, np.where(label == 255, 0, label), PALETTE, NAMES, image_id))
    red = [(np.abs(one.astype(int) - (222, 45, 38)).sum(2) < 140).sum() for one in (panel, perfect)]
    quarter = panel.shape[1] * 3 // 4
    right = (np.abs(panel[:, quarter:].astype(int) - (222, 45, 38)).sum(2) < 140).sum()
    assert red[0] > red[1] + 500 and right > 500  # the errors' tile alone is red
    assert panel.shape[1] > 1300 and panel.shape[0] < 500


def test_panel_of_wide_images_stands_in_two_rows_and_tiny_ones_grow():
    label = np.ones((100, 200), int)
    wide = segmentation_panel(np.zeros((100, 200, 3), np.uint8), label, label, TWO, ["a", "b"])
    assert wide.height > 700
    tiny = segmentation_panel(None, None, np.zeros((14, 14), int), TWO, ["a", "b"])
    assert tiny.width >= 100


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1)])
def test_panel_of_extreme_shapes(shape):
    image = np.zeros((*shape, 3), np.uint8)
    assert (
        segmentation_panel(image, np.full(shape, 255), np.zeros(shape, int), TWO, ["a", "b"], "x" * 5000).width < 3000
    )


def test_legend_lists_classes_that_occur_also_with_150_and_hostile_names():
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 255, (150, 3)).astype(np.uint8)
    names = [f"very long class name number {i} " * 5 for i in range(150)]
    names[3] = "\x1b[31m<script>\n\u0000"
    few = segmentation_panel(None, None, np.full((50, 50), 3), palette, names)
    many = segmentation_panel(None, None, np.arange(2500).reshape(50, 50) % 150, palette, names)
    assert many.height > few.height + 100  # its lines of legend
    assert many.height < few.height + 1000  # but not 150 of them


def test_panel_refuses_a_label_of_another_size():
    with pytest.raises(UserError, match="equal sizes"):
        segmentation_panel(None, np.zeros((3, 4), int), np.zeros((4, 3), int), TWO, ["a", "b"])


class Module(pl.LightningModule):
    """Predicts its own labels; `prediction` as the segmentation module gives it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch):
        return self.weight**2

    def validation_step(self, batch):
        return {"prediction": [torch.where(mask == 255, 0, mask) for mask in batch["mask"]]}

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def batches(tmp_path, files=True, ids=("a", "b", "c")):
    samples = []
    for number, image_id in enumerate(ids):
        path = tmp_path / f"{number}.png"
        if files:
            Image.new("RGB", (40, 20), (200, 10, 10)).save(path)
        mask = torch.zeros(20, 40, dtype=torch.int64)
        mask[:, 20:], mask[0] = 1, 255
        rgb = torch.tensor([10.0, 200.0, 10.0])
        image = ((rgb - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD))[:, None, None].expand(3, 28, 56)
        samples.append({"image": [image], "mask": [mask], "image_id": [image_id], "path": [str(path)]})
    return DataLoader(samples, batch_size=None)


def trainer(tmp_path, callback, logger=False, **given):
    return pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=[callback], logger=logger, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_steps=6, val_check_interval=1,
        check_val_every_n_epoch=None, **given,
    )  # fmt: skip


def picture(path):
    return np.asarray(Image.open(path).convert("RGB"))


def first_tile(path):
    pixels = picture(path)
    return pixels[100, 60].tolist()  # inside the image's tile


def test_callback_draws_validation_and_test_into_the_run_folder(tmp_path):
    callback = PictureCallback(tmp_path / "run", panel, "mask", num=2)
    runner, data = trainer(tmp_path, callback), batches(tmp_path)
    runner.fit(Module(), data, data)
    runner.test(Module(), data, verbose=False)
    assert sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*.*")) == [
        "pictures/test/a.png", "pictures/test/b.png", "pictures/val/a.png", "pictures/val/b.png",
    ]  # fmt: skip
    assert first_tile(tmp_path / "run/pictures/val/a.png") == [200, 10, 10]  # from the file


@pytest.mark.parametrize("key", ["image", "views", "features"])
def test_callback_without_the_file_restores_the_tensor_or_goes_without(tmp_path, key):
    data = batches(tmp_path, files=False)
    for sample in data.dataset:
        image = sample.pop("image")
        if key == "views":
            image = [[image[0][:, ::2, ::2], image[0]]]
        if key != "features":
            sample[key] = image
    trainer(tmp_path, PictureCallback(tmp_path, panel, "mask")).test(Module(), data, verbose=False)
    file = tmp_path / "pictures/test/a.png"
    if key == "features":  # three tiles, not four: no image
        trainer(tmp_path, PictureCallback(tmp_path / "full", panel, "mask")).test(
            Module(), batches(tmp_path), verbose=False
        )
        assert picture(file).shape[0] <= picture(tmp_path / "full/pictures/test/a.png").shape[0]
        assert not (picture(file) == (200, 10, 10)).all(2).any()
    else:
        assert first_tile(file) == [10, 200, 10]


def test_callback_one_channel_and_no_label(tmp_path):
    data = batches(tmp_path, files=False, ids=("grey",))
    data.dataset[0]["image"] = [torch.linspace(-3, 5, 20 * 40).view(1, 20, 40)]

    class Unlabelled(Module):
        def test_step(self, batch):
            return {"prediction": [batch.pop("mask")[0].clamp(max=1)]}

    trainer(tmp_path, PictureCallback(tmp_path, panel, "mask")).test(Unlabelled(), data, verbose=False)
    assert (tmp_path / "pictures/test/grey.png").is_file()


def test_every_draws_the_first_each_nth_and_the_last(tmp_path, monkeypatch):
    drawn = []
    callback = PictureCallback(tmp_path, panel, "mask", every=4, num=1)
    runner, data = trainer(tmp_path, callback), batches(tmp_path)
    original = callback._draw

    def spy(trainer, outputs, batch, split):
        if callback._left and not trainer.sanity_checking:
            drawn.append(trainer.global_step)
        original(trainer, outputs, batch, split)

    monkeypatch.setattr(callback, "_draw", spy)
    runner.fit(Module(), data, data)
    assert drawn == [1, 5, 6]
    resumed = PictureCallback(tmp_path, panel, "mask", every=4, num=1)
    resumed.load_state_dict(callback.state_dict())
    assert resumed.state_dict() == {"validations": 6}


def test_hostile_ids_stay_inside_the_folder_and_apart(tmp_path):
    ids = ("../../escape", "a/b", "a_b", "x" * 400, "", "<img src=x>", "..")
    data = batches(tmp_path, ids=ids)
    trainer(tmp_path, PictureCallback(tmp_path / "run", panel, "mask", num=10)).test(Module(), data, verbose=False)
    files = [path for path in tmp_path.rglob("*.png") if not path.stem.isdigit()]
    assert len(files) == len(ids)
    assert all(path.parent == tmp_path / "run/pictures/test" for path in files)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"every": 0}, "every=0"), ({"num": -1}, "num=-1")],
)
def test_bad_arguments(tmp_path, given, words):
    with pytest.raises(UserError, match=words):
        PictureCallback(**{"folder": tmp_path, "panel": panel, "label_key": "mask", **given})


def test_tensorboard_gets_pictures_that_can_be_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    trainer(tmp_path, PictureCallback(tmp_path, panel, "mask", num=1), logger).test(
        Module(), batches(tmp_path), verbose=False
    )
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["images"] == ["test/a"]
    assert events.Images("test/a")[0].width == picture(tmp_path / "pictures/test/a.png").shape[1]


def test_wandb_offline_gets_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # an earlier test of this process may have settled that there is a network
    logger = WandbLogger(save_dir=tmp_path, project="test", offline=True)
    trainer(tmp_path, PictureCallback(tmp_path, panel, "mask", num=1), logger).test(
        Module(), batches(tmp_path), verbose=False
    )
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert "test/pictures/a" in json.dumps(list(summary))
    assert list(tmp_path.rglob("media/images/**/*.png"))


def test_depth_is_brighter_where_it_is_nearer_and_grey_where_nothing_was_measured():
    depth = np.tile(np.linspace(1, 5, 50, dtype=np.float32), (10, 1))
    depth[0] = 0
    colours = depth_colours(depth, 1, 5)
    brightness = colours[1:].astype(int).sum(2)
    assert (np.diff(brightness, axis=1) <= 0).all() and brightness[0, 0] > brightness[0, -1] + 300
    assert len(np.unique(colours[0].reshape(-1, 3), axis=0)) == 1
    assert depth_picture(depth).size == (50, 54)  # with its scale bar


def test_a_depth_panel_shows_image_label_prediction_and_errors():
    depth = np.tile(np.linspace(1, 5, 80, dtype=np.float32), (60, 1))
    image = np.full((60, 80, 3), 90, np.uint8)
    full, bare = depth_panel(image, depth, depth * 1.1, "id"), depth_panel(None, None, depth)
    assert full.width > 3 * bare.width / 2 and full.height > bare.height
    depth_panel(image, np.zeros_like(depth), depth)  # nothing measured
    with pytest.raises(UserError, match="equal sizes"):
        depth_panel(image, depth[:30], depth)
