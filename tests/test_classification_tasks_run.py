"""Classes of whole images through the real command: both probes, every verb, the cache, lists, mistakes."""

import csv
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import dense_heads
from dense_heads.__main__ import main
from dense_heads.data.classification_transforms import RandomResizedCrop
from dense_heads.data.datasets.class_folders import ClassFolders
from dense_heads.errors import UserError
from dense_heads.heads.classification import LinearClassifier
from dense_heads.metrics.classification import hits, scores
from dense_heads.ops.neighbours import knn_probabilities
from dense_heads.paths import TASKS_DIR
from tests.factories import fake_pair, make_class_folders, save

TINY = [
    "task=classification", "backbone=vitn14_reg", "backbone.weights=null", "backbone.precision=float32",
    "trainer.accelerator=cpu", "data.image_size=28", "data.batch_size=4", "data.num_workers=0",
]  # fmt: skip
GRID = ["head=grid", "head.lr=[2e-9,2e-1]", "trainer.max_steps=20", "task.protocol.lr_batch=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    return make_class_folders(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def knn(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("knn") / "run"
    assert main([*TINY, "head.k=[1,3]", f"data.root={data}", f"run_dir={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def grid(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("grid") / "run"
    assert main([*TINY, *GRID, "cache=memory", "cache.views=0", f"data.root={data}", f"run_dir={run}"]) == 0
    return run


def read(run, name="metrics.json"):
    return json.loads((run / name).read_text())


def test_knn_needs_no_training_and_says_so(knn):
    found = read(knn)
    assert found["family"] == "classification" and found["steps"] == 0 and found["head"]["name"] == "knn"
    assert found["metrics"]["val/top1"] == found["metrics"]["val/macc"] == 1.0  # shades
    assert [row["k"] for row in found["candidates"]] == [1, 3]
    assert found["selected_on"].startswith("nothing is trained; the best of 2 candidates on validation")
    assert any("not trained: 12" in note for note in found["notes"])
    assert list((knn / "pictures" / "val").glob("*.png")) and (knn / "report.html").stat().st_size > 1000


def test_knn_is_the_published_formula_on_the_cls_tokens(knn, data):
    model = dense_heads.load_model(knn)
    assert model.card.classes == ["dark", "grey", "light"] and len(model.head.bank) == 12
    backbone = dense_heads.load_backbone("vitn14_reg", weights=None)
    picture = data / "val" / "grey" / "1.png"
    (view,) = model.transform(np.asarray(Image.open(picture)))
    assert view.shape == (3, 28, 28)
    query = backbone(view[None])["cls_token"].detach()
    votes = knn_probabilities(query, model.head.bank, model.head.classes, 3, [model.head.k])[model.head.k]
    probabilities = model.predict(picture)
    assert probabilities.shape == (3,) and probabilities.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(probabilities, (votes / votes.sum())[0], atol=1e-5)


def test_the_grid_trains_all_heads_at_once_and_keeps_the_best(grid):
    found = read(grid)
    rows = found["candidates"]
    assert len(rows) == 8  # 2 heads x 2 choices of blocks x 2 rates
    assert {(row["head"], row["blocks"]) for row in rows} == {
        (head, blocks) for head in ("linear_cls", "linear_cls_mean") for blocks in ("last", "last4")
    }
    rates = [float(row["lr"]) for row in csv.DictReader((grid / "metrics.csv").open()) if row["lr"]]
    assert 0 < max(rates) <= 1e-9  # of the first head: stated for a batch of 8, taken for one of 4
    assert rows[0]["lr"] == 0.2 and rows[0]["val/top1"] == 1.0 > rows[-1]["val/top1"]
    assert found["metrics"]["val/top1"] == 1.0
    head = dense_heads.load_model(grid).head
    assert isinstance(head, LinearClassifier)
    assert head.linear.in_features == 192 * (len(head.in_channels) + head.mean_patch)


def test_cached_features_score_as_computed_ones(grid, data, tmp_path):
    typed = [*TINY, *GRID, "data.augment=false", f"data.root={data}"]
    assert main([*typed, f"run_dir={tmp_path / 'off'}"]) == 0
    disk = ["cache=disk", "cache.views=0", "cache.dtype=float32", f"cache.dir={tmp_path / 'cache'}"]
    assert main([*typed, *disk, f"run_dir={tmp_path / 'disk'}"]) == 0
    rows = [{row["name"]: row["val/top1"] for row in read(tmp_path / name)["candidates"]} for name in ("off", "disk")]
    assert rows[0] == rows[1]
    kept = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.safetensors"))
    assert kept < 18 * 30_000  # of an image two vectors for each of four blocks, no maps


@pytest.mark.parametrize("kind", ["knn", "grid"])
def test_evaluate_repeats_the_numbers(kind, knn, grid):
    run = {"knn": knn, "grid": grid}[kind]
    assert main(["mode=evaluate", f"model={run}", "cache=off"]) == 0
    (again,) = (run / "evaluate").iterdir()
    assert read(again)["metrics"] == read(run)["metrics"] and read(again)["per_class"] == read(run)["per_class"]


def test_predict_writes_a_table_and_pictures(grid, data, tmp_path):
    assert main(["mode=predict", f"model={grid}", f"input={data / 'val'}", f"output={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert len(rows) == 6 and all(row["class_1"] == row["image"].split("/")[0] for row in rows)
    assert all(float(row["probability_1"]) >= float(row["probability_2"]) for row in rows)
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 6


def test_lists_and_folders_without_a_split_are_read_too(data, tmp_path):
    for split in ("train", "val"):
        lines = [f"{p.relative_to(data)} {p.parent.name}" for p in sorted((data / split).rglob("*.png"))]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines).replace(".png ", ".png\t"))
    with pytest.raises(UserError, match="12 files that do not exist"):
        ClassFolders(tmp_path)
    (tmp_path / "train").symlink_to(data / "train")
    (tmp_path / "val").symlink_to(data / "val")
    listed = tmp_path / "listed"
    listed.mkdir()
    (listed / "train.txt").write_text("../train/dark/0.png 10\n../train/grey/0.png 9\n")
    (listed / "val.txt").write_text("../val/dark/0.png 10\n")
    reader = ClassFolders(listed)
    assert reader.categories == ["9", "10"] and [s.label for s in reader.samples("train")] == ["10", "9"]
    plain = ClassFolders(data / "train")
    assert plain.made_split is not None and len(plain.samples("val")) == 2 and len(plain.samples("train")) == 10
    again = ClassFolders(data / "train", split=plain.made_split)
    assert again.samples("val") == plain.samples("val")


@pytest.mark.parametrize(
    "typed, words",
    [
        (["data.root=nowhere"], "train/CLASS/NAME.jpg"),
        (["head=linear4"], "predicts maps"),
        (["task=nuclei", f"data.root={TASKS_DIR}/nuclei/data", "head=linear_cls"], "names an image's class"),
        (["head.k=0"], "head.k=0"),
        (["task.num_classes=7"], "there are 3 classes"),
        (["head=grid", "cache=memory"], "cache.views"),
        (["task.transforms.eval.resize=14"], "crop=28, resize=14"),
    ],
)
def test_mistakes_end_with_a_word(typed, words, data, tmp_path, capsys):
    assert main([*TINY, f"data.root={data}", f"run_dir={tmp_path / 'run'}", *typed]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "card.json").exists()


def test_unknown_classes_broken_files_and_shared_ones_are_named_together(tmp_path, capsys):
    root = make_class_folders(tmp_path / "data", train=2, val=1)
    save(root / "val" / "odd" / "0.png", fake_pair(0)[0])
    (root / "train" / "dark" / "broken.png").write_bytes(b"no image")
    (root / "val" / "dark" / "same.png").symlink_to(root / "train" / "dark" / "0.png")
    assert main([*TINY, f"data.root={root}", f"run_dir={tmp_path / 'run'}"]) == 2
    told = capsys.readouterr().err
    assert "unknown classes: odd" in told and "broken.png" in told and "is in val and in train" in told


def test_counts_become_accuracies():
    probabilities = torch.eye(7)[[0, 1, 1, 6]] + 0.01 * torch.arange(7.0).flip(0)
    counts = hits(probabilities, torch.tensor([0, 1, 2, 5]))
    found = scores(counts)
    assert found["top1"] == 0.5 and found["macc"] == 0.5 and found["top5"] == 0.75


def test_random_crops_stay_within_their_share_and_their_chance_can_be_taken_out():
    image = np.zeros((60, 80, 3), np.uint8)
    image[:, 40:] = 255
    step = RandomResizedCrop(28, scale=(0.2, 0.3))
    for seed in range(20):
        step.set_random_state(np.random.default_rng(seed), random.Random(seed))
        top, left, height, width = step.get_params_dependent_on_data({"shape": image.shape}, {})["box"]
        assert 0.19 < height * width / 4800 < 0.32 and 0.7 < width / height < 1.4
        assert top + height <= 60 and left + width <= 80
    assert step(image=image)["image"].shape == (28, 28, 3)
    assert step.without_chance().resize == 32
