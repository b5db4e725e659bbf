"""An epoch of CamVid and the way to the final head: features computed at every step, cached now, cached before."""

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from dense_heads.benchmark.protocol import Case, Contender, Sample
from dense_heads.benchmark.runs import add_data_argument, camvid, of_steps, run_of

MEASURES = ("steps", "total")
GOALS = {"vits14_reg": 8.0, "vitb14_reg": 20.0}  # times as fast as without a cache, training steps only


def add_arguments(parser: ArgumentParser) -> None:
    """Options of this part."""
    add_data_argument(parser)
    parser.add_argument("--backbones", nargs="+", default=list(GOALS), metavar="NAME")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], metavar="NAME")
    parser.add_argument("--measure", nargs="+", default=list(MEASURES), choices=MEASURES, help="what of a run")
    parser.add_argument("--steps", type=int, default=23, help="of 16 images; 23 are an epoch (default %(default)s)")


def cases(arguments: Namespace, scratch: Path) -> Iterator[Case]:
    """For each backbone and precision: the steps alone (no warm-up changes them), and everything to the final head."""
    data = camvid(arguments.data)
    for name in arguments.backbones:
        for precision in arguments.precisions:
            common = [
                f"data.root={data}", f"backbone={name}", "backbone.weights=null", f"backbone.precision={precision}",
                f"trainer.max_steps={arguments.steps}", f"trainer.val_check_interval={arguments.steps}",
            ]  # fmt: skip
            both = _both(f"{name}, {precision}", common, scratch / f"{name}-{precision}", _goal(name, precision))
            yield from (case for measured, case in zip(MEASURES, both, strict=True) if measured in arguments.measure)


def _goal(name: str, precision: str) -> float | None:
    return GOALS.get(name) if precision == "float32" else None


def _both(title: str, common: list[str], scratch: Path, goal: float | None) -> tuple[Case, Case]:
    features = scratch / "features"
    disk = [*common, "cache=disk", "cache.views=0", f"cache.dir={features}"]
    cold_features = scratch / "cold-features"
    cold = [*disk, f"cache.dir={cold_features}"]
    memory = [*common, "cache=memory", "cache.views=0"]

    def timings(seconds: Callable[[dict[str, float]], float], where: str) -> list[Contender]:
        folder = scratch / where
        return [
            Contender("cache warm on disk", run_of(folder / "warm", disk, seconds)),
            Contender("cache off", run_of(folder / "off", common, seconds)),
        ]

    steps = Case(f"{title}: training steps of an epoch", timings(of_steps, "steps"), goal)
    contenders = [
        *timings(lambda found: found["total"], "total"),
        Contender(
            "cache cold on disk",
            _forgetting(run_of(scratch / "cold", cold, lambda found: found["total"]), cold_features),
        ),
        Contender("cache in memory", run_of(scratch / "memory", memory, lambda found: found["total"])),
    ]
    return steps, Case(f"{title}: one epoch to the final head, validation included", contenders)


def _forgetting(run: Callable[[], Sample], folder: Path) -> Callable[[], Sample]:
    def cold() -> Sample:
        shutil.rmtree(folder, ignore_errors=True)
        return run()

    return cold
