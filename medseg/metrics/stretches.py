"""Stretches of voxels with equal labels: a label map has far fewer stretches than voxels, so looking at them is fast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

LabelMap = npt.NDArray[Any]
"""Integers, of any type and shape."""

IntArray = npt.NDArray[np.int64]

_CHUNK = 2**20  # voxels looked at together, so that memory is bounded also where every voxel differs from the next


def first_axis_is_fastest(reference: LabelMap, prediction: LabelMap) -> bool:
    """Whether the maps lie in memory as they do in files: flat without a copy once the axes are reversed."""
    pair = (reference, prediction)
    return all(labels.flags.f_contiguous for labels in pair) and not all(labels.flags.c_contiguous for labels in pair)


def stretches(reference: LabelMap, prediction: LabelMap) -> Iterator[tuple[IntArray, IntArray]]:
    """Stretches along which neither of two label maps changes.

    Args:
        reference: Label map, (V,).
        prediction: Label map, (V,).

    Yields:
        First voxels of some stretches, ascending, and for each the voxel after its last. Together they are all voxels.
    """
    for start in range(0, reference.size, _CHUNK):
        pair = [labels[start : start + _CHUNK] for labels in (reference, prediction)]
        changes = pair[0][1:] != pair[0][:-1]
        changes |= pair[1][1:] != pair[1][:-1]
        bounds = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(pair[0])]]) + start
        yield bounds[:-1], bounds[1:]
