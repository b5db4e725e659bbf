"""The range of a depth head in metres: part of the head, not of its weights.

The same weights give other depths with another range, so a head states its range as an argument, and its artefact
keeps it.
"""

import math

from dense_heads.errors import UserError, unknown_name

MIN_M = 0.001
_PUBLISHED_MAX_M = {"nyu": 10.0, "kitti": 80.0}
_HUB_LINEAR_MAX_M = 80.0  # hub/depthers.py writes it into every linear head, whatever the data set


def check_range(min_m: float, max_m: float) -> tuple[float, float]:
    """The two as floats.

    Raises:
        UserError: not two finite numbers with 0 <= min_m < max_m.
    """
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (min_m, max_m))
    if not (numbers and math.isfinite(max_m) and 0 <= min_m < max_m):
        raise UserError(
            f"head.min_m={min_m!r}, head.max_m={max_m!r}: expected metres with 0 <= min_m < max_m, such as 0.001 and "
            "10 (NYU) or 0.001 and 80 (KITTI)."
        )
    return float(min_m), float(max_m)


def published_range(dataset: str) -> tuple[float, float]:
    """(min_m, max_m) that DINOv2's published depth numbers were measured with (official NYU and KITTI configs).

    Raises:
        UserError: neither `nyu` nor `kitti`.
    """
    if dataset not in _PUBLISHED_MAX_M:
        raise unknown_name("data set of official depth heads", dataset, _PUBLISHED_MAX_M)
    return MIN_M, _PUBLISHED_MAX_M[dataset]


def hub_range(dataset: str, head_name: str) -> tuple[float, float]:
    """(min_m, max_m) that DINOv2's hub entry computes with (`head.range=hub`) [D2 hub/depthers.py].

    The same as `published_range` but for the NYU linear heads, which the hub runs with 80 m.

    Args:
        dataset: `nyu` or `kitti`.
        head_name: `linear_depth`, `linear4_depth` or `dpt`.

    Raises:
        UserError: an unknown data set or head.
    """
    min_m, max_m = published_range(dataset)
    heads = ("linear_depth", "linear4_depth", "dpt")
    if head_name not in heads:
        raise unknown_name("official depth head", head_name, heads)
    return min_m, max_m if head_name == "dpt" else _HUB_LINEAR_MAX_M


def range_notice(dataset: str, head_name: str) -> str | None:
    """What a user who loads a released head should be told once about its range; None where nothing is odd."""
    published, hub = published_range(dataset), hub_range(dataset, head_name)
    if published == hub:
        return None
    return (
        f"The released {dataset.upper()} head {head_name} was measured with depths from {published[0]:g} to "
        f"{published[1]:g} m, but DINOv2's own hub entry computes with up to {hub[1]:g} m: from the same weights it "
        f"gives depths about {hub[1] / published[1]:.0f} times as large. {published[1]:g} m reproduces the published "
        "numbers, head.range=hub what the hub entry gives."
    )
