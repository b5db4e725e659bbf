"""A finished run's folder as the report finds it, with real street scenes where they are at hand."""

import csv
import io
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from dense_heads.report.panel import segmentation_panel

CAMVID = Path(__file__).parents[2] / "../shared/data/camvid"
NAMES = "Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist".split()
PALETTE = np.array(
    [
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ],
    dtype=np.uint8,
)  # fmt: skip
IOU = [0.864, 0.581, 0.012, 0.803, 0.402, 0.553, 0.021, 0.034, 0.287, 0.006, None]


def scenes(count: int = 3) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(id, image, label): CamVid's validation images, else drawn ones of the same size."""
    files = sorted((CAMVID / "images/validation").glob("*.jpg"))[:: 101 // count][:count]
    found = []
    for file in files:
        label = np.asarray(Image.open(CAMVID / "annotations/validation" / f"{file.stem}.png")).astype(np.int64)
        label[label == 11] = 255
        found.append((file.stem, np.asarray(Image.open(file).convert("RGB")), label))
    rng = np.random.default_rng(0)
    while len(found) < count:
        label = rng.integers(0, 11, (9, 12)).repeat(40, 0).repeat(40, 1)
        label[:20] = 255
        noise = rng.integers(0, 60, (360, 480, 3))
        found.append((f"drawn_{len(found)}", (PALETTE[label % 255 % 11] // 2 + noise).astype(np.uint8), label))
    return found


def coarse(label: np.ndarray) -> np.ndarray:
    """A believable prediction: the label as a 14-pixel grid would know it."""
    rows = np.minimum(np.arange(label.shape[0]) // 14 * 14 + 7, label.shape[0] - 1)
    columns = np.minimum(np.arange(label.shape[1]) // 14 * 14 + 7, label.shape[1] - 1)
    known = np.where(label == 255, 3, label)
    return known[rows[:, None], columns[None, :]]


def summary(**changes: object) -> dict[str, object]:
    """What `metrics.json` of a CamVid run over a random backbone holds."""
    return {
        "task": "camvid",
        "family": "segmentation",
        "backbone": {
            "name": "vits14_reg", "weights": None, "seed": 0, "fingerprint": "9f3c21d07a5be664", "parameters": 22058112,
        },
        "head": {"name": "linear4", "parameters": 19979},
        "metrics": {"test/miou": 0.3241, "test/macc": 0.4102, "test/aacc": 0.7745, "test/dice": 0.3987},
        "per_class": [
            {"name": name, "iou": iou, "acc": None if iou is None else min(1.0, iou + 0.08), "colour": colour.tolist()}
            for name, iou, colour in zip(NAMES, IOU, PALETTE, strict=True)
        ],
        "primary": "test/miou",
        "direction": "max",
        "protocol": {
            "crop": [360, 480], "batch_size": 16, "max_steps": 2000, "learning_rate": 0.001, "warmup_steps": 100,
            "schedule": "poly, power 1", "select": "last", "flip": False, "loss": {"cross_entropy": 1},
        },
        "conventions": "One confusion matrix over the data set; ignored pixels left out of both sides; classes absent "
        "everywhere left out of the mean; predictions resized to the label's own size.",
        "selected_on": "last step",
        "published": None,
        "baseline": {"name": "raw pixels", "metrics": {"test/miou": 0.2417, "test/aacc": 0.7012}},
        "notes": ["There is no test split here: the numbers are those of the validation split."],
        "seed": 0,
        "steps": 2000,
        "commit": "677bb0e",
        "hardware": "2 CPU cores",
        "seconds": {"total": 812.4, "train": 701.9},
        "versions": {"dense_heads": "0.1.0", "torch": "2.15.0", "lightning": "2.6.6"},
        **changes,
    }  # fmt: skip


def write_curves(path: Path, steps: int = 2000, every: int = 10, candidates: tuple[str, ...] = ()) -> None:
    """A `metrics.csv` with falling losses, a warmed-up polynomial rate and four validations."""
    rng = np.random.default_rng(1)
    losses = [f"train/loss/{name}" for name in candidates]
    columns = ["step", "epoch", "train/loss", *losses, "lr", "val/miou", "val/aacc"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for step in range(every, steps + 1, every):
            row: dict[str, object] = {"step": step, "epoch": step // 23}
            fall = 0.75 + 1.7 * math.exp(-step / (steps / 6))
            row["train/loss"] = round(fall + 0.09 * rng.standard_normal(), 4)
            row |= {
                name: round(fall * (1 + 0.1 * i) + 0.05 * rng.standard_normal(), 4) for i, name in enumerate(losses)
            }
            row["lr"] = 1e-3 * (1 - step / steps) * min(1.0, step / (steps / 20))
            if step % (steps // 8) < every:
                row |= {"val/miou": 0.33 - 0.2 * math.exp(-4 * step / steps), "val/aacc": 0.77 - 0.2 * fall / 3}
            writer.writerow(row)


@cache
def panels() -> list[tuple[str, bytes]]:
    """(id, PNG) of the run's pictures, drawn once for all tests."""
    drawn = []
    for image_id, image, label in scenes():
        buffer = io.BytesIO()
        segmentation_panel(image, label, coarse(label), PALETTE, NAMES, image_id).save(buffer, "PNG")
        drawn.append((image_id, buffer.getvalue()))
    return drawn


def write_run(folder: Path, **changes: object) -> Path:
    """A whole run folder; `changes` go into `metrics.json`."""
    (folder / "pictures/test").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(summary(**changes)))
    write_curves(folder / "metrics.csv")
    (folder / "config.yaml").write_text("mode: fit\nseed: 0\ntask:\n  name: camvid\n  num_classes: 11\n")
    (folder / "card.json").write_text(
        json.dumps({"head": "linear4", "licence": "Apache-2.0", "classes": NAMES}, indent=1)
    )
    for image_id, data in panels():
        (folder / f"pictures/test/{image_id}.png").write_bytes(data)
    return folder
