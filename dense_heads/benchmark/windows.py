"""Sliding-window evaluation of segmentation against a straight implementation: time, and peak memory of a process each.

The head's maps are random: what is measured is all that follows the head, up to the confusion matrix, which must come
out the same. The memory of `imports alone` is in both others.
"""

import hashlib
import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dense_heads.benchmark.protocol import Case, Contender, command
from dense_heads.errors import UserError
from dense_heads.metrics.segmentation import ConfusionMatrix
from dense_heads.models.looks import Look, Window, most_probable
from dense_heads.ops.pad import Placement
from dense_heads.ops.windows import window_boxes

PATCH = 14


def add_arguments(parser: ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--classes", type=int, nargs="+", default=[150, 19], metavar="K")
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 2048], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=341)
    parser.add_argument("--flip", action="store_true", help="the mirror image too")


def cases(arguments: Namespace, scratch: Path) -> Iterator[Case]:
    """One for each number of classes."""
    height, width = arguments.size
    flipped = ", straight and mirrored" if arguments.flip else ""
    for num_classes in arguments.classes:
        results = {way: scratch / f"{num_classes}-{way}" / "result.json" for way in WAYS}
        contenders = []
        for way, result in results.items():
            shape = [num_classes, height, width, arguments.window, arguments.stride, int(arguments.flip)]
            argv = [sys.executable, "-m", __name__, way, str(result.resolve()), *map(str, shape)]
            run = command(argv, result.parent, seconds=_reader(result, results["dense_heads"]))
            contenders.append(Contender(way, run, reference=WAYS[way] is None))
        yield Case(f"{num_classes} classes, {height} x {width}, windows of {arguments.window}{flipped}", contenders)


def _reader(result: Path, ours: Path) -> Callable[[], float]:
    """Reads a time, after a check that the confusion matrix is ours."""

    def seconds() -> float:
        found = json.loads(result.read_text())
        if found["matrix"] and ours.exists() and found["matrix"] != json.loads(ours.read_text())["matrix"]:
            raise UserError(f"{result.parent.name} does not give the confusion matrix of dense_heads.")
        return float(found["seconds"])

    return seconds


def straight(looks: list[Look]) -> Tensor:
    """As one would write it: all classes at full size through every step."""
    total: Tensor | None = None
    for look in looks:
        logits = torch.zeros(len(look.windows[0].map), *look.view_size)
        count = torch.zeros(look.view_size)
        for window in look.windows:
            top, left, bottom, right = window.box
            enlarged = F.interpolate(window.map[None], size=(bottom - top, right - left), mode="bilinear")
            logits[:, top:bottom, left:right] += enlarged[0]
            count[top:bottom, left:right] += 1
        logits /= count
        probabilities = logits.softmax(dim=0)
        probabilities = probabilities.flip(-1) if look.flip else probabilities
        total = probabilities if total is None else total + probabilities
    assert total is not None
    return (total / len(looks) if len(looks) > 1 else total).argmax(dim=0)


WAYS: dict[str, Callable[[list[Look]], Tensor] | None] = {
    "dense_heads": most_probable,
    "straight": straight,
    "imports alone": None,
}


def _looks(num_classes: int, height: int, width: int, window: int, stride: int, flip: int) -> list[Look]:
    generator = torch.Generator().manual_seed(0)
    looks = []
    for mirrored in (False, True)[: 1 + flip]:
        windows = []
        for top, left, bottom, right in window_boxes((height, width), window, stride):
            rows, columns = -(-(bottom - top) // PATCH), -(-(right - left) // PATCH)
            map = 3 * torch.randn(num_classes, rows, columns, generator=generator)
            windows.append(Window((top, left, bottom, right), map, Placement((bottom - top, right - left))))
        looks.append(Look((height, width), mirrored, (height, width), windows))
    return looks


@torch.inference_mode()
def work(way: str, result: Path, shape: list[int]) -> None:
    """What a process of its own does: one image after the head, and its confusion matrix; the first one warms up."""
    predict, (num_classes, height, width, *_) = WAYS[way], shape
    found = {"seconds": 0.0, "matrix": ""}
    if predict is not None:
        looks, confusion = _looks(*shape), ConfusionMatrix(num_classes)
        target = torch.randint(0, num_classes, (height, width), generator=torch.Generator().manual_seed(1))
        for _ in range(2):
            confusion.reset()
            started = time.perf_counter()
            confusion.update(predict(looks), target)
            found["seconds"] = time.perf_counter() - started
        found["matrix"] = hashlib.sha256(confusion.compute().numpy().tobytes()).hexdigest()
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), [int(value) for value in sys.argv[3:]])
