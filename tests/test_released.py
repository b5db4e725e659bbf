"""`dense_heads.load_head`: released heads by name, on files of the released layout."""

import numpy as np
import pytest
import torch

import dense_heads


@pytest.fixture(scope="module")
def backbone():
    return dense_heads.load_backbone("vits14", None)


def released(path, num_classes, blocks=1):
    channels = 384 * blocks
    generator = torch.Generator().manual_seed(num_classes)
    head = {
        "bn.weight": torch.ones(channels),
        "bn.bias": torch.zeros(channels),
        "bn.running_mean": torch.zeros(channels),
        "bn.running_var": torch.ones(channels),
        "bn.num_batches_tracked": torch.tensor(5),
        "conv_seg.weight": torch.randn(num_classes, channels, 1, 1, generator=generator),
        "conv_seg.bias": torch.zeros(num_classes),
    }
    torch.save({"state_dict": {f"decode_head.{key}": value for key, value in head.items()}}, path)
    return path


@pytest.mark.parametrize(
    ("name", "dataset", "classes", "window"),
    [("linear", "ade20k", 150, 512), ("linear4", "voc2012", 21, 640)],
)
def test_a_released_segmentation_head_predicts_at_once(tmp_path, backbone, name, dataset, classes, window):
    blocks = 4 if name == "linear4" else 1
    file = released(tmp_path / "renamed.pth", classes, blocks)
    model = dense_heads.load_head(name, backbone=backbone, weights=file)
    assert model.card.task == dataset and len(model.card.classes) == classes
    assert model.inference.window == window and not model.inference.flip and model.transform.scales == (1.0,)
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    model.transform.short_side, model.transform.long_side = 56, None  # the published 512 would take seconds
    labels = model.predict(image)
    assert labels.shape == (40, 60) and labels.dtype == np.int64 and labels.max() < classes
    state = torch.load(file, weights_only=True)["state_dict"]
    assert torch.equal(model.head.conv_seg.weight, state["decode_head.conv_seg.weight"])


def test_mistakes(tmp_path, backbone):
    file = released(tmp_path / "seven.pth", 7)
    with pytest.raises(dense_heads.UserError, match="dataset="):
        dense_heads.load_head("linear", backbone=backbone, weights=file)
    with pytest.raises(dense_heads.UserError, match="needs dataset="):
        dense_heads.load_head("linear", backbone=backbone)
    with pytest.raises(dense_heads.UserError, match="linear4"):
        dense_heads.load_head("linear5", backbone=backbone, dataset="ade20k")
    with pytest.raises(dense_heads.UserError, match="without registers"):
        reg = dense_heads.load_backbone("vits14_reg", None)
        dense_heads.load_head("linear", backbone=reg, weights=released(tmp_path / "a.pth", 150))
