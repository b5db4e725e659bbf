"""scripts/patch_cost.py: what is left of a label that is seen patch by patch."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dense_heads.models.inference import Inference
from tests.medical_images import make_vessels

SCRIPT = Path(__file__).parents[2] / "scripts" / "patch_cost.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("patch_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("inference", [Inference(), Inference(window=56, stride=42)])
def test_what_ends_with_a_patch_is_kept_and_a_line_is_lost_until_it_is_as_wide_as_a_patch(script, inference):
    half, line = torch.zeros(56, 70), torch.zeros(56, 70)
    half[:, :28], line[20] = 1, 1
    as_it_is, enlarged = torch.zeros(3, 56, 70), torch.zeros(3, 56 * 14, 70 * 14)
    assert torch.equal(script.perfect(half, as_it_is, inference) > 0.5, half == 1)
    assert not (script.perfect(line, as_it_is, inference) > 0.5).any()
    if inference.window is None:
        assert torch.equal(script.perfect(line, enlarged, inference) > 0.5, line == 1)


def test_pixels_without_a_label_count_nowhere(script):
    mask = torch.tensor([[0, 1, 255, 255]])
    found = torch.tensor([[0.1, 0.7, 0.9, 0.9]])
    at_half = int(abs(script.THRESHOLDS - 0.5).argmin())
    assert list(script.dices(found, mask))[at_half] == 1


def test_larger_images_lose_less(script, tmp_path, capsys, monkeypatch):
    root = make_vessels(tmp_path)
    typed = ["chasedb1", f"data.root={root}", "task.inference={window: 56, stride: 42}", "--short-sides", "60", "240"]
    monkeypatch.setattr("sys.argv", ["patch_cost", *typed])
    script.main()
    small, large = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert small[0] == "60" and large[0] == "240" and float(small[1]) < float(large[1]) <= float(large[2]) <= 1
