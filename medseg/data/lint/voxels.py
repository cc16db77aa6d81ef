"""Numbers that tell one array of voxels from another, computed slab by slab."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.geometry import Geometry

Voxels = npt.NDArray[Any]

_MAX_TABLE = 2**16  # label values counted with a table; wider ranges are sorted
_SLAB_VOXELS = 2**20


def digest(array: Voxels) -> str:
    """Hash of the values (I, J[, K]) and the shape, whatever type and memory order they came in."""
    digest = hashlib.sha256(str(array.shape).encode())
    for slab in _slabs(array):
        values = np.asarray(array[..., slab], np.float32) + np.float32(0)  # -0 and 0 are one value
        digest.update(values.tobytes(order="F"))
    return digest.hexdigest()


def count_values(array: Voxels) -> dict[int, int]:
    """Voxels of each value, slab by slab."""
    low, high = int(array.min()), int(array.max())
    if high - low >= _MAX_TABLE:
        return {int(v): int(n) for v, n in zip(*np.unique(array, return_counts=True), strict=True)}
    counts = np.zeros(high - low + 1, np.int64)
    for slab in _slabs(array):
        counts += np.bincount(array[..., slab].ravel(order="K").astype(np.int64) - low, minlength=len(counts))
    return {int(value) + low: int(counts[value]) for value in np.flatnonzero(counts)}


def centers_mm(array: Voxels, geometry: Geometry, values: Collection[int]) -> dict[int, tuple[float, float, float]]:
    """Center of mass of each value, in RAS."""
    if not values or array.ndim != 3:
        return {}
    kept = np.where(array <= max(values), array, 0) if array.max() > max(values) else array
    boxes = ndimage.find_objects(np.maximum(kept, 0) if kept.min() < 0 else kept)
    centers = {}
    for value in sorted(values):
        box = boxes[value - 1] if 0 < value <= len(boxes) else None
        if box is None:
            continue
        inside = array[box] == value
        profiles = [inside.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
        index = [s.start + float(np.average(np.arange(len(p)), weights=p)) for s, p in zip(box, profiles, strict=True)]
        x, y, z = (geometry.affine @ [*index, 1.0])[:3]
        centers[value] = (float(x), float(y), float(z))
    return centers


def exchanged(array: Voxels, mapping: Mapping[int, int]) -> Voxels:
    """Label values exchanged, others kept, in the smallest integer type; slab by slab."""
    old = np.array(sorted(count_values(array)), np.int64)
    new = np.array([mapping.get(value, value) for value in old.tolist()], np.int64)
    dtype = np.min_scalar_type(int(new.max())) if new.min() >= 0 else np.dtype(np.int32)
    result = np.empty(array.shape, np.int32 if dtype.itemsize > 1 else dtype, order="F")
    for slab in _slabs(array):
        result[..., slab] = new[np.searchsorted(old, array[..., slab])]
    return result


def _slabs(array: Voxels) -> Iterator[slice]:
    step = max(1, _SLAB_VOXELS * array.shape[-1] // max(1, array.size))
    for start in range(0, array.shape[-1], step):
        yield slice(start, start + step)
