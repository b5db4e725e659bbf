"""From a scanner's units to grey: what a backbone that has seen photographs can look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dense_heads.errors import UserError

Window = Sequence[float]  # level, width


@dataclass(frozen=True)
class Intensity:
    """Values of one volume -> grey 0..1, for each channel by its modality.

    A modality with a window (Hounsfield units of CT mean the same in every scan) is cut at level - width/2 and
    level + width/2; any other (MR, ultrasound: units differ from scan to scan) at two percentiles of the volume itself.

    Args:
        windows: modality -> [level, width]; names are compared without case, and `CT` also meets `CT, portal phase`.
        percentiles: low and high, of each volume's own values in that channel.

    Raises:
        UserError: a window without width, or percentiles that are none.
    """

    windows: Mapping[str, Window] = field(default_factory=dict)
    percentiles: Sequence[float] = (0.5, 99.5)

    def __post_init__(self) -> None:
        for name, window in self.windows.items():
            if len(window) != 2 or not window[1] > 0:
                raise UserError(f"intensity.windows.{name}={list(window)}; expected [level, width], width above 0.")
        if len(self.percentiles) != 2 or not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise UserError(f"intensity.percentiles={list(self.percentiles)}; expected [low, high] within 0 to 100.")

    def __call__(self, values: npt.NDArray[np.float32], modalities: Sequence[str]) -> npt.NDArray[np.float32]:
        """(C, ...) -> the same shape, float32 0..1; a channel without contrast becomes 0."""
        grey = np.empty(values.shape, dtype=np.float32)
        for index, channel in enumerate(values):
            low, high = self._limits(channel, modalities[index] if index < len(modalities) else "")
            grey[index] = 0.0 if high <= low else np.clip((channel - low) / (high - low), 0, 1)
        return grey

    def _limits(self, channel: npt.NDArray[np.float32], modality: str) -> tuple[float, float]:
        for name, (level, width) in self.windows.items():
            if modality.strip().lower().startswith(name.lower()):
                return level - width / 2, level + width / 2
        low, high = np.percentile(channel, self.percentiles)
        return float(low), float(high)
