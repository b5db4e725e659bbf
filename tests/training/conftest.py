"""Tiny data and the command that trains on them."""

import pytest

from dense_heads.__main__ import main
from tests.factories import fake_pair, make_ade20k, save


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A data set of 7 training and 3 validation images in the ADE20K layout, labels 1..3."""
    return make_ade20k(tmp_path_factory.mktemp("pairs"), train=7, val=3)


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory):
    """A folder of 5 images."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for seed in range(5):
        save(folder / f"{seed}.png", fake_pair(500 + seed)[0])
    return folder


@pytest.fixture(scope="session")
def tiny(pairs):
    """The overrides of a run that takes seconds."""
    return [
        "task=segmentation",
        "task.num_classes=3",
        f"data.root={pairs}",
        "+task.data.format.images='images/{split}'",
        "+task.data.format.masks='annotations/{split}'",
        "task.data.labels.reduce_zero=true",
        "backbone=vitn14_reg",
        "backbone.weights=null",
        "backbone.precision=float32",
        "data.image_size=42",
        "data.batch_size=4",
        "data.num_workers=0",
        "trainer.max_steps=6",
        "trainer.val_check_interval=3",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
        "task.protocol.lr=1e-2",
    ]


@pytest.fixture(scope="session")
def tiny_ssl(tmp_path_factory):
    """Images without labels, a probe of two classes, and a run that takes seconds."""
    root = tmp_path_factory.mktemp("ssl")
    for index in range(7):
        save(root / "images" / f"{index}.png", fake_pair(index)[0])
    for split, num in (("train", 4), ("test", 2)):
        for index in range(num):
            for name, shade in (("dark", 30), ("light", 220)):
                save(root / "probe" / split / name / f"{index}.png", (fake_pair(index)[0] // 8 + shade - 20))
    return [
        "task=pretraining",
        "backbone=vitn14_reg",
        "backbone.weights=null",
        f"data.root={root / 'images'}",
        "data.image_size=42",
        "data.batch_size=4",
        "data.num_workers=0",
        "task.crops.local_size=28",
        "task.crops.num_local=2",
        "task.objective.heads.dino={num_prototypes: 12, hidden_dim: 16, bottleneck_dim: 8}",
        "task.objective.heads.ibot={num_prototypes: 10, hidden_dim: 16, bottleneck_dim: 8}",
        f"task.probe.root={root / 'probe'}",
        "task.probe={ks: [1, 3], resize: 32, crop: 28}",
        "task.backbone={drop_path: 0.1, layer_scale: 1.0}",  # the published 1e-5 has rank 1 in a run this short
        "trainer.max_steps=6",
        "trainer.val_check_interval=3",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
    ]


@pytest.fixture(scope="session")
def pretrained(tiny_ssl, tmp_path_factory):
    """The folder of that run, in all formats."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    formats = "task.formats=[own,official,huggingface]"
    assert main([*tiny_ssl, "task.objective.features=1", formats, f"run_dir={folder}"]) == 0
    return folder
