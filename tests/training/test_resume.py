"""A killed run goes on and ends with the same bits as one that was never stopped."""

import csv
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from dense_heads.__main__ import main
from dense_heads.errors import UserError
from dense_heads.training.checkpoints import load_checkpoint, newest_checkpoint
from dense_heads.training.progress import Progress
from dense_heads.training.segmentation import SegmentationModule

STEPS = 24
# Two candidates with dropout, augmentation by default, two loader processes; 7 images in batches of 4, so that an epoch
# ends in the middle of a batch; a checkpoint every 5 steps, validations in between.
HARD = [
    "head=grid",
    "head.heads=[linear,linear4]",
    "head.lr=[1e-2]",
    "+head.arguments.dropout=0.2",
    "data.num_workers=2",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=8",
    "callbacks.checkpoints.every=5",
    "data.image_size=70",
]


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "dense_heads", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_after(process, run, step):
    """Kill -9 as soon as the run has written a checkpoint at or beyond `step`, a moment later."""
    late, done = time.monotonic() + 240, 0
    while done < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < late, f"not at step {step} by now"
        time.sleep(0.02)
        done = max((int(path.stem.split("=")[1]) for path in (run / "checkpoints").glob("step=*.ckpt")), default=0)
    time.sleep(0.15)  # into the steps that follow the checkpoint
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("cache", ["off", "disk", "memory"])
def test_a_killed_run_ends_with_the_same_bits(tiny, tmp_path, cache):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [*tiny, *HARD]
    if cache != "off":
        arguments += [f"cache={cache}", "cache.views=2", f"cache.dir={tmp_path / 'features'}"]
    reference = start([*arguments, f"run_dir={whole}"])
    process = start([*arguments, f"run_dir={killed}"])
    kill_after(process, killed, step=5)
    assert not (killed / "head.safetensors").exists()
    kill_after(start([f"resume={killed}"]), killed, step=15)
    last = start([f"resume={killed}"])
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output
    assert "going on from step" in output
    assert reference.wait(timeout=300) == 0, reference.communicate()[0]

    ours, theirs = load_file(killed / "head.safetensors"), load_file(whole / "head.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    states = [load_checkpoint(run / "checkpoints" / f"step={STEPS:08d}.ckpt") for run in (killed, whole)]
    for one, other in zip(*[list(tensors(state["optimizer_states"])) for state in states], strict=True):
        assert torch.equal(one, other)
    for name in ("metrics.csv", "grid.csv"):
        assert (killed / name).read_text() == (whole / name).read_text()


class Killed(BaseException):
    """Nothing on the way catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_validation_that_was_cut_off_is_made_up(tiny, tmp_path, monkeypatch, select):
    """Also where a checkpoint is due at the validation's own step, and at the last one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    typed = [*tiny, "callbacks.checkpoints.every=1", f"task.protocol.select={select}"]
    assert main([*typed, f"run_dir={whole}"]) == 0
    finish = SegmentationModule.on_validation_epoch_end
    for step in (3, 6):

        def cut_off(self, step=step):
            if self.global_step == step:
                raise Killed
            finish(self)

        monkeypatch.setattr(SegmentationModule, "on_validation_epoch_end", cut_off)
        with pytest.raises(Killed):
            main([*typed, f"run_dir={killed}", "resume=auto"])
    monkeypatch.setattr(SegmentationModule, "on_validation_epoch_end", finish)
    assert main([*typed, f"run_dir={killed}", "resume=auto"]) == 0
    assert (killed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    for name in ("head.safetensors", "checkpoints/best.safetensors"):
        ours, theirs = load_file(killed / name), load_file(whole / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def tensors(node):
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, dict | list | tuple):
        for item in node.values() if isinstance(node, dict) else node:
            yield from tensors(item)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "run"
    assert main([*tiny, "callbacks.checkpoints.every=2", f"run_dir={run}"]) == 0
    return run


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_bar_of_a_resumed_run_ends_where_the_run_does(tiny, tmp_path, monkeypatch, accumulate):
    shown = []
    finish = Progress.on_train_epoch_end

    def look(self, *arguments):
        finish(self, *arguments)
        shown.append((self.train_progress_bar.completed, self.train_progress_bar.total))

    monkeypatch.setattr(Progress, "on_train_epoch_end", look)
    run = tmp_path / "run"
    typed = ["trainer.max_steps=3", "callbacks.checkpoints.every=1", f"trainer.accumulate_grad_batches={accumulate}"]
    assert main([*tiny, *typed, f"run_dir={run}"]) == 0
    (run / "checkpoints" / "step=00000003.ckpt").unlink()
    assert main([f"resume={run}"]) == 0
    assert shown == [(3 * accumulate, 3 * accumulate)] * 2


def test_a_spoilt_newest_checkpoint_gives_way_to_the_one_before(finished, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    found = sorted((finished / "checkpoints").glob("step=*.ckpt"))
    assert len(found) == 2  # the last two are kept
    for path in found:
        (folder / path.name).write_bytes(path.read_bytes())
    newest = folder / found[-1].name
    newest.write_bytes(newest.read_bytes()[:1000])
    assert newest_checkpoint(folder).name == found[0].name
    (folder / found[0].name).write_bytes(b"")
    with pytest.raises(UserError, match="none of them whole"):
        newest_checkpoint(folder)


def test_a_checkpoint_holds_no_backbone_and_no_code(finished, tmp_path):
    checkpoint = load_checkpoint(newest_checkpoint(finished / "checkpoints"))
    assert not any("backbone" in key for key in checkpoint["state_dict"])

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    torch.save({"state_dict": {}, "x": Hostile()}, tmp_path / "step=00000001.ckpt")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path / "step=00000001.ckpt")
    assert not (tmp_path / "opened").exists()


def test_a_finished_run_is_trained_longer(finished, tiny):
    assert main([f"resume={finished}", "trainer.max_steps=8"]) == 0
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert [float(row["lr"]) for row in rows[6:]] == pytest.approx([1e-2 * (1 - 6 / 8), 1e-2 * (1 - 7 / 8)])
    before, after = (load_checkpoint(finished / "checkpoints" / f"step={n:08d}.ckpt")["state_dict"] for n in (6, 8))
    assert not torch.equal(before["heads.0.conv_seg.weight"], after["heads.0.conv_seg.weight"])


def test_a_resumed_run_cannot_become_another_one(finished, capsys):
    assert main([f"resume={finished}", "optim.lr=1", "data.image_size=56"]) == 2
    message = capsys.readouterr().err
    assert "optim.lr" in message and "data.image_size" in message


def test_resume_of_nothing_is_refused(tmp_path, capsys):
    assert main([f"resume={tmp_path}"]) == 2
    assert "no run is there" in capsys.readouterr().err


def test_resume_auto_starts_and_goes_on(tiny, tmp_path):
    auto = [*tiny, f"run_dir={tmp_path / 'run'}", "resume=auto"]
    assert main([*auto, "trainer.max_steps=3"]) == 0
    first = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert main([*auto, "trainer.max_steps=6"]) == 0
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:3] == first[1:3]
    assert main([*tiny, f"run_dir={tmp_path / 'run'}"]) == 2  # not without saying so


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_from_the_cluster_writes_a_checkpoint(tiny, tmp_path, sent):
    run = tmp_path / "run"
    never = ["callbacks.checkpoints.every=100000", "trainer.val_check_interval=100000", "trainer.max_steps=100000"]
    process = start([*tiny, *never, f"run_dir={run}"])
    for _ in range(9000):  # a machine with other work may take a minute to start
        if (run / "metrics.csv").exists() and len((run / "metrics.csv").read_text().splitlines()) > 3:
            break
        time.sleep(0.05)
    process.send_signal(sent)
    for _ in range(200):
        if any((run / "checkpoints").glob("step=*.ckpt")):
            break
        time.sleep(0.05)
    if sent == signal.SIGUSR1:
        assert process.poll() is None  # it goes on
        process.kill()
    output = process.communicate(timeout=60)[0]
    assert load_checkpoint(newest_checkpoint(run / "checkpoints"))["global_step"] > 0
    if sent == signal.SIGTERM:
        assert f"go on with resume={run}" in output and "Traceback" not in output


def test_accumulated_steps_are_counted_and_never_cut_in_two(tiny, tmp_path):
    """Two batches of 4 a step: validations and checkpoints fall on whole steps, and a resumed run is the same run."""
    accumulated = ["trainer.accumulate_grad_batches=2", "callbacks.checkpoints.every=2", "trainer.val_check_interval=3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*tiny, *accumulated, f"run_dir={whole}"]) == 0
    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["val/miou"]] == [3, 6]
    assert sorted(path.name for path in (whole / "checkpoints").glob("*.ckpt")) == [
        "step=00000004.ckpt",
        "step=00000006.ckpt",
    ]
    assert main([*tiny, *accumulated, f"run_dir={cut}"]) == 0
    (cut / "checkpoints" / "step=00000006.ckpt").unlink()
    assert main([f"resume={cut}"]) == 0
    ours, theirs = load_file(cut / "head.safetensors"), load_file(whole / "head.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_job_that_the_cluster_starts_again_goes_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    own = [*tiny, f"output_dir={tmp_path}"]
    assert main([*own, "trainer.max_steps=3"]) == 0
    (run,) = tmp_path.glob("segmentation/*/*")
    assert run.name == "job-7.0"
    assert main(own) == 2  # not by accident
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(own) == 0
    assert [row["step"] for row in csv.DictReader((run / "metrics.csv").open())] == list("123456")
    assert main([*own, "optim.lr=0.5"]) == 2  # another run is not the same run gone on
