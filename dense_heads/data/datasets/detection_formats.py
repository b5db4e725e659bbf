"""Finding out in which of the known formats someone's objects are annotated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dense_heads.data.datasets import coco, voc_xml, yolo
from dense_heads.data.datasets.base import missing_data
from dense_heads.data.datasets.object_reader import ObjectReader

ROBOFLOW_FILE = "_annotations.coco.json"
LAYOUT = f"""
    one of
    ROOT/annotations/instances_train.json, ROOT/train/NAME.jpg           COCO JSON (also train2017, ...)
    ROOT/train/{ROBOFLOW_FILE}, ROOT/train/NAME.jpg             Roboflow's COCO export
    ROOT/data.yaml, ROOT/images/train/NAME.jpg, ROOT/labels/train/NAME.txt    YOLO
    ROOT/Annotations/NAME.xml, ROOT/JPEGImages/NAME.jpg                  Pascal VOC
"""


def find_format(
    root: str | Path,
    val_fraction: float = 0.2,
    seed: int = 0,
    split: Mapping[str, Sequence[str]] | None = None,
    hint: str = "",
) -> ObjectReader:
    """The reader of the format that lies in `root`: COCO JSON, Roboflow's, YOLO's or VOC's.

    Args:
        root: the folder of the data set.
        val_fraction: as for CocoJson; so are the others.
        seed: of a split that is drawn.
        split: one that was drawn before.
        hint: how to get the data.

    Raises:
        UserError: none of them is there, or what is there cannot be read.
    """
    root = Path(root)
    options: dict[str, Any] = {"val_fraction": val_fraction, "seed": seed, "split": split, "hint": hint}
    for splits in (None, {"train": "train2017", "val": "val2017"}, {"train": "training", "val": "validation"}):
        names = (splits or {"train": "train", "val": "val", "test": "test"}).values()
        if any((root / "annotations" / f"instances_{name}.json").is_file() for name in names):
            nested = any((root / "images" / name).is_dir() for name in names)
            images = "images/{split}" if nested else "{split}"
            return coco.CocoJson(root, images=images, splits=splits, **options)
    if any(root.glob(f"*/{ROBOFLOW_FILE}")):
        splits = {"train": "train", "val": "valid", "test": "test"}
        return coco.CocoJson(root, f"{{split}}/{ROBOFLOW_FILE}", "{split}", splits=splits, **options)
    if yolo.yaml_file(root) is not None:
        return yolo.YoloTxt(root, **options)
    if (root / "Annotations").is_dir():
        return voc_xml.VocXml(root, **options)
    raise missing_data(root, LAYOUT, hint)
