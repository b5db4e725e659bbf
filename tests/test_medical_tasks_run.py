"""Medical segmentation through the real command: volumes and images, folds, every verb, and a user's mistakes."""

import json

import numpy as np
import pytest
from PIL import Image

import dense_heads
from dense_heads.__main__ import main
from dense_heads.paths import TASKS_DIR
from tests.medical_images import (
    make_cells,
    make_cvc,
    make_drive,
    make_idrid,
    make_isic,
    make_kvasir,
    make_membranes,
    make_vessels,
)
from tests.volumes import affine_of, fake_volume, make_decathlon, make_nnunet, save_dicom, save_nifti

nibabel = pytest.importorskip("nibabel")

TINY = ["backbone=vitn14_reg", "backbone.weights=null", "debug=fast", "trainer.accelerator=cpu", "data.batch_size=2"]
EXACT = ["backbone.precision=float32"]  # the same bits whatever shares a batch
SMALL = [*EXACT, "data.image_size=56", "trainer.limit_val_batches=1.0"]


AS_IT_IS = ["task.transforms.train.scale.short_side=64", "task.transforms.eval.short_side=60"]
WINDOWS = ["task.transforms.train.scale.short_side=80", "task.transforms.eval.short_side=80",
           "task.inference={window: 56, stride: 42}"]  # fmt: skip
TASKS = {
    "hippocampus": (make_decathlon, []),
    "nuclei_medical": (make_cells, AS_IT_IS),
    "chasedb1": (make_vessels, WINDOWS),
    "isbi2012_membrane": (make_membranes, WINDOWS),
    "kvasir_seg": (make_kvasir, AS_IT_IS),
    "cvc_clinicdb": (make_cvc, AS_IT_IS),
    "isic2018": (make_isic, AS_IT_IS),
    "drive": (make_drive, WINDOWS),
    "idrid": (make_idrid, WINDOWS),
}
WITH_TEST = ("isic2018", "drive", "idrid")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Task -> (run folder, data), trained on first use."""
    made = {}

    def run(task):
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            make, own = TASKS[task]
            root = make(folder / "data")
            assert main([f"task={task}", *TINY, *SMALL, *own, f"data.root={root}", f"run_dir={folder / 'run'}"]) == 0
            made[task] = folder / "run", root
        return made[task]

    return run


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_trained_measured_and_measured_again_alike(runs, task):
    run, _ = runs(task)
    found = read_json(run / "metrics.json")
    unit, stage = "mm" if task == "hippocampus" else "px", "test" if task in WITH_TEST else "val"
    assert found["family"] == "medical" and found["primary"] == f"{stage}/dice" and found["direction"] == "max"
    assert 0 <= found["metrics"][f"{stage}/dice"] <= 1 and f"{stage}/hd95_{unit}" in found["metrics"]
    assert (f"{stage}/aji" in found["metrics"]) == (task == "nuclei_medical")
    assert "bootstrap" in found["conventions"] and (run / "report.html").stat().st_size > 1000
    assert list((run / "pictures" / stage).glob("*.png"))
    assert len(found["per_class"]) == len((TASKS_DIR / task / "classes.txt").read_text().splitlines()) - (
        task != "idrid"
    )
    assert main(["mode=evaluate", f"model={run}"]) == 0
    (again,) = (run / "evaluate").iterdir()
    assert read_json(again / "metrics.json")["metrics"] == found["metrics"]


def best_cut(grey):
    """The grey that parts values with the largest variance between both sides."""
    cuts = np.unique(grey)[:-1]
    between = [(grey <= cut).mean() * (grey > cut).mean() * (grey[grey <= cut].mean() - grey[grey > cut].mean()) ** 2
               for cut in cuts]  # fmt: skip
    return cuts[int(np.argmax(between))]


def test_otsus_threshold_stands_beside_the_head(runs):
    """Discs are bright in the training images, so bright is a cell: in validation too, each image by its own cut."""
    run, root = runs("nuclei_medical")
    found = read_json(run / "metrics.json")
    beside, dice = found["threshold"], {}
    for path in (root / "images" / "validation").iterdir():
        grey = np.array(Image.open(path)).astype(float)
        label = np.array(Image.open(root / "annotations" / "validation" / path.name)) == 1
        cell = grey > best_cut(grey)
        dice[path.stem] = 2 * (cell & label).sum() / (cell.sum() + label.sum())
    assert beside["ranges"] == ["background", "nucleus"]
    assert beside["metrics"]["val/dice"] == pytest.approx(np.mean(list(dice.values())))
    assert beside["spread"]["val/dice"]["cases"] == len(dice) == 2
    kept = read_json(run / "cases.json")["threshold"]
    assert {case: row["classes"][0]["dice"] for case, row in kept.items()} == pytest.approx(dice)
    assert set(beside["metrics"]) == set(found["metrics"]) - {"val/ece"} and beside["metrics"]["val/aji"] > 0.3
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "By grey alone" in page and "dark to bright: background, nucleus" in page
    assert read_json(runs("idrid")[0] / "metrics.json")["threshold"] is None  # labels overlap


def test_a_predicted_volume_lies_over_its_input_whatever_the_axes_of_the_file(runs, tmp_path):
    """The same head in permuted, flipped and anisotropic files: the same labels at the same places."""
    run, _ = runs("hippocampus")
    grey, _ = fake_volume(9, (12, 14, 10))
    straight = save_nifti(tmp_path / "in" / "ras.nii.gz", grey, affine_of((1, 1.5, 3)))
    image = nibabel.load(straight)
    for axes in ("LPI", "SRA", "PIL"):
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(axes)
        )  # fmt: skip
        nibabel.save(image.as_reoriented(turn), tmp_path / "in" / f"{axes.lower()}.nii")
    out = tmp_path / "out"
    assert main(["mode=predict", f"model={run}", f"input={tmp_path / 'in'}", f"output={out}"]) == 0
    found = {}
    for source in sorted((tmp_path / "in").iterdir()):
        name = source.name.partition(".")[0]
        theirs, ours = nibabel.load(source), nibabel.load(out / "labels" / f"{name}.nii.gz")
        assert ours.shape == theirs.shape and nibabel.aff2axcodes(ours.affine) == nibabel.aff2axcodes(theirs.affine)
        np.testing.assert_array_equal(ours.affine, theirs.affine)
        found[name] = np.asarray(nibabel.as_closest_canonical(ours).dataobj)
        assert (out / "montages" / f"{name}.png").stat().st_size
        labels = dense_heads.load_model(run).predict(source)
        np.testing.assert_array_equal(labels, np.asarray(ours.dataobj))
    assert len(np.unique(found["ras"])) > 1
    for name, labels in found.items():
        np.testing.assert_array_equal(labels, found["ras"], err_msg=name)


def test_a_dicom_series_is_predicted_as_nifti(runs, tmp_path):
    run, _ = runs("hippocampus")
    series = save_dicom(tmp_path / "in" / "scan", fake_volume(3)[0] % 500)
    assert main(["mode=predict", f"model={run}", f"input={series}", f"output={tmp_path / 'out'}"]) == 0
    labels = nibabel.load(tmp_path / "out" / "labels" / "scan.nii.gz")
    assert labels.shape == (14, 16, 12) and nibabel.aff2axcodes(labels.affine) == ("L", "P", "S")


def test_objects_are_predicted_one_by_one(runs, tmp_path):
    run, root = runs("nuclei_medical")
    source = sorted((root / "images" / "validation").iterdir())[0]
    assert main(["mode=predict", f"model={run}", f"input={source}", f"output={tmp_path}"]) == 0
    objects = np.array(Image.open(tmp_path / "objects" / f"{source.stem}.png"))
    labels = np.array(Image.open(tmp_path / "labels" / f"{source.stem}.png"))
    np.testing.assert_array_equal(objects > 0, labels == 1)
    np.testing.assert_array_equal(objects, dense_heads.load_model(run).predict(source))
    assert Image.open(tmp_path / "overlays" / f"{source.stem}.png").size == Image.open(source).size


def test_labels_that_overlap_are_predicted_one_by_one(runs, tmp_path):
    run, root = runs("idrid")
    source = root / "1. Original Images" / "b. Testing Set" / "IDRiD_60.jpg"
    assert main(["mode=predict", f"model={run}", f"input={source}", f"output={tmp_path}"]) == 0
    labels = dense_heads.load_model(run).predict(source)
    assert labels.shape == (5, 60, 64) and set(np.unique(labels)) <= {0, 1}
    for mask, name in zip(
        labels, ("microaneurysms", "haemorrhages", "hard_exudates", "soft_exudates", "optic_disc"), strict=True
    ):
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "labels" / f"IDRiD_60_{name}.png")), 255 * mask)


def test_own_data_in_nnunets_layout_with_two_modalities(tmp_path):
    root, run = make_nnunet(tmp_path / "data"), tmp_path / "run"
    typed = ["task=medical", "task.num_classes=3", *TINY, *SMALL, f"data.root={root}", f"run_dir={run}"]
    assert main(typed) == 2  # two modalities, three channels
    assert main([*typed, "backbone.in_channels=2", "fold=1"]) == 0
    assert any("fold 1 of 5" in note for note in read_json(run / "metrics.json")["notes"])
    inputs = root / "imagesTs"
    assert main(["mode=predict", f"model={run}", f"input={inputs}", f"output={tmp_path / 'out'}"]) == 0
    assert [path.name for path in (tmp_path / "out" / "labels").iterdir()] == ["pat_100.nii.gz"]
    assert main(["mode=evaluate", f"model={run}"]) == 0


@pytest.mark.parametrize("head", ["prototype", "patch_knn"])
def test_heads_without_training_look_at_their_support(tmp_path, head):
    root, run = make_decathlon(tmp_path / "data"), tmp_path / "run"
    typed = ["task=hippocampus", *TINY, *SMALL, f"head={head}", f"data.root={root}"]
    assert main([*typed, "support=3", f"run_dir={run}"]) == 0
    found = read_json(run / "metrics.json")
    assert found["steps"] == 0 and any("3 labelled images" in note for note in found["notes"])
    assert main(["mode=evaluate", f"model={run}"]) == 0
    (again,) = (run / "evaluate").iterdir()
    assert read_json(again / "metrics.json")["metrics"] == found["metrics"]
    volume = root / "imagesTr" / "case_100.nii.gz"
    assert dense_heads.load_model(run).predict(volume).shape == (14, 16, 12)
    named = tmp_path / "named"
    assert main([*typed, "support=[case_000,case_001_004]", f"run_dir={named}"]) == 0
    assert any("13 labelled images" in note for note in read_json(named / "metrics.json")["notes"])
    assert main([*typed, "support=[nobody]", f"run_dir={tmp_path / 'x'}"]) == 2


def test_cells_without_training_are_told_apart_by_components(tmp_path, capsys):
    run = tmp_path / "run"
    typed = ["task=nuclei_medical", *TINY, *SMALL, *AS_IT_IS, "head=prototype", "support=2", f"run_dir={run}"]
    typed.append(f"data.root={make_cells(tmp_path / 'data')}")
    assert main(typed) == 2
    assert "task.instances.method=components" in capsys.readouterr().err
    assert main([*typed, "task.instances.method=components"]) == 0
    found = read_json(run / "metrics.json")
    assert "val/aji" in found["metrics"] and found["threshold"]["ranges"] == ["background", "nucleus"]


def spoilt(root, how):
    """A data set in which something is wrong; the file that must be named."""
    image, label = root / "imagesTr" / "case_001.nii.gz", root / "labelsTr" / "case_001.nii.gz"
    grey, ids = fake_volume(1)
    if how == "cut":
        image.write_bytes(image.read_bytes()[:-2000])
        return image
    if how == "shape":
        return save_nifti(label, ids[:-1])
    if how == "affine":
        return save_nifti(label, ids, affine_of(axes="LAS"))
    if how == "value":
        return save_nifti(label, np.where(ids == 2, 7, ids).astype(np.uint8))
    return save_nifti(image, np.full_like(grey, np.nan))


@pytest.mark.parametrize("how", ["cut", "shape", "affine", "value", "nan"])
def test_a_broken_volume_is_named_before_training(tmp_path, capsys, how):
    root = make_decathlon(tmp_path / "data")
    path = spoilt(root, how)
    run = tmp_path / "run"
    assert main(["task=hippocampus", *TINY, *SMALL, f"data.root={root}", f"run_dir={run}"]) == 2
    assert str(path) in capsys.readouterr().err and not run.exists()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["task.data.patients.pattern='case_..(.)'"], "patient 0: case_000"),
        (["task.data.patients.pattern='patient_(.)'"], "does not match"),
        (["fold=7"], "0 to 4"),
        (["task.data.plane=axle"], "axial"),
        (["task.data.slices=3d"], "2.5d"),
        (["support=5"], "head=prototype"),
        (["task.data.kind=films"], "volumes"),
    ],
)
def test_mistakes_end_before_training(tmp_path, capsys, typed, words):
    root = make_decathlon(tmp_path / "data")
    assert main(["task=hippocampus", *TINY, *SMALL, f"data.root={root}", f"run_dir={tmp_path / 'run'}", *typed]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_all_folds_run_over_one_cache_and_become_one_result(tmp_path, capsys):
    root, run = make_decathlon(tmp_path / "data", train=6, val=0), tmp_path / "run"
    cache = ["cache=disk", "cache.views=0", f"cache.dir={tmp_path / 'cache'}"]
    typed = ["task=hippocampus", *TINY, *SMALL, *cache, "task.data.folds.num=3", f"data.root={root}"]
    assert main([*typed, "fold=all", f"run_dir={run}"]) == 0
    found = read_json(run / "metrics.json")
    kept = [read_json(run / f"fold{k}" / "cases.json")["cases"] for k in range(3)]
    assert sorted(case for one in kept for case in one) == [f"case_{i:03d}" for i in range(6)]
    dice = [np.mean([row["dice"] for row in case["classes"]]) for one in kept for case in one.values()]
    assert found["metrics"]["val/dice"] == pytest.approx(np.mean(dice))
    assert found["spread"]["val/dice"]["std"] == pytest.approx(np.std(dice, ddof=1))
    assert found["spread"]["val/dice"]["cases"] == 6 and len(found["folds"]) == 3
    assert len((run / "cases.csv").read_text().splitlines()) == 1 + 6 * 3  # all, and each of two classes
    assert sorted(read_json(run / "cases.json")["threshold"]) == [f"case_{i:03d}" for i in range(6)]
    each = [read_json(run / f"fold{k}" / "metrics.json")["threshold"]["metrics"]["val/dice"] for k in range(3)]
    assert found["threshold"]["metrics"]["val/dice"] == pytest.approx(np.mean(each))  # folds of two cases each
    assert len(list((tmp_path / "cache").iterdir())) == 2  # training and evaluation, for all folds
    folds = read_json(run / "splits_final.json")
    assert [sorted(fold["val"]) for fold in folds] == [sorted(one) for one in kept]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "fold 2" in page and "95 % interval" in page and "case_005" in page
    # One fold by itself is the same run, with or without the cache's other folds; and it can be measured again.
    alone = tmp_path / "alone"
    assert main([*typed, "fold=1", f"run_dir={alone}"]) == 0
    assert read_json(alone / "metrics.json")["metrics"] == read_json(run / "fold1" / "metrics.json")["metrics"]
    assert main(["mode=evaluate", f"model={run / 'fold1'}"]) == 0
    (again,) = (run / "fold1" / "evaluate").iterdir()
    assert read_json(again / "metrics.json")["metrics"] == read_json(run / "fold1" / "metrics.json")["metrics"]
    # A run that was stopped goes on with the folds that are missing.
    (run / "fold2" / "report.html").unlink()
    before = (run / "fold0" / "report.html").stat().st_mtime_ns
    assert main([f"resume={run}"]) == 0
    assert (run / "fold0" / "report.html").stat().st_mtime_ns == before
    assert read_json(run / "metrics.json")["metrics"] == found["metrics"]


def test_an_nnunet_split_is_used_as_it_is(tmp_path):
    root = make_decathlon(tmp_path / "data", train=4, val=0)
    folds = [{"train": ["case_000", "case_001"], "val": ["case_003"]}, {"train": ["case_003"], "val": ["case_000"]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    run = tmp_path / "run"
    assert main(["task=hippocampus", *TINY, *SMALL, f"data.root={root}", "fold=1", f"run_dir={run}"]) == 0
    assert list(read_json(run / "cases.json")["cases"]) == ["case_000"]
    assert any("splits_final.json" in note for note in read_json(run / "metrics.json")["notes"])


def test_a_grid_of_heads_over_the_cache(tmp_path):
    root, run = make_decathlon(tmp_path / "data"), tmp_path / "run"
    grid = ["head=grid", "head.heads=[linear,linear4]", "head.lr=[1e-2]", "cache=memory", "cache.views=2"]
    assert main(["task=hippocampus", *TINY, *SMALL, *grid, f"data.root={root}", f"run_dir={run}"]) == 0
    rows = (run / "grid.csv").read_text().splitlines()
    assert len(rows) == 3 and "val/dice" in rows[0] and (run / "cases.csv").is_file()


def test_slices_with_something_on_them_are_drawn_as_often_as_said():
    from dense_heads.data.sampler import StepBatchSampler

    groups = [[1] if index % 10 == 0 else [] for index in range(200)]  # one in ten holds foreground
    drawn = StepBatchSampler(200, 20, seed=3, max_steps=100, groups=groups, shares=[0.3, 0.7])
    share = np.mean([index % 10 == 0 for batch in drawn for _, index in batch])
    assert share == pytest.approx(0.7, abs=0.03)
    again = StepBatchSampler(200, 20, seed=3, max_steps=100, start_step=50, groups=groups, shares=[0.3, 0.7])
    assert list(again) == list(drawn)[50:]  # a function of the seed and the step


def test_foreground_neighbours_deep_supervision_and_refinement_together(tmp_path, capsys):
    root, run = make_decathlon(tmp_path / "data"), tmp_path / "run"
    typed = ["task=hippocampus", *TINY, *SMALL, f"data.root={root}", f"run_dir={run}"]
    assert main([*typed, "task.data.foreground=1.5"]) == 2
    assert "between 0 and 1" in capsys.readouterr().err
    data = ["task.data.foreground=0.67", "task.data.slices=2.5d"]
    head = ["head=dpt", "head.channels=16", "head.deep_supervision=0.5"]
    refine = ["task.refine.components=largest", "task.refine.guided_radius=2"]
    assert main([*typed, *data, *head, *refine]) == 0
    from safetensors.torch import load_file

    assert any(key.startswith("deep.") for key in load_file(run / "head.safetensors"))
    assert main(["mode=evaluate", f"model={run}"]) == 0
    (again,) = (run / "evaluate").iterdir()
    assert read_json(again / "metrics.json")["metrics"] == read_json(run / "metrics.json")["metrics"]
