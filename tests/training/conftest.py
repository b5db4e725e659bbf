"""Tiny data and the command that trains on them."""

import pytest

from tests.factories import make_ade20k


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A data set of 7 training and 3 validation images in the ADE20K layout, labels 1..3."""
    return make_ade20k(tmp_path_factory.mktemp("pairs"), train=7, val=3)


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
