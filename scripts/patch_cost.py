"""What the patch size costs: the Dice of a perfect head, whose map has one value for each patch.

    python scripts/patch_cost.py chasedb1 [data.root=FOLDER ...] --short-sides 960 1920 3840

The labels of the task's validation (or test) images go through the windows, up-sampling and re-assembly that a head's
map goes through; in place of the head stands the share of each patch that is foreground. A pixel is taken where the
share that arrives is above a half, as cross-entropy teaches; and above the one threshold that is best over all these
images, which is more than a head can know. For tasks of images with two classes.
"""

import argparse
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dense_heads.build.config import composed, composing, plain
from dense_heads.build.medical import load
from dense_heads.models.inference import Inference, infer
from dense_heads.models.looks import mean
from dense_heads.ops.pad import Placement
from dense_heads.structures import IGNORE_INDEX, Levels

PATCH = 14
THRESHOLDS = np.arange(0.02, 1.0, 0.02)


def shares_by_patch(crops: Tensor | Levels) -> tuple[list[Tensor], Placement]:
    """(b, 1, h, w) labels of windows -> their share in each patch, and how that lies on the windows' pixels."""
    assert isinstance(crops, Tensor)
    height, width = crops.shape[-2:]
    shares = F.adaptive_avg_pool2d(crops, (math.ceil(height / PATCH), math.ceil(width / PATCH)))
    return [shares], Placement((height, width))


def perfect(label: Tensor, view: Tensor, inference: Inference) -> Tensor:
    """The share of foreground (H, W) that arrives at the pixels of `label`, looked at as large as `view`."""
    seen = F.interpolate(label[None, None], size=view.shape[-2:], mode="bilinear", align_corners=False)[0]
    ((found,),) = infer(shares_by_patch, [[seen]], [(label.shape[0], label.shape[1])], inference, mean)
    return found[0]


def dices(found: Tensor, mask: Tensor) -> Iterator[float]:
    """At each threshold, over the pixels that are labelled."""
    known = mask != IGNORE_INDEX
    share, true = found[known].numpy(), (mask[known] == 1).numpy()
    for threshold in THRESHOLDS:
        taken = share > threshold
        yield 2 * int((taken & true).sum()) / max(1, int(taken.sum()) + int(true.sum()))


def main() -> None:
    """Print a table, one row for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="such as chasedb1")
    parser.add_argument("overrides", nargs="*", help="of the config, such as data.root=FOLDER")
    parser.add_argument("--short-sides", nargs="+", type=int, required=True, help="of the images as looked at")
    asked = parser.parse_intermixed_args()
    print("short side  Dice, share > 0.5  Dice, best threshold")
    for side in asked.short_sides:
        with composing():
            typed = [*asked.overrides, f"task.transforms.eval.short_side={side}", "mode=evaluate"]
            cfg = composed([f"task={asked.task}", *typed])
            loaded = load(cfg, check=False)
        data = loaded.test or loaded.val
        table = []
        for index in range(len(data)):  # type: ignore[arg-type]
            item = data[index]  # type: ignore[index]
            label = (item["mask"] == 1).float()
            found = perfect(label, item["image"], Inference(**plain(cfg.task.inference)))
            table.append(list(dices(found, item["mask"])))
        dice = np.mean(table, axis=0)
        half, best = int(np.abs(THRESHOLDS - 0.5).argmin()), int(dice.argmax())
        print(f"{side:10d}  {dice[half]:17.3f}  {dice[best]:.3f} (share > {THRESHOLDS[best]:.2f})")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
