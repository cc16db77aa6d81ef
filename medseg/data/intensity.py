"""What happens to the values of a scan: clipping, normalization, and the statistics behind it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from medseg.errors import DataError
from medseg.model import Intensity


def normalize_(channel: Tensor, intensity: Intensity) -> None:
    """Clip and normalize one channel in place.

    Where nothing varies the result is 0 rather than NaN.

    Args:
        channel: float32, (I, J, K).
        intensity: What to do; for ``foreground`` with `mean` and `std`.

    Raises:
        DataError: If ``foreground`` is asked for without its numbers.
    """
    if intensity.clip is not None:
        channel.clamp_(*intensity.clip)
    if intensity.normalize == "zscore":
        shift, scale = float(channel.mean()), float(channel.std(correction=0))
    elif intensity.normalize == "foreground":
        if intensity.mean is None or intensity.std is None:
            raise DataError(
                "E-INTENSITY", "normalize: foreground needs mean and std of the training cases; train again"
            )
        shift, scale = intensity.mean, intensity.std
    elif intensity.normalize == "minmax":
        low, high = intensity.clip or (float(channel.min()), float(channel.max()))
        shift, scale = low, high - low
    else:
        return
    channel.sub_(shift).div_(scale if scale > 0 else 1.0)


class RunningStatistics:
    """Mean and standard deviation of values that come in parts, none of which is kept.

    Args:
        clip: Applied to the values first.

    Reference:
        Chan, Golub and LeVeque 1983, doi:10.1080/00031305.1983.10483115 (merging of parts).
    """

    def __init__(self, clip: tuple[float, float] | None = None) -> None:
        self.clip = clip
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0  # sum of squared distances from the mean

    def add(self, values: npt.NDArray[Any]) -> None:
        """Take in a part, of any shape and numeric type."""
        if values.size == 0:
            return
        values = values.astype(np.float64)
        if self.clip is not None:
            values.clip(*self.clip, out=values)
        count, mean = values.size, float(values.mean())
        total, difference = self.count + count, mean - self.mean
        self._squares += float(((values - mean) ** 2).sum()) + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Of the population, as `numpy.std`; NaN before the first value."""
        return math.sqrt(self._squares / self.count) if self.count else math.nan
