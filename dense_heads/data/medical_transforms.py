"""Augmentation of medical images."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dense_heads.data.transforms import RandomCrop
from dense_heads.errors import UserError
from dense_heads.structures import IGNORE_INDEX


class ForegroundCrop(RandomCrop):
    """Cut a random window that holds, with a stated probability, a pixel of foreground drawn from the mask.

    A side shorter than the window is kept whole. Without foreground in the mask, or without a mask, any window.

    Args:
        size: (height, width) of the window, or the side of a square.
        foreground: probability that the window is drawn around foreground.
        p: of the step.
    """

    def __init__(self, size: int | Sequence[int], foreground: float = 0.5, p: float = 1.0) -> None:
        super().__init__(size, cat_max_ratio=1.0, p=p)
        if not 0 <= foreground <= 1:
            raise UserError(f"ForegroundCrop: foreground {foreground}; expected a probability from 0 to 1.")
        self.foreground = foreground

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the window."""
        shape, mask = params["shape"][:2], data.get("mask")
        if mask is None or self.random_generator.random() >= self.foreground:
            return super().get_params_dependent_on_data(params, data)
        occupied = (mask > 0) & (mask < IGNORE_INDEX)
        places = np.flatnonzero(occupied.any(axis=2) if occupied.ndim == 3 else occupied)
        if len(places) == 0:
            return super().get_params_dependent_on_data(params, data)
        at = np.unravel_index(int(self.random_generator.choice(places)), shape)
        # Anywhere in the window, as far as the image goes: not always in its middle.
        starts = []
        for place, side, window in zip(at, shape, self.size, strict=True):
            low, high = max(0, int(place) - window + 1), min(int(place), max(side - window, 0))
            starts.append(int(self.random_generator.integers(min(low, high), high + 1)))
        return {"top": starts[0], "left": starts[1]}
