"""Sample a patch through a linear map: images linearly, labels by the nearest voxel.

Each voxel's place in the source is computed once for all channels and the label, in blocks that stay
in the processor's cache. On one core this is four times as fast as two calls of `grid_sample`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg.errors import DataError

Matrix = npt.NDArray[np.float64]

BLOCK_VOXELS = 65_536
"""Voxels sampled at a time: places, weights and corners of a block fit into 1–2 MB of cache."""


def centre_box(source: Tensor, patch_size: Sequence[int], margins: Sequence[int]) -> Tensor:
    """The middle of (C, I, J[, K]), `margins` wider than the patch on either side, as far as the source goes."""
    if len(patch_size) != source.ndim - 1 or any(n < p for n, p in zip(source.shape[1:], patch_size, strict=True)):
        raise DataError(
            "E-PATCH",
            f"an array of {tuple(source.shape)} holds no patch of {tuple(patch_size)}; pad it to the patch size first",
        )
    box = [slice(None)]
    for size, patch, margin in zip(source.shape[1:], patch_size, margins, strict=True):
        start = (size - patch) // 2
        reach = min(margin, start, size - patch - start)
        box.append(slice(start - reach, start + patch + reach))
    return source[tuple(box)]


def resample(
    sources: Mapping[Hashable, Tensor],
    matrix: Matrix,
    *,
    label_keys: Collection[Hashable],
    axes: Sequence[int],
    patch_size: Sequence[int],
) -> dict[Hashable, Tensor]:
    """Sample a patch around the centre of contiguous sources, all of one spatial size.

    Args:
        sources: Each (C, I, J[, K]).
        matrix: Step in the source for a step of one voxel along each axis of the patch, (D, D), in voxels.
        label_keys: Which of them take the nearest voxel; the others, float32, are interpolated linearly.
        axes: Axes the matrix changes; along the others the patch runs through the source's voxels.
        patch_size: Voxels of the result.

    Returns:
        Each (C, *patch_size), in its source's dtype.
    """
    source_size = next(iter(sources.values())).shape[1:]
    results = {key: source.new_empty(len(source), *patch_size) for key, source in sources.items()}
    channels = [
        (source, target, key in label_keys)
        for key in sources
        for source, target in zip(sources[key].flatten(1), results[key].flatten(1), strict=True)
    ]
    for block, along in _blocks(matrix, source_size, patch_size):
        for axis in axes:
            along[axis].clamp_(0, source_size[axis] - 1)
        closest = _flat_index([a.round().int() for a in along], source_size)
        # At the far border the last voxel but one, with all the weight on its neighbour
        corner = [
            a.int().clamp_(max=max(n - 2, 0) if axis in axes else n)
            for axis, (a, n) in enumerate(zip(along, source_size, strict=True))
        ]
        lowest = _flat_index(corner, source_size)
        weights = [(math.prod(source_size[axis + 1 :]), along[axis] - corner[axis]) for axis in axes]
        for source, target, is_label in channels:
            target[block] = source.index_select(0, closest) if is_label else _interpolate(source, lowest, weights)
    return results


def _blocks(
    matrix: Matrix, source_size: Sequence[int], patch_size: Sequence[int]
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Runs of the flattened patch, each with where its voxels lie along every axis of the source, in voxels."""
    dims = len(patch_size)
    from_centre = [
        (torch.arange(n, dtype=torch.float32) - (n - 1) / 2).view([-1 if d == axis else 1 for d in range(dims)])
        for axis, n in enumerate(patch_size)
    ]
    # The same centre as the plain cut has, so that the identity is that cut
    centre = [(n - p) // 2 + (p - 1) / 2 for n, p in zip(source_size, patch_size, strict=True)]
    planes = [
        sum((float(row[d]) * from_centre[d] for d in range(1, dims)), torch.tensor(c))
        for row, c in zip(matrix, centre, strict=True)
    ]
    steps = [float(row[0]) * from_centre[0] for row in matrix]
    voxels_a_row = math.prod(patch_size[1:])
    rows = max(1, BLOCK_VOXELS // voxels_a_row)
    for first in range(0, patch_size[0], rows):
        along = [(plane + step[first : first + rows]).flatten() for plane, step in zip(planes, steps, strict=True)]
        yield slice(first * voxels_a_row, first * voxels_a_row + len(along[0])), along


def _flat_index(along: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    index = along[0]
    for voxel, n in zip(along[1:], size[1:], strict=True):
        index = torch.add(voxel, index, alpha=n)
    return index


def _interpolate(source: Tensor, index: Tensor, weights: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Linear interpolation between a voxel and its next neighbours.

    Args:
        source: Flattened volume.
        index: The lower corner's place in it.
        weights: For each axis, the distance to the neighbour in `source`, and its weight.
    """
    if not weights:
        return source.index_select(0, index)
    (stride, weight), *others = weights
    return torch.lerp(_interpolate(source, index, others), _interpolate(source[stride:], index, others), weight)
