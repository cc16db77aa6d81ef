"""What random transforms share: ranges checked where they are given, factors drawn, axes chosen, plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from medseg.errors import WorkflowError

Interval = tuple[float, float]

THIN = 3.0
"""An axis is not rotated into if its voxels are this many times as long as the shortest, or the patch this
many times as short as along the longest: nnU-Net's limit between 3D and slice-wise augmentation."""


def check_probability(name: str, value: float) -> float:
    """A number in [0, 1].

    Raises:
        WorkflowError: If it is none.
    """
    return check_interval(name, (value, value), within=(0.0, 1.0))[0]


def check_interval(name: str, values: Sequence[float], *, within: Interval = (-math.inf, math.inf)) -> Interval:
    """Two finite numbers in ascending order.

    Args:
        name: The argument, for the message.
        values: Least and largest value.
        within: Where both have to lie, ends included.

    Raises:
        WorkflowError: If they are anything else.
    """
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        raise WorkflowError("E-ARGUMENT", f"{name}: {values!r}; expected [least, largest]") from None
    if not (math.isfinite(low) and math.isfinite(high) and within[0] <= low <= high <= within[1]):
        limits = f" in [{within[0]:g}, {within[1]:g}]" if within != (-math.inf, math.inf) else ""
        raise WorkflowError("E-ARGUMENT", f"{name}: {low:g} to {high:g}; expected ascending numbers{limits}")
    return low, high


def check_factors(name: str, values: Sequence[float]) -> Interval:
    """Least and largest factor, both positive.

    Raises:
        WorkflowError: If they are anything else.
    """
    return check_interval(name, values, within=(1e-3, 1e3))


def draw_factor(random: np.random.RandomState, factors: Interval) -> float:
    """A factor, uniform in its logarithm: doubling is as likely as halving."""
    return math.exp(random.uniform(math.log(factors[0]), math.log(factors[1])))


def resampled_axes(patch_size: Sequence[int], spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """The axes that may be mixed by rotation: not slices, nor the long side of anisotropic voxels."""
    longest, finest = max(patch_size), min(spacing_mm)
    sizes = zip(patch_size, spacing_mm, strict=True)
    return tuple(a for a, (n, mm) in enumerate(sizes) if n > 1 and n * THIN >= longest and mm <= finest * THIN)


def plain(array: Any) -> Tensor:
    """An array or tensor of any kind as a plain tensor, sharing memory where torch can."""
    if isinstance(array, MetaTensor):
        return array.as_tensor()
    if isinstance(array, Tensor):
        return array
    array = np.asarray(array)
    if array.dtype == np.uint16:  # which torch stores, but neither indexes nor mirrors
        array = array.astype(np.int32)
    # torch shares neither read-only memory (a mapped cache file) nor mirrored views
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)
