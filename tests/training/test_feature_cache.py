"""The feature cache through the real command: the same results, never a stale read, nothing lost to a kill."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from dense_heads.__main__ import main
from dense_heads.training import feature_cache
from tests.factories import make_depth_folders

ALONE = "data.batch_size=1"  # one image in a pass: the features have the same bits whatever the cache does


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(feature_cache, "_in_memory", {})


@pytest.fixture
def cached(tiny, tmp_path):
    """Overrides of a tiny run with a cache of its own."""
    return [*tiny, "cache=disk", "cache.dtype=float32", "cache.batch=1", f"cache.dir={tmp_path / 'features'}"]


def trained(run, *overrides):
    assert main([*overrides, f"run_dir={run}"]) == 0
    return load_file(run / "head.safetensors"), json.loads((run / "metrics.json").read_text())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def shards(folder):
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("*/*.safetensors"))}


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_without_augmentation_a_cached_run_ends_with_the_bits_of_an_uncached_one(tiny, cached, tmp_path, kind):
    head, found = trained(tmp_path / "off", *tiny, ALONE, "data.augment=false")
    there = [*cached, ALONE, f"cache.kind={kind}", "cache.views=0"]
    for state in ("cold", "warm"):
        ours, measured = trained(tmp_path / state, *there)
        assert same(ours, head)
        assert measured["metrics"] == found["metrics"] and measured["per_class"] == found["per_class"]
    assert "Trained without augmentation (cache.views=0)." in measured["notes"]
    assert (tmp_path / "warm" / "pictures" / "val" / "pic100.png").is_file()


def test_augmented_views_are_those_that_an_uncached_run_would_see(tiny, cached, tmp_path):
    """7 images, 14 steps of one: two epochs, so each of two views is seen once; one view is not enough."""
    long = [ALONE, "trainer.max_steps=14", "trainer.val_check_interval=14"]
    head, _ = trained(tmp_path / "off", *tiny, *long)
    two, measured = trained(tmp_path / "two", *cached, *long, "cache.views=2")
    one, _ = trained(tmp_path / "one", *cached, *long, "cache.views=1")
    assert same(two, head) and not same(one, head)
    assert any("2 cached view(s)" in note for note in measured["notes"])


def test_windows_flips_and_several_scales_are_cached_for_evaluation(tiny, cached, tmp_path):
    looks = [
        "task.inference.window=42", "task.inference.stride=28", "task.inference.flip=true",
        "task.transforms.eval={short_side:56,long_side:null,scales:[1.0,1.5]}", "data.augment=false",
    ]  # fmt: skip
    head, found = trained(tmp_path / "off", *tiny, *looks, ALONE, "task.inference.window_batch=1")
    ours, measured = trained(tmp_path / "on", *cached, *looks, ALONE, "task.inference.window_batch=1")
    assert same(ours, head) and measured["per_class"] == found["per_class"]


def test_a_grid_and_several_candidates_read_one_cache(tiny, cached, tmp_path):
    grid = ["head=grid", "head.heads=[linear,linear4]", "head.lr=[1e-2]", ALONE]
    off, _ = trained(tmp_path / "off", *tiny, *grid, "data.augment=false")
    on, _ = trained(tmp_path / "on", *cached, *grid, "cache.views=0")
    assert same(on, off)
    assert (tmp_path / "on" / "grid.csv").read_text() == (tmp_path / "off" / "grid.csv").read_text()


def test_bfloat16_is_half_the_size_and_nearly_the_same(cached, tmp_path):
    _, full = trained(tmp_path / "full", *cached, "cache.views=0")
    _, half = trained(
        tmp_path / "half", *cached, "cache.views=0", "cache.dtype=bfloat16", f"cache.dir={tmp_path / 'halves'}"
    )
    size, half_size = (
        sum(path.stat().st_size for path in folder.glob("*val*/*.safetensors"))
        for folder in (tmp_path / "features", tmp_path / "halves")
    )
    assert half_size < 0.6 * size
    assert half["metrics"]["val/miou"] == pytest.approx(full["metrics"]["val/miou"], abs=0.02)


def test_depth_is_cached_too(tmp_path):
    data = make_depth_folders(tmp_path / "data")
    tiny = [
        "task=depth", f"data.root={data}", "backbone=vitn14_reg", "backbone.weights=null", "head=linear_depth",
        "data.image_size=[42,56]", "data.batch_size=1", "data.num_workers=0", "trainer.max_steps=4",
        "trainer.accelerator=cpu", "data.augment=false", "task.inference.window_batch=1",
        "+task.data.format.splits={train:training,val:validation}",
    ]  # fmt: skip
    head, found = trained(tmp_path / "off", *tiny)
    ours, measured = trained(tmp_path / "on", *tiny, "cache=memory", "cache.dtype=float32", "cache.batch=1")
    assert same(ours, head) and measured["metrics"] == found["metrics"]


def test_chance_without_a_word_on_views_is_refused(cached, capsys):
    assert main(cached) == 2
    message = capsys.readouterr().err
    assert "cache.views=K" in message and "cache.views=0" in message and "photometric" in message


@pytest.mark.parametrize(
    "wrong", ["cache.views=-1", "cache.views=1.5", "cache.dtype=int8", "cache.kind=tape", "cache.batch=0"]
)
def test_values_that_make_no_sense_are_refused(cached, capsys, wrong):
    assert main([*cached, wrong]) == 2
    assert wrong.split("=")[0] in capsys.readouterr().err


def test_a_cache_that_does_not_fit_is_refused_with_the_numbers(cached, capsys, monkeypatch):
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    assert main([*cached, "cache.views=3"]) == 2
    message = capsys.readouterr().err
    assert "21 x " in message and "100 kB are free" in message and "cache.views" in message


def test_whatever_features_depend_on_makes_another_cache(pairs, cached, tmp_path):
    """A second run reads what is there; a change of any part is computed anew."""
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    base = [*cached, "cache.views=0", f"data.root={data}", "trainer.max_steps=1", "trainer.val_check_interval=1"]
    features = tmp_path / "features"
    trained(tmp_path / "first", *base)
    before = shards(features)
    trained(tmp_path / "second", *base, "optim.lr=0.5", "data.batch_size=2")  # nothing that features depend on
    assert shards(features) == before
    changes = [
        "backbone.seed=1", "cache.dtype=bfloat16", "data.image_size=56", "head=linear", "backbone.patch_fit=pad_exact",
        "task.transforms.eval.short_side=50", "cache.views=2", "task.inference.flip=true",
        "task.data.labels.ignore=[3]",
    ]  # fmt: skip
    for number, change in enumerate(changes):
        folders = {path.name for path in features.iterdir()}
        trained(tmp_path / f"changed{number}", *base, change)
        assert {path.name for path in features.iterdir()} > folders, change
    image = next((data / "images" / "training").iterdir())
    image.write_bytes(image.read_bytes() + b"\0")  # another file of the same name
    folders = {path.name for path in features.iterdir()}
    trained(tmp_path / "file", *base)
    assert len({path.name for path in features.iterdir()} - folders) == 1  # of training alone


def test_a_flipped_byte_is_named_and_computed_again(cached, tmp_path):
    run = [*cached, ALONE, "cache.views=0"]
    head, _ = trained(tmp_path / "first", *run)
    before = shards(tmp_path / "features")
    path = next((tmp_path / "features").glob("*train*/*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)
    done = subprocess.run(command([*run, f"run_dir={tmp_path / 'second'}"]), capture_output=True, text=True, check=True)
    assert path.name in done.stderr and "computed again" in done.stderr
    again = load_file(tmp_path / "second" / "head.safetensors")
    assert same(again, head) and shards(tmp_path / "features").keys() == before.keys()


def command(arguments):
    return [sys.executable, "-m", "dense_heads", *arguments]


@pytest.fixture
def long(cached):
    """A pass that takes a while: many small shards."""
    return [*cached, "cache.shard_mb=0", "cache.views=6", "trainer.max_steps=3", "trainer.val_check_interval=3"]


def test_a_pass_killed_again_and_again_loses_only_what_was_under_way(long, tmp_path):
    features = tmp_path / "features"
    moments = random.Random(int(time.time()))
    kept = []
    for _ in range(2):
        process = subprocess.Popen(command([*long, f"run_dir={tmp_path / 'killed'}"]), stderr=subprocess.DEVNULL)
        start = len(list(features.glob("*train*/*.safetensors")))
        more = moments.randint(1, 15)
        while len(list(features.glob("*train*/*.safetensors"))) < start + more and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(shards(features))
    done = subprocess.run(command([*long, f"run_dir={tmp_path / 'run'}"]), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    final = shards(features)
    assert all(final[name] == when for before in kept for name, when in before.items())  # what was whole stayed
    assert len(final) == 6 * 7 + 3
    assert not list(features.glob("*/locks")) and not list(features.glob("*/.0*"))
    whole = {path.name for path in features.glob("*/*.safetensors")}
    clean = tmp_path / "clean"
    theirs, _ = trained(tmp_path / "other", *long, f"cache.dir={clean}")
    assert {path.name for path in clean.glob("*/*.safetensors")} == whole  # names hold checksums: the same bytes
    assert same(load_file(tmp_path / "run" / "head.safetensors"), theirs)


def test_two_processes_share_the_work(long, tmp_path):
    both = [
        subprocess.Popen(command([*long, f"run_dir={tmp_path / name}"]), stderr=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    outputs = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    ours, theirs = (load_file(tmp_path / name / "head.safetensors") for name in ("one", "two"))
    assert same(ours, theirs)
    assert len(shards(tmp_path / "features")) == 6 * 7 + 3
