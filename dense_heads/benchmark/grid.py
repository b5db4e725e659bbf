"""Twelve heads trained on one pass against twelve runs, without a cache and from a warm one."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from dense_heads.benchmark.protocol import Case, Contender, Sample
from dense_heads.benchmark.runs import add_data_argument, camvid, of_steps, run_of

LR = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WEIGHT_DECAY = (1e-4, 1e-2)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of this part."""
    add_data_argument(parser)
    parser.add_argument("--backbone", default="vits14_reg", metavar="NAME")
    parser.add_argument("--steps", type=int, default=23, help="of 16 images; 23 are an epoch (default %(default)s)")


def cases(arguments: Namespace, scratch: Path) -> Iterator[Case]:
    """Training steps only: a grid of 12, one head, and one head times 12."""
    common = [
        f"data.root={camvid(arguments.data)}", f"backbone={arguments.backbone}", "backbone.weights=null",
        f"trainer.max_steps={arguments.steps}", f"trainer.val_check_interval={arguments.steps}",
    ]  # fmt: skip
    rates = ",".join(map(str, LR))
    grid = [
        "head=grid",
        "head.heads=[linear4]",
        f"head.lr=[{rates}]",
        f"head.weight_decay=[{WEIGHT_DECAY[0]},{WEIGHT_DECAY[1]}]",
    ]
    warm = ["cache=disk", "cache.views=0", f"cache.dir={scratch / 'features'}"]
    num = len(LR) * len(WEIGHT_DECAY)
    for title, cache, goal in (("no cache", [], 4.0), ("warm cache", warm, 1.0)):
        one = run_of(scratch / f"one-{title}", [*common, *cache], of_steps)
        contenders = [
            Contender(f"grid of {num}", run_of(scratch / f"grid-{title}", [*common, *cache, *grid], of_steps)),
            Contender(f"{num} runs of one head (one, times {num})", _times(one, num)),
        ]
        yield Case(f"{arguments.backbone}, {title}: training steps", contenders, goal)


def _times(run: Callable[[], Sample], num: int) -> Callable[[], Sample]:
    def many() -> Sample:
        one = run()
        return Sample(num * one.seconds, one.peak_bytes)

    return many
