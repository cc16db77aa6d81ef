"""Volumes on another grid: images linearly, label maps by the vote of the voxels around.

Preprocessing keeps the field of view, so the grids are parallel, and linear interpolation falls apart
into one axis after the other: plane by plane, one thread takes 0.6 of the time of ITK's resampling on two.
Other grids go through SimpleITK.

The planes are NumPy's work, on one thread: torch's threads would meet hundreds of times a scan, and on a
busy machine (the next case is prepared while the network computes) each meeting waits for the slowest.

Linear interpolation does not smooth before it thins out, like the common pipelines (MONAI, nnU-Net).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg.geometry import Geometry

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.integer[Any]]
Voxels = npt.NDArray[Any]


def resample_image(image: Tensor, source: Geometry, target: Geometry) -> Tensor:
    """Linear interpolation.

    Args:
        image: (C, I, J, K) or (C, I, J) on `source`.
        source: Its grid.
        target: The grid wanted. Voxels outside the image get its lowest value.

    Returns:
        float32 on `target`; (C, I', J', K') or (C, I', J').
    """
    if target.matches(source):
        return image.float()
    if not source.shares_field_of_view(target):
        return _resample_by_itk(image.float(), source, target, is_label=False)
    if source.spatial_dims == 2:
        return _stretched(image[..., None], (*target.shape, 1))[..., 0]
    return _stretched(image, target.shape)


def resample_label(label: Tensor, source: Geometry, target: Geometry) -> Tensor:
    """The label that linear interpolation of every label's own mask would give the most weight.

    Each voxel takes a vote of the (at most eight) voxels around it, weighted as in linear
    interpolation. Where votes are equal, the neighbor with the lowest index decides, so that no label
    grows on average.

    Args:
        label: Integer, (1, I, J, K) or (1, I, J) on `source`.
        source: Its grid.
        target: The grid wanted. Voxels outside the label map get 0.

    Returns:
        Of the same type, on `target`.
    """
    if target.matches(source):
        return label
    if not source.shares_field_of_view(target):
        return _resample_by_itk(label, source, target, is_label=True)
    if source.spatial_dims == 2:
        return _voted(label[0, ..., None], (*target.shape, 1))[None, ..., 0]
    return _voted(label[0], target.shape)[None]


@dataclass(frozen=True)
class _Steps:
    """For each voxel along a new axis the two old ones beside it, and their weights.

    Args:
        low: Index of the first, (N,).
        high: Index of the second, (N,); the first again where that alone counts.
        weights: (2, N), adding up to 1.
    """

    low: Integers
    high: Integers
    weights: Floats

    @classmethod
    def between(cls, old: int, new: int) -> _Steps:
        """Both axes span the same length; beyond the centers of the outer voxels, their value goes on."""
        center = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0, old - 1)
        low = np.floor(center).astype(np.intp)
        second = (center - low).astype(np.float32)
        return cls(low, np.where(second > 0, low + 1, low), np.stack([1 - second, second]))


def _memory_order(volume: Tensor) -> list[int]:
    """The axes, from the one whose planes lie in one piece in memory to the one whose voxels do."""
    return sorted(range(volume.ndim), key=volume.stride, reverse=True)


def _stretched(image: Tensor, shape: Sequence[int]) -> Tensor:
    """`resample_image` between parallel grids, (C, I, J, K), plane by plane; the result lies in memory as the image."""
    order = _memory_order(image[0])
    depth, rows, columns = (_Steps.between(image.shape[axis + 1], shape[axis]) for axis in order)
    result = np.empty((len(image), *[shape[axis] for axis in order]), np.float32)
    for channel, stretched in zip(image, result, strict=True):
        planes: Voxels = channel.permute(order).numpy()
        for index, (low, high, weight) in enumerate(zip(depth.low, depth.high, depth.weights[1], strict=True)):
            plane = planes[low]
            if high != low:
                plane = _mixed(plane, planes[high], weight)
            plane = _mixed(plane.take(rows.low, 0), plane.take(rows.high, 0), rows.weights[1][:, None])
            stretched[index] = _mixed(plane.take(columns.low, 1), plane.take(columns.high, 1), columns.weights[1])
    return torch.from_numpy(result.transpose(0, *(np.argsort(order) + 1)))


def _mixed(first: Voxels, second: Voxels, weight: np.float32 | Floats) -> Floats:
    """``first + weight * (second - first)``, as float32."""
    difference = second.astype(np.float32)
    difference -= first
    difference *= weight
    difference += first
    return difference


def _voted(label: Tensor, shape: Sequence[int]) -> Tensor:
    """`resample_label` between parallel grids, (I, J, K), plane by plane."""
    order = _memory_order(label)
    planes: Voxels = label.permute(order).numpy()
    depth, rows, columns = (_Steps.between(label.shape[axis], shape[axis]) for axis in order)
    result = np.empty([shape[axis] for axis in order], planes.dtype)
    for index, (low, high) in enumerate(zip(depth.low, depth.high, strict=True)):
        result[index], agreed = _unanimous(planes[low], planes[high], rows, columns)
        row, column = np.nonzero(~agreed)
        voters = np.stack(  # (8, N), the voxels around each one that needs a vote
            [
                plane[at_row[row], at_column[column]]
                for plane in (planes[low], planes[high])
                for at_row in (rows.low, rows.high)
                for at_column in (columns.low, columns.high)
            ]
        )
        shares = depth.weights[:, index, None], rows.weights[:, row], columns.weights[:, column]
        result[index, row, column] = _elected(voters, shares, order)
    return torch.from_numpy(result.transpose(np.argsort(order)))


def _unanimous(low: Voxels, high: Voxels, rows: _Steps, columns: _Steps) -> tuple[Voxels, npt.NDArray[np.bool_]]:
    """The first of the eight voxels around each new one of a plane, and whether the others are equal to it."""
    agreed = low == high
    first, second = low.take(rows.low, 0), low.take(rows.high, 0)
    agreed = agreed.take(rows.low, 0) & agreed.take(rows.high, 0) & (first == second)
    agreed = agreed.take(columns.low, 1) & agreed.take(columns.high, 1)
    first, second = first.take(columns.low, 1), first.take(columns.high, 1)
    return first, agreed & (first == second)


def _elected(voters: Voxels, shares: Sequence[Floats], order: Sequence[int]) -> Voxels:
    """The label with the most weight.

    Args:
        voters: Labels around each voxel, (8, N), the axes in their order in memory.
        shares: For each of these axes the weights of its two sides, (2, N).
        order: Which axes of the volume they are; ties go to the lowest index there, however it lies in memory.
    """
    first, second, third = (shares[order.index(axis)] for axis in range(3))
    weights = (first[:, None, None] * second[:, None] * third).reshape(8, -1)
    voters = voters.reshape(2, 2, 2, -1).transpose(*np.argsort(order), 3).reshape(8, -1)
    votes = np.stack([np.where(voters == candidate, weights, 0).sum(0) for candidate in voters])  # (8, N)
    return np.take_along_axis(voters, votes.argmax(0)[None], axis=0)[0]


def _resample_by_itk(volume: Tensor, source: Geometry, target: Geometry, *, is_label: bool) -> Tensor:
    """Between any grids. The map from index to index is given to ITK as an affine, for its images cannot be sheared."""
    import SimpleITK as sitk  # few scans need it, and it takes a while to import

    n = source.spatial_dims
    between = np.linalg.inv(source.affine) @ target.affine
    move = sitk.AffineTransform(between[:n, :n].ravel().tolist(), between[:n, 3].tolist())
    interpolator = sitk.sitkLabelLinear if is_label else sitk.sitkLinear
    channels = []
    for channel in volume:
        image = sitk.GetImageFromArray(channel.numpy().transpose())
        outside = 0.0 if is_label else float(channel.min())
        grid = target.shape, move, interpolator, [0.0] * n, [1.0] * n, np.eye(n).ravel().tolist()
        channels.append(sitk.GetArrayFromImage(sitk.Resample(image, *grid, outside)).transpose())
    return torch.from_numpy(np.stack(channels))
