"""Cheap checks of depth data before the first training step."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dense_heads.data.checks import refuse, sample_problems, spread
from dense_heads.data.datasets.base import Sample
from dense_heads.data.depth import size_mismatch
from dense_heads.data.depth_maps import DepthRule, depth_size
from dense_heads.data.images import image_size
from dense_heads.errors import UserError

_FEW = 0.05  # a scale is wrong where less than this share of the depths lies in the range
_SHALLOW = 0.01  # or where nearly all depths lie within this share of the range
_TRIED = (1000, 1, 256, 5000, 10000, 100)  # units per metre that are customary, to suggest one that fits
_PIXELS = 4096  # of a map that are looked at to judge the scale


def check_depth(
    splits: Mapping[str, Sequence[Sample]],
    rule: DepthRule,
    min_m: float,
    max_m: float,
    max_headers: int = 2000,
    max_maps: int = 64,
) -> None:
    """Refuse a data set in which something is wrong; all that is found goes into one message.

    Args:
        splits: samples of each split.
        rule: how depth files are read.
        min_m: where the task's range (`task.depth_range`) begins, in which nearly all depths should lie.
        max_m: where it ends.
        max_headers: pairs of a split whose headers are read, spread evenly.
        max_maps: depth maps of a split that are read in full.

    Raises:
        UserError: with the first five of what `find_depth_problems` found.
    """
    refuse(list(find_depth_problems(splits, rule, min_m, max_m, max_headers, max_maps)))


def find_depth_problems(
    splits: Mapping[str, Sequence[Sample]],
    rule: DepthRule,
    min_m: float,
    max_m: float,
    max_headers: int = 2000,
    max_maps: int = 64,
) -> Iterator[str]:
    """What is wrong with the data of the splits, one sentence for each problem.

    An id twice in a split; a file in two splits; a depth file that is not there; images or depths that cannot be read;
    image and depth of different sizes; a split in which no pixel is measured; a scale that puts nearly all depths
    outside the range, or into its first hundredth. A map without any measurement among others is no problem: it adds
    nothing to the loss and is left out of the metrics.
    """
    yield from sample_problems(splits)
    for split, samples in splits.items():
        broken: set[Sample] = set()
        for sample in spread(samples, max_headers):
            problem = _pair_problem(sample)
            if problem:
                broken.add(sample)
                yield problem
        maps = [sample for sample in samples if sample.depth is not None and sample not in broken]
        yield from _map_problems(split, maps, rule, (min_m, max_m), max_maps)


def _pair_problem(sample: Sample) -> str | None:
    try:
        size = image_size(sample.image)
        of_depth = size if sample.depth is None else depth_size(sample.depth)
        return None if size == of_depth else str(size_mismatch(sample, size, of_depth))
    except UserError as error:
        return str(error)


def _map_problems(
    split: str, samples: Sequence[Sample], rule: DepthRule, depth_range: tuple[float, float], max_maps: int
) -> Iterator[str]:
    if not samples:
        return
    first = spread(samples, max_maps)
    chosen = set(first)
    found: list[npt.NDArray[np.float32]] = []
    broken = False
    # The rest is read only as long as no measured pixel has been found.
    for i, sample in enumerate([*first, *(sample for sample in samples if sample not in chosen)]):
        if i >= len(first) and (found or broken):
            break
        assert sample.depth is not None
        try:
            depth_m = rule.read(sample.depth)
        except UserError as error:
            broken = True
            yield str(error)
            continue
        measured = depth_m[depth_m > 0]
        if measured.size:
            found.append(measured[:: max(1, measured.size // _PIXELS)])
    if found:
        yield from _scale_problem(split, np.concatenate(found), rule, depth_range)
    elif not broken:
        yield (
            f"{split}: none of its {len(samples)} depth maps has a measured pixel; expected some. Look at "
            f"task.data.depth.invalid={rule.settings()['invalid']} and at the maps, such as {samples[0].depth}"
        )


def _scale_problem(
    split: str, depths: npt.NDArray[np.float32], rule: DepthRule, depth_range: tuple[float, float]
) -> Iterator[str]:
    """The sentence for a scale that cannot be meant."""
    inside = _share_inside(depths, depth_range)
    shallow = float(np.quantile(depths, 0.99)) < _SHALLOW * depth_range[1]
    if inside >= _FEW and not shallow:
        return
    share = "99 % of them are in the first hundredth of" if shallow else f"{100 * inside:.0f} % of them are inside"
    units = depths.astype(np.float64) * rule.scale
    fits = [scale for scale in _TRIED if scale != rule.scale and _plausible(units / scale, depth_range)]
    advice = f", such as {fits[0]}" if fits else ""
    yield (
        f"{split}: median {np.median(depths):.4g} m: is data.depth_scale missing? It stands at {rule.scale:g} for "
        f"one metre, and {share} task.depth_range ({depth_range[0]:g} to {depth_range[1]:g} m). Set "
        f"data.depth_scale to the files' units for one metre{advice} (1000 for millimetres, 1 for metres), or "
        "task.depth_range to the range that the scenes have"
    )


def _plausible(depths: npt.NDArray[np.float64], depth_range: tuple[float, float]) -> bool:
    return _share_inside(depths, depth_range) > 0.9 and bool(np.quantile(depths, 0.99) > 0.1 * depth_range[1])


def _share_inside(depths: npt.NDArray[np.floating], depth_range: tuple[float, float]) -> float:
    return float(np.mean((depths > depth_range[0]) & (depths < depth_range[1])))
