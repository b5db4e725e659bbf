"""Two processes (gloo) measure and train what one does, and write once."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

from dense_heads.__main__ import main
from dense_heads.ops.batch_norm import BatchNorm2d

TWO = ["trainer.devices=2", "trainer.strategy=ddp"]


def run(arguments):
    environment = {key: value for key, value in os.environ.items() if key != "DENSE_HEADS_RUN_FOLDER"}
    done = subprocess.run(
        [sys.executable, "-m", "dense_heads", *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """The same run in one process and in two; 3 validation images, so that the shares are unequal."""
    folder = tmp_path_factory.mktemp("runs")
    assert main([*tiny, f"run_dir={folder / 'one'}"]) == 0
    run([*tiny, *TWO, f"run_dir={folder / 'two'}"])
    return folder / "one", folder / "two"


def test_two_processes_train_what_one_does(runs):
    one, two = (load_file(folder / "head.safetensors") for folder in runs)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)


def test_pictures_artefact_and_report_are_written_once(runs):
    one, two = ({str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in runs)
    pictures = {name for name in two if name.startswith("pictures/")}
    assert len(pictures) == 2 and pictures < one  # the first process draws what it sees: every second image
    assert one - two == {"pictures/val/pic101.png"}
    assert {"report.html", "card.json", "head.safetensors", "metrics.json"} <= two
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in runs]
    assert [line.split(",")[0] for line in rows[0]] == [line.split(",")[0] for line in rows[1]]


def test_two_processes_fill_and_read_one_cache(runs, tiny, tmp_path):
    """As many views as there are epochs, so that an uncached run in one process sees the same."""
    features = tmp_path / "features"
    cached = [*tiny, *TWO, "cache=disk", "cache.views=4", "cache.dtype=float32", f"cache.dir={features}"]
    run([*cached, f"run_dir={tmp_path / 'cold'}"])
    stored = {path: path.stat().st_mtime_ns for path in features.rglob("*.safetensors")}
    run([*cached, f"run_dir={tmp_path / 'warm'}"])
    assert stored and stored == {path: path.stat().st_mtime_ns for path in features.rglob("*.safetensors")}
    one, cold, warm = (
        load_file(folder / "head.safetensors") for folder in (runs[0], tmp_path / "cold", tmp_path / "warm")
    )
    for key in one:
        assert torch.equal(cold[key], warm[key])
        torch.testing.assert_close(one[key], warm[key], rtol=1e-3, atol=1e-4)


def test_two_processes_count_every_image_once(runs):
    """The same head: equal per-class counts, so equal confusion matrices."""
    trained = runs[0]
    measured = json.loads((trained / "metrics.json").read_text())
    run(["mode=evaluate", f"model={trained}", *TWO])
    (folder,) = (trained / "evaluate").iterdir()
    again = json.loads((folder / "metrics.json").read_text())
    assert again["per_class"] == measured["per_class"]
    assert again["metrics"] == measured["metrics"]


def _normalise_share(rank, port, path, with_gradient):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    norm, x = norm_and_input()
    share = x.chunk(2)[rank].requires_grad_(with_gradient)
    out = norm(share)
    if with_gradient:
        out.square().sum().backward()
    torch.save({"out": out.detach(), "grad": share.grad, "state": norm.state_dict()}, f"{path}{rank}")
    torch.distributed.destroy_process_group()


def norm_and_input():
    generator = torch.Generator().manual_seed(0)
    norm = BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(3, generator=generator))
        norm.bias.copy_(torch.randn(3, generator=generator))
    return norm, 5 + 2 * torch.randn(4, 3, 5, 6, generator=generator)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_batch_norm_over_processes_is_that_of_the_whole_batch(tmp_path, with_gradient):
    norm, x = norm_and_input()
    plain = torch.nn.BatchNorm2d(3)
    plain.load_state_dict(norm.state_dict())
    x.requires_grad_(with_gradient)
    expected = plain(x)
    if with_gradient:
        expected.square().sum().backward()
    port = 29500 + os.getpid() % 400 + with_gradient
    spawn(_normalise_share, args=(port, str(tmp_path / "rank"), with_gradient), nprocs=2)
    shares = [torch.load(f"{tmp_path / 'rank'}{rank}", weights_only=True) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([share["out"] for share in shares]), expected.detach(), rtol=1e-5, atol=1e-5)
    for share in shares:
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(share["state"][key], value)
    if with_gradient:
        torch.testing.assert_close(torch.cat([share["grad"] for share in shares]), x.grad, rtol=1e-4, atol=1e-4)
