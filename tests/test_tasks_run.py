"""Every benchmark runs through the command: a tiny `fit` on fake data of its format, and what is done with it."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

import dense_heads
from dense_heads.__main__ import main
from dense_heads.paths import TASKS_DIR
from tests.factories import DATA, fake_pair, make_ade20k, make_camvid, make_cityscapes, make_nuclei, make_voc, save

REPO = Path(__file__).resolve().parents[1]
FAMILIES = {path.parent.name: OmegaConf.load(path).defaults[0] for path in sorted(TASKS_DIR.glob("*/task.yaml"))}
TASKS = [task for task, family in FAMILIES.items() if family == "segmentation"]
MAKERS = {  # of a task's files, in its on-disk format
    "ade20k": make_ade20k,
    "camvid": make_camvid,
    "cityscapes": make_cityscapes,
    "nuclei": make_nuclei,
    "scenes_segmentation": lambda root: root,  # it draws its own
    "voc2012": make_voc,
}
FEW = {"scenes_segmentation": ["task.data.format.num_train=4", "task.data.format.num_val=2"]}
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
RAW = {
    "ade20k": list(range(1, 151)),
    "cityscapes": CITYSCAPES_IDS,
}  # a data set's own values; the others have train ids
SMALL = ["data.image_size=56", "data.batch_size=2"]
TINY = [
    "backbone=vitn14_reg",
    "backbone.weights=null",
    "debug=fast",
    "trainer.accelerator=cpu",
    *SMALL,
]


@pytest.fixture
def said():
    """What the command reports while it runs; a handler of an earlier test holds that test's stderr."""
    log, records = logging.getLogger("dense_heads"), []
    log.handlers.clear()
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    log.addHandler(handler)
    yield records
    log.handlers.clear()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Task -> the folder of its run and the root of its data, made once."""
    made = {}

    def fit(task):
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            root = MAKERS[task](folder / "data")
            logging.getLogger("dense_heads").handlers.clear()
            typed = [f"task={task}", *TINY, *FEW.get(task, []), f"data.root={root}", f"run_dir={folder / 'run'}"]
            assert main(typed) == 0
            made[task] = folder / "run", root
        return made[task]

    return fit


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of images of every mode, with one broken file among them; name -> (height, width) upright."""
    folder = tmp_path_factory.mktemp("pictures")
    rgb, _ = fake_pair(7, size=(60, 84))
    Image.fromarray(rgb).save(folder / "rgb.jpg")
    Image.fromarray(rgb[..., 0]).save(folder / "grey.png")
    alpha = np.full((60, 84, 1), 90, np.uint8)
    Image.fromarray(np.concatenate([rgb, alpha], 2)).save(folder / "rgba.png")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 200).save(folder / "deep.tif")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(rgb[:50]).save(folder / "turned.jpg", exif=exif)
    save(folder / "deeper" / "palette.png", np.array(Image.fromarray(rgb[:, :33]).quantize(8)))
    Image.fromarray(rgb[:, :33]).quantize(8).save(folder / "deeper" / "palette.png")
    Image.fromarray(rgb[:9, :11]).save(folder / "small.bmp")  # smaller than a patch
    (folder / "broken.png").write_bytes((folder / "grey.png").read_bytes()[:90])
    (folder / "notes.txt").write_text("no image")
    return folder, {
        "rgb": (60, 84),
        "grey": (60, 84),
        "rgba": (60, 84),
        "deep": (60, 84),
        "turned": (84, 50),
        "deeper/palette": (60, 33),
        "small": (9, 11),
    }


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", TASKS)
def test_fit(fitted, task):
    run, root = fitted(task)
    for name in ("config.yaml", "overrides.yaml", "metrics.json", "metrics.csv", "report.html", "card.json"):
        assert (run / name).stat().st_size, name
    assert list((run / "checkpoints").glob("step=00000002.ckpt")) and list((run / "pictures").rglob("*.png"))
    finals, cfg = read_json(run / "metrics.json"), OmegaConf.load(run / "config.yaml")
    assert (finals["task"], finals["steps"], finals["backbone"]["name"]) == (task, 2, "vitn14_reg")
    assert finals["backbone"]["weights"] is None and any("random" in note for note in finals["notes"])
    assert len(finals["per_class"]) == cfg.task.num_classes and Path(cfg.data.root) == root
    assert 0 <= finals["metrics"][finals["primary"]] <= 1
    assert finals["published"] is None  # none for this backbone
    assert (finals["baseline"] is None) == (cfg.task.baseline is None)
    names = (TASKS_DIR / task / "classes.txt").read_text().splitlines()
    assert read_json(run / "card.json")["classes"] == [line.split("\t")[0] for line in names]


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_repeats_the_numbers(fitted, task):
    run, _ = fitted(task)
    before = {path for path in run.rglob("*") if path.is_file()}
    contents = {path: path.read_bytes() for path in before}
    assert main(["mode=evaluate", f"model={run}"]) == 0
    assert all(path.read_bytes() == content for path, content in contents.items())  # the run itself is untouched
    (folder,) = (run / "evaluate").iterdir()
    ours, theirs = read_json(folder / "metrics.json"), read_json(run / "metrics.json")
    for key in ("metrics", "per_class", "primary", "conventions", "protocol", "published", "task", "seed"):
        assert ours[key] == theirs[key], key
    assert (folder / "report.html").stat().st_size


@pytest.mark.parametrize("task", TASKS)
def test_predict(fitted, pictures, said, tmp_path, task):
    run, _ = fitted(task)
    folder, sizes = pictures
    typed = ["mode=predict", f"model={run}", f"input={folder}"]
    assert main([*typed, f"output={tmp_path / 'out'}"]) == 0
    found = {p.relative_to(tmp_path / "out" / "labels").with_suffix("").as_posix(): p
             for p in (tmp_path / "out" / "labels").rglob("*.png")}  # fmt: skip
    assert found.keys() == sizes.keys()
    model = dense_heads.load_model(run)
    labels = {}
    for name, path in found.items():
        with Image.open(path) as picture:
            assert picture.mode == "P" and picture.size == sizes[name][::-1]
            labels[name] = np.array(picture)
        (source,) = folder.glob(f"{name}.*")
        expected = model.predict(source)
        assert expected.shape == sizes[name] and expected.dtype == np.int64
        assert np.array_equal(labels[name], expected), name
        with Image.open(tmp_path / "out" / "overlays" / f"{name}.png") as picture:
            assert picture.size == sizes[name][::-1]
    assert any("broken.png" in line for line in said) and any("7 of 8 images" in line for line in said)

    typed = ["mode=predict", f"model={run}", f"input={folder / 'rgb.jpg'}", "output_ids=raw"]
    assert main([*typed, f"output={tmp_path / 'raw'}"]) == 0
    values = np.array(RAW.get(task, list(range(255))))
    with Image.open(tmp_path / "raw" / "labels" / "rgb.png") as picture:
        assert np.array_equal(np.array(picture), values[labels["rgb"]])


def test_one_file_is_predicted_too(fitted, pictures, said, tmp_path):
    run, _ = fitted("camvid")
    source = pictures[0] / "turned.jpg"
    assert main(["mode=predict", f"model={run}", f"input={source}", f"output={tmp_path}"]) == 0
    with Image.open(source) as picture:  # in memory, as opened: its EXIF rotation is applied all the same
        expected = dense_heads.load_model(run / "head.safetensors").predict(picture)
    with Image.open(tmp_path / "labels" / "turned.png") as picture:
        assert np.array_equal(np.array(picture), expected)


def test_files_that_differ_in_their_suffix_do_not_overwrite_each_other(fitted, said, tmp_path):
    run, _ = fitted("nuclei")
    for seed, suffix in enumerate((".png", ".jpg")):
        save(tmp_path / "in" / f"one{suffix}", fake_pair(seed)[0])
    assert main(["mode=predict", f"model={run}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}"]) == 0
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 2


def test_a_published_number_that_is_not_comparable_says_why(said, tmp_path):
    """A published row with registers on fake data: everything that differs is named."""
    root = make_ade20k(tmp_path / "data", train=4, val=2)
    typed = ["experiment=ade20k_vits14_linear", "backbone=vits14_reg", *TINY[1:], f"data.root={root}"]
    assert main([*typed, f"run_dir={tmp_path / 'run'}"]) == 0
    published = read_json(tmp_path / "run" / "metrics.json")["published"]
    assert published["value"] == 44.3 and published["comparable"] is False
    reasons = "\n".join(published["not_comparable"])
    for expected in ("backbone.weights", "data.batch_size is 2", "data.image_size is 56", "trainer.max_steps is 2"):
        assert expected in reasons
    assert "4 train images, published with 20,210" in reasons and "2 val images, published with 2,000" in reasons
    assert "without registers" in reasons


# The real samples


def sample(*parts):
    folder = DATA.joinpath(*parts)
    return pytest.param(folder, marks=pytest.mark.skipif(not folder.is_dir(), reason=f"{folder} is not here"))


def fit_and_evaluate(task, root, run):
    typed = [f"task={task}", *TINY, f"data.root={root}", f"run_dir={run}"]
    assert main(typed) == 0
    assert main(["mode=evaluate", f"model={run}"]) == 0
    finals = read_json(run / "metrics.json")
    assert read_json(next(run.glob("evaluate/*/metrics.json")))["per_class"] == finals["per_class"]
    return finals


@pytest.mark.parametrize("root", [sample("VOCdevkit")])
def test_the_voc_sample(said, tmp_path, root):
    finals = fit_and_evaluate("voc2012", root, tmp_path / "run")
    assert finals["protocol"]["images"] == {"train": 2, "val": 1}
    assert any("not comparable" in note and "aug" in note for note in finals["notes"])


@pytest.mark.parametrize("root", [sample("cityscapes")])
def test_the_cityscapes_sample(said, tmp_path, root):
    finals = fit_and_evaluate("cityscapes", root, tmp_path / "run")
    assert finals["protocol"]["images"] == {"train": 2, "val": 1} and len(finals["per_class"]) == 19


@pytest.mark.parametrize("root", [sample("camvid")])
def test_the_camvid_sample(said, tmp_path, root):
    finals = fit_and_evaluate("camvid", root, tmp_path / "run")
    assert finals["protocol"]["images"] == {"train": 367, "val": 101}


@pytest.mark.parametrize("root", [sample("ADEChallengeData2016")])
def test_the_ade20k_sample_is_measured_and_predicted(fitted, said, tmp_path, root):
    """It has no training images: a head from elsewhere is composed."""
    run, _ = fitted("ade20k")
    assert main(["mode=evaluate", f"model={run}", f"data.root={root}"]) == 0
    theirs = read_json(max((run / "evaluate").iterdir(), key=os.path.getmtime) / "metrics.json")
    head = ["task=ade20k", *TINY, f"head.weights={run}"]
    assert main(["mode=evaluate", *head, f"data.root={root}", f"run_dir={tmp_path / 'evaluated'}"]) == 0
    ours = read_json(tmp_path / "evaluated" / "metrics.json")
    assert ours["metrics"] == theirs["metrics"] and ours["protocol"]["images"]["val"] == 3
    images = root / "images" / "validation"
    assert main(["mode=predict", *head, f"input={images}", f"output={tmp_path / 'out'}"]) == 0
    model = dense_heads.load_model(run)
    for source in sorted(images.glob("*.jpg")):
        with Image.open(tmp_path / "out" / "labels" / f"{source.stem}.png") as picture:
            assert np.array_equal(np.array(picture), model.predict(source))
    assert main(["task=ade20k", *TINY, f"data.root={root}", f"run_dir={tmp_path / 'fit'}"]) == 2
    assert not (tmp_path / "fit").exists()


# A process of its own


def test_the_default_job_from_an_empty_folder(tmp_path):
    """`python -m dense_heads`, two steps of it: real images, a report, everything below the working directory."""
    command = [sys.executable, "-m", "dense_heads", "debug=fast", "trainer.accelerator=cpu", *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr and "report" in ended.stderr
    (run,) = (tmp_path / "outputs" / "nuclei" / "vitn14_reg-linear4").iterdir()
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    finals = read_json(run / "metrics.json")
    assert finals["baseline"]["name"] == "raw pixels" and finals["protocol"]["images"] == {"train": 48, "val": 16}
    assert "in-house" in (run / "report.html").read_text(encoding="utf-8")


def test_windows_of_several_images_share_a_batch_and_change_nothing(fitted, tmp_path):
    run, _ = fitted("camvid")
    scores = []
    for size in (1, 2):
        windows = ["task.inference.window=42", "task.inference.stride=28", f"data.eval_batch_size={size}"]
        before = set((run / "evaluate").iterdir()) if (run / "evaluate").is_dir() else set()
        assert main(["mode=evaluate", f"model={run}", *windows]) == 0
        (folder,) = set((run / "evaluate").iterdir()) - before
        scores.append(json.loads((folder / "metrics.json").read_text())["metrics"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
