"""Heads that were trained on NYU, measured on SUN RGB-D through the command, against a computation by hand."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import dense_heads
from dense_heads.__main__ import main
from dense_heads.heads.linear_depth import LinearDepthHead
from tests.factories import make_nyu_depth, make_sun_rgbd

ON_CPU = ["trainer.accelerator=cpu", "data.num_workers=0"]


def by_hand(model, root):
    """abs_rel and RMSE in the description's order: 640 x 480 and its mirror image, native size, 8 m, native crop."""
    scores = []
    for line in (root / "SUNRGBD_val_splits.txt").read_text().splitlines():
        image, stored = (np.asarray(Image.open(root / name)) for name in line.split())
        depth = np.minimum((stored >> 3) | (stored << 13), 8000).astype(np.float64) / 1000
        small = cv2.resize(image, (640, 480), interpolation=cv2.INTER_LINEAR).astype(np.float64)
        normal = (small - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
        batch = torch.from_numpy(np.stack([normal, normal[:, ::-1]])).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            views = model(batch)
            native = [
                torch.nn.functional.interpolate(view[None, None], size=depth.shape, mode="bilinear")[0, 0]
                for view in views
            ]
        predicted = ((native[0] + native[1].flip(-1)) / 2).numpy().astype(np.float64)
        predicted = np.minimum(predicted, 8.0)[45:471, 41:601]
        depth = depth[45:471, 41:601]
        valid = (depth > 0.001) & (depth < 10)
        error = predicted[valid] - depth[valid]
        scores.append((np.mean(np.abs(error) / depth[valid]), np.sqrt(np.mean(error**2))))
    return np.mean(scores, axis=0)


def test_a_released_head_is_measured_as_published(tmp_path):
    torch.manual_seed(0)
    head = LinearDepthHead([384])
    with torch.no_grad():
        head.conv_depth.weight.mul_(20)  # depths beyond 8 m too, so that the cut matters
        head.conv_depth.bias.copy_(torch.linspace(-2, 4, 256))
    file = tmp_path / "dinov2_vits14_nyu_linear_head.pth"
    torch.save({"state_dict": {f"decode_head.{key}": value for key, value in head.state_dict().items()}}, file)
    root, run = make_sun_rgbd(tmp_path / "data"), tmp_path / "run"
    typed = ["experiment=sun_rgbd_vits14_linear_depth", f"head.weights={file}", "backbone.weights=null"]
    assert main([*typed, *ON_CPU, f"data.root={root}", f"run_dir={run}"]) == 0
    found = json.loads((run / "metrics.json").read_text())
    backbone = dense_heads.load_backbone("vits14", None)
    model = dense_heads.load_head("linear_depth", backbone=backbone, weights=file)
    abs_rel, rmse = by_hand(model, root)
    assert found["metrics"]["test/abs_rel"] == pytest.approx(abs_rel, rel=1e-4)
    assert found["metrics"]["test/rmse_m"] == pytest.approx(rmse, rel=1e-4)
    assert found["blind"] == []  # there is no training part
    published = found["published"]
    assert (published["value"], published["unit"], published["row"]) == (
        0.477,
        "m RMSE",
        "sun_rgbd vits14 linear_depth",
    )
    assert sorted(published["not_comparable"]) == [
        "2 test images, published with 5,050",
        "backbone.weights is None, published with 'official'",
    ]


def test_a_run_of_nyu_is_measured_on_it(tmp_path, capsys):
    nyu, sun = make_nyu_depth(tmp_path / "nyu", train=2, val=2), make_sun_rgbd(tmp_path / "sun")
    run, tiny = tmp_path / "run", ["debug=fast", "data.batch_size=2", "data.image_size=[42,56]"]
    own = ["task=nyu_depth", "backbone=vitn14_reg", "backbone.weights=null", f"data.root={nyu}", f"run_dir={run}"]
    assert main([*own, *tiny, *ON_CPU]) == 0
    assert main(["mode=evaluate", f"model={run}", "task=sun_rgbd", f"data.root={sun}"]) == 0
    (measured,) = (run / "evaluate").iterdir()
    found = json.loads((measured / "metrics.json").read_text())
    assert (found["task"], found["primary"], found["protocol"]["images"]["test"]) == ("sun_rgbd", "test/abs_rel", 2)
    abs_rel, rmse = by_hand(dense_heads.load_model(run), sun)
    assert found["metrics"]["test/abs_rel"] == pytest.approx(abs_rel, rel=1e-4)
    assert found["metrics"]["test/rmse_m"] == pytest.approx(rmse, rel=1e-4)
    assert main(["task=sun_rgbd", *own[1:3], *ON_CPU, f"data.root={sun}", f"run_dir={tmp_path / 'other'}"]) == 2
    assert "it has no training split. Train with task=nyu_depth" in capsys.readouterr().err
