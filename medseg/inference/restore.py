"""From logits on the network's grid to a label map on the scan's own grid, one plane at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.geometry import Array, Geometry, Volume
from medseg.labels import Labels


def restore(
    logits: Tensor,
    labels: Labels,
    *,
    grid: Geometry,
    source: Geometry,
    orientation: str,
    with_probabilities: bool = False,
) -> tuple[Volume, Volume | None]:
    """Bring a prediction back to the scan or picture it was made for.

    Logits are interpolated linearly, the outermost ones reaching to the edge, and decided on the
    scan's voxels. Only one plane of the scan's size is held for all channels.

    Args:
        logits: (R, I, J[, K]) on `grid`.
        labels: What the channels are.
        grid: `Preprocessing.geometry` of `source`.
        source: The scan's grid; its axes need not be orthogonal.
        orientation: The orientation of `grid`, e.g. ``"RAS"``.
        with_probabilities: Whether to return probabilities too; they take R times the scan's memory.

    Returns:
        The label map (1, I, J[, K]), uint8 or int16, and the probabilities (R, I, J[, K]), float32, or
        None; both with `source` as geometry.
    """
    if source.spatial_dims == 2:
        thick = _one_slice(source)
        restored = restore(
            logits.unsqueeze(-1), labels,
            grid=_one_slice(grid), source=thick, orientation=thick.orientation, with_probabilities=with_probabilities,
        )  # fmt: skip
        label, probabilities = (v and Volume(v.array[..., 0], source) for v in restored)
        assert label is not None
        return label, probabilities
    label_planes, probability_planes = [], []
    for plane in resampled_planes(logits, grid, source.oriented(orientation)):  # (R, J, K)
        label_planes.append(labels.segment(plane[None])[0])
        if with_probabilities:
            probability_planes.append(plane.sigmoid() if labels.regions else plane.softmax(dim=0))
    label = _as_source(torch.stack(label_planes)[None], source, orientation)
    if not with_probabilities:
        return label, None
    return label, _as_source(torch.stack(probability_planes, dim=1), source, orientation)


def resampled_planes(logits: Tensor, grid: Geometry, target: Geometry) -> Iterator[Tensor]:
    """Linear interpolation on another grid, plane after plane along its first axis.

    Args:
        logits: (R, I, J, K) on `grid`.
        grid: Where the logits are.
        target: Where they are wanted.

    Yields:
        (R, J, K) of the target's planes.
    """
    if grid.matches(target):
        yield from logits.unbind(1)
    elif grid.shares_field_of_view(target):
        yield from _stretched(logits, target)
    else:
        yield from _sampled(logits, target, np.linalg.inv(grid.affine) @ target.affine)


def _stretched(logits: Tensor, target: Geometry) -> Iterator[Tensor]:
    """Grids with the same axes and faces: between two planes, then within the plane."""
    num_planes, last = target.shape[0], logits.shape[1] - 1
    for number in range(num_planes):
        position = min(max((number + 0.5) * logits.shape[1] / num_planes - 0.5, 0.0), float(last))
        lower = int(position)
        plane = torch.lerp(logits[:, lower], logits[:, min(lower + 1, last)], position - lower)
        yield F.interpolate(plane[None], size=target.shape[1:], mode="bilinear", align_corners=False)[0]


def _sampled(logits: Tensor, target: Geometry, to_grid: Array) -> Iterator[Tensor]:
    """Any two grids (a sheared scan and its straightened grid), by the way from target voxel to grid voxel."""
    steps = np.stack(np.meshgrid(0, *map(np.arange, target.shape[1:]), indexing="ij"), axis=-1)  # (1, J, K, 3)
    first = steps @ to_grid[:3, :3].T + to_grid[:3, 3]
    last = np.maximum(np.asarray(logits.shape[1:]) - 1, 1)
    for number in range(target.shape[0]):
        position = first + number * to_grid[:3, 0]
        position = (2 * position / last - 1)[..., ::-1]  # grid_sample: -1 to 1, and the last axis first
        where = torch.from_numpy(position.astype(np.float32))[None].to(logits.device)
        yield F.grid_sample(logits[None], where, padding_mode="border", align_corners=True)[0, :, 0]


def _one_slice(picture: Geometry) -> Geometry:
    return Geometry((*picture.shape, 1), picture.affine)


def _as_source(tensor: Tensor, source: Geometry, orientation: str) -> Volume:
    """Undo `Volume.oriented` for an array (C, I, J, K)."""
    order, flips = source.axes_to(orientation)
    array: npt.NDArray[np.generic] = tensor.cpu().numpy()
    array = array[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in flips))]
    array = array.transpose(0, *(order.index(axis) + 1 for axis in range(len(order))))
    return Volume(np.ascontiguousarray(array), source)
