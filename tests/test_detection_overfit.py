"""The set-prediction head learns sixteen images by heart, through the real command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dense_heads.__main__ import main
from dense_heads.data.datasets.scene_detection import SceneDetection
from dense_heads.ops import masks
from tests.factories import coco_of, save

SIZE = (120, 160)


def sixteen_scenes(root):
    """Rooms with at most eight solids, as COCO JSON; validation is a copy of training, which a link could not be."""
    reader, scenes = SceneDetection(root / "scenes", num_train=24, num_val=1, size=SIZE), []
    for sample in reader.samples("train"):
        if 0 < len(sample.objects) <= 8 and len(scenes) < 16:
            image, objects = np.array(Image.open(sample.image)), sample.objects
            outlines = np.stack([masks.decode(code, SIZE) for code in objects.codes()])
            for split in ("train", "val"):
                save(root / "coco" / split / f"{sample.image_id}.png", image)
            scenes.append((f"{sample.image_id}.png", (image, objects.boxes, objects.labels, outlines)))
    assert len(scenes) == 16
    (root / "coco" / "annotations").mkdir()
    for split in ("train", "val"):
        path = root / "coco" / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(coco_of(scenes, category_ids=(1, 2), classes=("box", "sphere"))))
    return root / "coco"


@pytest.mark.slow
def test_plain_detr_learns_sixteen_images_by_heart(tmp_path):
    """Measured where it was trained. Random features of the smallest ViT, cached; about four minutes."""
    torch.set_num_threads(1)
    typed = [
        "task=detection", "head=plain_detr", "backbone=vitn14_reg", "backbone.weights=null", "trainer.accelerator=cpu",
        f"data.root={sixteen_scenes(tmp_path)}", "data.image_size=[168,224]", "data.augment=false", "cache=memory",
        "task.protocol.lr=5e-4", "task.protocol.clip_norm=1.0", "trainer.max_steps=600", "data.num_workers=0",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main(typed) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["val/map_50"] > 0.9
