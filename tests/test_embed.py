"""`mode=embed`: the features of any folder of images, as a head would see them."""

import numpy as np
import pytest
import torch

from dense_heads import load_backbone
from dense_heads.__main__ import main
from dense_heads.data.feature_store import CachedDataset
from dense_heads.data.transforms import EvalTransform
from dense_heads.errors import UserError
from tests.factories import fake_pair, save

COMMAND = [
    "mode=embed", "task=segmentation", "task.num_classes=2", "backbone=vitn14_reg", "backbone.weights=null",
    "data.num_workers=0", "task.transforms.eval.short_side=42", "cache.dtype=float32", "backbone.precision=float32",
]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    for name, size in (("a", (48, 64)), ("sub/b", (40, 40)), ("sub/c", (30, 90))):
        save(tmp_path / "images" / f"{name}.png", fake_pair(1, size)[0])
    return tmp_path / "images"


def test_features_are_those_of_the_backbone(images, tmp_path):
    output = tmp_path / "features"
    assert main([*COMMAND, "head=linear4", f"input={images}", f"output={output}"]) == 0
    found = CachedDataset.open(output)
    assert (output / "images.txt").read_text().split() == ["a", "sub/b", "sub/c"]
    backbone = load_backbone("vitn14_reg", None, patch_fit="pad")
    cls_tokens = np.load(output / "cls_tokens.npy")
    for index, name in enumerate(("a", "sub/b", "sub/c")):
        item = found[index]
        assert item["image_id"] == name
        from dense_heads.data.images import read_image

        (view,) = EvalTransform(42)(read_image(images / f"{name}.png"))
        expected = backbone.get_intermediate_layers(view[None], 4, True, True, norm=True)
        (levels,) = item["views"][0].windows
        assert [level.block for level in levels.patch_maps] == [4, 5, 6, 7]
        for (patches, cls), level in zip(expected, levels.patch_maps, strict=True):
            torch.testing.assert_close(levels.patch_maps[level], patches, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(levels.cls_tokens[level], cls, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(cls_tokens[index], levels.cls_tokens[level][0].numpy())


def test_a_file_that_cannot_be_read_is_named_and_stops_nothing(images, tmp_path, capsys):
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no")
    output = tmp_path / "features"
    assert main([*COMMAND, "head=linear", f"input={images}", f"output={output}"]) == 0
    cls_tokens = np.load(output / "cls_tokens.npy")
    assert np.isnan(cls_tokens).all(axis=1).tolist() == [False, True, False, False]
    assert "broken.jpg" in CachedDataset.open(output)[1]["error"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([], "output=FOLDER"),
        (["output=OUT", "head=grid"], "Choose one"),
        (["output=OUT", "input=nowhere"], "does not exist"),
        (["output=OUT", "cache.dtype=int8"], "cache.dtype"),
    ],
)
def test_mistakes_end_with_a_message(images, tmp_path, monkeypatch, capsys, extra, words):
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, "head=linear", f"input={images}", *extra]) == 2
    assert words in capsys.readouterr().err


def test_another_folder_of_images_is_not_written_over(images, tmp_path, capsys):
    command = [*COMMAND, "head=linear", f"input={images}", f"output={tmp_path / 'features'}"]
    assert main(command) == 0
    next((tmp_path / "features").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="shards are missing"):
        CachedDataset.open(tmp_path / "features")
    assert main(command) == 0  # what is missing is computed
    assert len(CachedDataset.open(tmp_path / "features")) == 3
    save(images / "d.png", fake_pair(2)[0])
    assert main(command) == 2
    assert "something else" in capsys.readouterr().err
