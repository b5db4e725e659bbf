"""Many heads on one stream of features: independent of one another, bit for bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dense_heads.__main__ import main
from dense_heads.errors import UserError
from dense_heads.training.checkpoints import load_checkpoint

GRID = ["head=grid", "head.heads=[linear,linear4]", "head.lr=[1e-2]"]


def heads_of(run):
    """Candidate name -> its tensors, from the newest checkpoint."""
    checkpoint = load_checkpoint(sorted((run / "checkpoints").glob("step=*.ckpt"))[-1])
    found = {}
    for key, tensor in checkpoint["state_dict"].items():
        part, index, name = key.split(".", 2)
        if part == "heads":
            found.setdefault(int(index), {})[name] = tensor
    return found


def test_a_head_trains_alike_alone_and_in_a_grid(tiny, tmp_path):
    assert main([*tiny, *GRID, "head.weight_decay=[1e-4,0]", f"run_dir={tmp_path / 'grid'}"]) == 0
    alone = [*GRID, "head.heads=[linear4]", "head.weight_decay=[0]"]
    assert main([*tiny, *alone, f"run_dir={tmp_path / 'alone'}"]) == 0
    grid, single = heads_of(tmp_path / "grid"), heads_of(tmp_path / "alone")
    assert len(grid) == 4 and len(single) == 1
    assert all(torch.equal(grid[3][name], single[0][name]) for name in single[0])  # linear4, weight decay 0
    plain = ["head=linear4", "optim.lr=1e-2", "optim.weight_decay=0"]  # no grid at all
    assert main([*tiny, *plain, f"run_dir={tmp_path / 'plain'}"]) == 0
    assert all(torch.equal(heads_of(tmp_path / "plain")[0][name], single[0][name]) for name in single[0])
    table = (tmp_path / "grid" / "grid.csv").read_text().splitlines()
    assert len(table) == 5 and "val/miou" in table[0]
    winner = load_file(tmp_path / "grid" / "head.safetensors")
    best = table[1]
    index = [f"head={h} lr=0.01 weight_decay={w}" for h in ("linear", "linear4") for w in ("0.0001", "0")]
    chosen = next(i for i, name in enumerate(index) if f",{name}," in best or best.split(",")[1] == name)
    assert all(torch.equal(winner[name], grid[chosen][name]) for name in winner)


def test_a_candidate_that_diverges_is_retired_and_disturbs_nobody(tiny, tmp_path):
    lone = [*GRID, "head.heads=[linear]"]
    assert main([*tiny, *lone, f"run_dir={tmp_path / 'sound'}"]) == 0
    both = [*lone, "head.lr=[1e-2,1e36]"]
    assert main([*tiny, *both, f"run_dir={tmp_path / 'both'}"]) == 0
    sound, both = heads_of(tmp_path / "sound"), heads_of(tmp_path / "both")
    assert all(torch.equal(sound[0][name], both[0][name]) for name in sound[0])
    rows = (tmp_path / "both" / "grid.csv").read_text().splitlines()
    assert "1e+36" in rows[-1] and rows[-1].rsplit(",", 1)[-1].isdigit()
    assert rows[1].endswith(",")


def test_a_lone_head_that_diverges_ends_with_a_message(tiny, tmp_path, capsys):
    assert main([*tiny, "task.protocol.lr=1e36", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "Lower optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize("extra", ["head.lr=[1e-2,1e-2]", "head.heads=[linear,nosuch]"])
def test_a_grid_that_makes_no_sense_is_refused(tiny, tmp_path, capsys, extra):
    assert main([*tiny, *GRID, extra, f"run_dir={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert "twice" in err or "Unknown head 'nosuch'" in err


def test_the_best_checkpoint_and_the_best_candidate_are_measured_on_the_test_split(tiny, pairs, tmp_path):
    """`select=best` puts each candidate's best step back; validation, not the test, says who leads."""
    root = tmp_path / "data"
    shutil.copytree(pairs, root)
    for kind in ("images", "annotations"):
        shutil.copytree(root / kind / "validation", root / kind / "test")
        for path in (root / kind / "test").iterdir():
            path.rename(path.with_stem(f"test-{path.stem}"))
    run = tmp_path / "run"
    chosen = [f"data.root={root}", "task.protocol.select=best", "head.lr=[1e-9,1e-2]", f"run_dir={run}"]
    assert main([*tiny, *GRID, "head.heads=[linear]", *chosen]) == 0
    found = json.loads((run / "metrics.json").read_text())
    assert found["primary"] == "test/miou" and found["head"]["candidate"] == "head=linear lr=0.01"
    assert torch.equal(
        load_file(run / "head.safetensors")["conv_seg.weight"],
        load_file(run / "checkpoints/best.safetensors")["1.conv_seg.weight"],
    )


def test_a_baseline_that_fails_costs_nothing(tiny, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise UserError("no such thing")

    monkeypatch.setattr("dense_heads.modes.fit.recomposed", fails)
    run = tmp_path / "run"
    assert main([*tiny, "task.baseline=pixels", f"run_dir={run}"]) == 0
    found = json.loads((run / "metrics.json").read_text())
    assert found["baseline"] is None and any("no such thing" in note for note in found["notes"])


def test_a_baseline_stands_beside_the_score(tiny, tmp_path):
    run = tmp_path / "run"
    assert main([*tiny, "task.baseline=pixels", f"run_dir={run}"]) == 0
    baseline = json.loads((run / "metrics.json").read_text())["baseline"]
    assert baseline["name"] == "raw pixels" and 0 <= baseline["metrics"]["val/miou"] <= 1
