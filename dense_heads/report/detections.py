"""What `mode=predict` leaves of detections: COCO JSON for programs, drawings for people."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dense_heads.models.card import Card
from dense_heads.ops import masks
from dense_heads.ops.files import write_atomically
from dense_heads.report.detection_panel import draw_objects
from dense_heads.report.predictions import Writer
from dense_heads.report.sheet import Pixels


class DetectionWriter(Writer):
    """`pictures/NAME.png` for each image, and for all of them `detections.json` and `results.json`.

    `detections.json` is a whole COCO file: its images, categories, and the detections as annotations with a `score`.
    `results.json` holds the same as COCO's list of results, for `COCO("detections.json").loadRes("results.json")` or
    an evaluation server. Both are written at the end.
    """

    def __init__(self, output: Path, card: Card, ids: str = "train", min_score: float = 0.05) -> None:
        """`ids`: category ids `train` (1 to K) or `raw` (those of the data set); detections below `min_score` go."""
        self.output, self.min_score = output, min_score
        self.names, self.palette = list(card.classes), np.array(card.colours, dtype=np.uint8)
        numbered = list(range(1, len(self.names) + 1))
        self.category_ids = list(card.labels.get("category_ids", numbered)) if ids == "raw" else numbered
        self.images: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []

    def write(self, name: str, pixels: Pixels, prediction: Mapping[str, NDArray[Any]]) -> None:
        """Draw one image and keep its detections."""
        height, width = pixels.shape[:2]
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        kept = prediction["scores"] >= self.min_score
        found = {key: values[kept] for key, values in prediction.items()}
        codes = [masks.encode(mask) for mask in found["masks"]] if "masks" in found else None
        self.results += coco_results(image_id, (height, width), found, codes, self.category_ids)
        path = self.output / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_objects(pixels, found, self.palette, self.names)).save(path)

    def close(self) -> None:
        """Write both files."""
        annotations = [
            {"id": number, "iscrowd": 0, "area": _area(result), **result}
            for number, result in enumerate(self.results, start=1)
        ]
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.names, strict=True)]
        whole = {
            "info": {"description": "detections by dense_heads"},
            "images": self.images,
            "categories": categories,
            "annotations": annotations,
        }
        write_atomically(self.output / "detections.json", json.dumps(whole, ensure_ascii=False) + "\n")
        write_atomically(self.output / "results.json", json.dumps(self.results) + "\n")


def coco_results(
    image_id: int,
    size: tuple[int, int],
    found: Mapping[str, NDArray[Any]],
    codes: Sequence[str] | None,
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """The detections of one image as COCO's results: bbox x, y, width, height; segmentation as run lengths."""
    results = []
    for place, (left, top, right, bottom) in enumerate(np.asarray(found["boxes"], dtype=np.float64).tolist()):
        result: dict[str, Any] = {
            "image_id": image_id,
            "category_id": category_ids[int(found["labels"][place])],
            "bbox": [round(value, 3) for value in (left, top, right - left, bottom - top)],
            "score": round(float(found["scores"][place]), 6),
        }
        if codes is not None:
            result["segmentation"] = {"size": list(size), "counts": codes[place]}
        results.append(result)
    return results


def _area(result: Mapping[str, Any]) -> float:
    if "segmentation" in result:
        segmentation = result["segmentation"]
        return masks.area(segmentation["counts"], tuple(segmentation["size"]))
    return float(result["bbox"][2] * result["bbox"][3])
