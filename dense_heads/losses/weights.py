"""Weights of a sum of losses, as a config gives them."""

import math
from collections.abc import Mapping

from dense_heads.errors import UserError


def checked_weights(weights: Mapping[str, float], what: str) -> dict[str, float]:
    """The weights as floats.

    Args:
        weights: name -> weight.
        what: where they stand in the config, such as `loss`.

    Raises:
        UserError: one is not a finite number from 0 on, or none is above 0.
    """
    for name, weight in weights.items():
        if not (is_number(weight) and math.isfinite(weight) and weight >= 0):
            raise UserError(f"{what}.{name}={weight!r}: expected a finite number, 0 or above.")
    if not any(weight > 0 for weight in weights.values()):
        raise UserError(f"{what}: all weights are 0, so nothing would be learnt. Set at least one above 0.")
    return {name: float(weight) for name, weight in weights.items()}


def is_number(value: object) -> bool:
    """An int or a float, but no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
