"""From logits on the network's grid to a label map on the scan's own grid, one plane at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.data.body import Box
from medseg.geometry import Array, Geometry, Volume
from medseg.inference.ensemble import probabilities
from medseg.inference.sliding_window import Slab
from medseg.inference.uncertainty import PERCENT, Uncertainty
from medseg.labels import Labels

PICTURE_AXIS = 2
"""The axis that the one slice of a picture lies across."""


@dataclass(frozen=True)
class Place:
    """Where a scan's or picture's planes are to go: one after the other on its own grid.

    Args:
        source: The grid; its axes need not be orthogonal.
        orientation: The orientation of the network's grid, e.g. ``"RAS"``.
        axis: The one of the network's grid that planes follow each other along; `PICTURE_AXIS` for pictures.
    """

    source: Geometry
    orientation: str
    axis: int

    @property
    def target(self) -> Geometry:
        """The scan's grid, its axes laid as those of the network's grid; of a picture, a slice thick."""
        return solid(self.source).oriented(self._orientation)

    @property
    def axis_of_source(self) -> int:
        """The scan's axis that planes follow each other along."""
        return solid(self.source).axes_to(self._orientation)[0][self.axis]

    def put(self, plane: npt.NDArray[Any], number: int, into: npt.NDArray[Any]) -> None:
        """Write a plane (C, A, B) into an array (C, I, J[, K]) on the scan's grid."""
        whole = into if self.source.spatial_dims == 3 else into[..., None]
        order, flips = solid(self.source).axes_to(self._orientation)
        turned = whole.transpose(0, *(axis + 1 for axis in order))
        turned = turned[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in flips))]
        turned[(slice(None),) * (1 + self.axis) + (number,)] = plane

    @property
    def _orientation(self) -> str:
        return self.orientation if self.source.spatial_dims == 3 else solid(self.source).orientation  # as it lies


def restored(
    planes: Iterable[tuple[int, Tensor]],
    labels: Labels,
    place: Place,
    *,
    chances: npt.NDArray[np.float32] | None = None,
    uncertainty: Uncertainty | None = None,
    entropy: npt.NDArray[np.uint8] | None = None,
) -> Volume:
    """Decide on the scan's voxels, plane by plane.

    Args:
        planes: Number and logits (R, A, B) of the planes that are not background alone.
        labels: What the channels are.
        place: Where they go.
        chances: Filled with the probabilities, (R, I, J[, K]); see `room_for_probabilities`.
        uncertainty: Told of every plane.
        entropy: Filled with its entropies in percent, (1, I, J[, K]).

    Returns:
        The label map (1, I, J[, K]), uint8 or int16, on the scan's grid.
    """
    found = np.zeros((1, *place.source.shape), labels.dtype)
    for number, plane in planes:
        label = labels.segment(plane[None])
        place.put(label.cpu().numpy(), number, found)
        if chances is not None:
            place.put(probabilities(plane, labels).cpu().numpy(), number, chances)
        if uncertainty is not None:
            of_plane = uncertainty.add(plane, label[0])
            if entropy is not None:
                place.put((of_plane[None] * PERCENT).round().byte().cpu().numpy(), number, entropy)
    return Volume(found, place.source)


def room_for_probabilities(labels: Labels, place: Place, file: Path | None = None) -> npt.NDArray[np.float32]:
    """An array (R, I, J[, K]) for them, background as yet: in memory, or of a file that takes its place.

    Args:
        labels: What the channels are.
        place: Where planes will go; those of a channel lie one after the other in the file.
        file: Made, R times four bytes a voxel large. Nothing but the array says what is in it: it is to be deleted.

    Raises:
        OSError: If the disk has not that much room.
    """
    shape = (labels.num_outputs, *place.source.shape)
    if file is None:
        chances = np.zeros(shape, np.float32)
    else:
        with file.open("wb") as stream:
            if hasattr(os, "posix_fallocate"):  # a disk that is found full later would kill the process
                os.posix_fallocate(stream.fileno(), 0, 4 * math.prod(shape))
        along = 1 + place.axis_of_source if place.source.spatial_dims == 3 else 2
        order = (0, along, *(axis for axis in reversed(range(1, len(shape))) if axis != along))
        stored = np.memmap(file, np.float32, "r+", shape=tuple(shape[axis] for axis in order))
        chances = stored.transpose(np.argsort(order))
    if not labels.regions:
        chances[0] = 1
    return chances


def solid(grid: Geometry) -> Geometry:
    """A volume's grid as it is; a picture's as that of a volume with one slice."""
    return grid if grid.spatial_dims == 3 else Geometry((*grid.shape, 1), grid.affine)


def resampled_planes(
    slabs: Iterable[Slab], background: Sequence[float], *, box: Box, grid: Geometry, target: Geometry, axis: int
) -> Iterator[tuple[int, Tensor]]:
    """Linear interpolation on another grid, plane after plane along an axis.

    Args:
        slabs: Logits on a box of `grid`, all planes in order.
        background: Logits around it, one for each of R channels.
        box: Where it is.
        grid: Where the logits are.
        target: Where they are wanted; its axes lie closest to those of `grid` of the same number.
        axis: The one that planes follow each other along.

    Yields:
        The number and (R, A, B) of the target's planes, in order, without those that are background alone.
    """
    way = _way(grid, target, axis)
    planes = _Planes(grid.shape, box, axis, background)
    number = 0
    for slab in slabs:
        planes.take(slab)
        while number < target.shape[axis] and (needed := way.needed(number))[-1] < planes.known:
            if planes.holds_something(needed):
                yield number, way.plane(number, [planes[n] for n in needed])
            number += 1
        if number < target.shape[axis]:
            planes.keep(way.needed(number)[0])


class _Planes:
    """The planes (R, A, B) of a whole grid, while slabs of a box in it come one after the other."""

    def __init__(self, shape: Sequence[int], box: Box, axis: int, background: Sequence[float]) -> None:
        self.shape = shape
        self.axis = axis
        self.reach = box[axis]
        self.within = (slice(None), *(side for a, side in enumerate(box) if a != axis))
        self.background = background
        self.held: dict[int, Tensor] = {}  # of slabs before

    def take(self, slab: Slab) -> None:
        """Go on with the next slab."""
        self.slab = slab
        size = [n for a, n in enumerate(self.shape) if a != self.axis]
        self.empty = torch.tensor(self.background, device=slab.planes.device)[:, None, None].expand(-1, *size)

    @property
    def known(self) -> int:
        """Up to which plane, and without it, they are there."""
        end = self.slab.first + len(self.slab.planes)
        return end if end < self.reach.stop else self.shape[self.axis]

    def holds_something(self, numbers: range) -> bool:
        """Whether some of the planes cut the box."""
        return numbers[0] < self.reach.stop and numbers[-1] >= self.reach.start

    def __getitem__(self, number: int) -> Tensor:
        if number in self.held:
            return self.held[number]
        if not self.reach.start <= number < self.reach.stop:
            return self.empty
        plane = self.slab.planes[number - self.slab.first]
        if plane.shape == self.empty.shape:
            return plane
        whole = self.empty.clone()
        whole[self.within] = plane
        return whole

    def keep(self, first: int) -> None:
        """Hold what is needed from one plane on, as the slab's memory is about to be used again."""
        end = self.slab.first + len(self.slab.planes)
        numbers = range(max(first, self.reach.start), end)
        self.held = {n: self.held[n] if n in self.held else self[n].clone() for n in numbers}


class _Way(Protocol):
    """How a plane of the target comes about."""

    def needed(self, number: int) -> range:
        """The planes of the grid that it is made of; none of them is below those of the planes before it."""

    def plane(self, number: int, planes: Sequence[Tensor]) -> Tensor:
        """The plane (R, A', B'), from those planes (R, A, B)."""


def _way(grid: Geometry, target: Geometry, axis: int) -> _Way:
    if grid.matches(target):
        return _AsItIs()
    if grid.shares_field_of_view(target):
        inner = [n for a, n in enumerate(target.shape) if a != axis]
        return _Stretched(grid.shape[axis], target.shape[axis], inner)
    return _Sampled(grid.shape, target.shape, axis, np.linalg.inv(grid.affine) @ target.affine)


@dataclass(frozen=True)
class _AsItIs:
    """Grids that are the same."""

    def needed(self, number: int) -> range:
        return range(number, number + 1)

    def plane(self, number: int, planes: Sequence[Tensor]) -> Tensor:
        return planes[0]


@dataclass(frozen=True)
class _Stretched:
    """Grids with the same axes and faces: between two planes, then within the plane.

    Args:
        num_old: Planes of the grid.
        num_new: Planes of the target.
        inner: Size of the target's planes.
    """

    num_old: int
    num_new: int
    inner: Sequence[int]

    def _position(self, number: int) -> float:
        return min(max((number + 0.5) * self.num_old / self.num_new - 0.5, 0.0), self.num_old - 1.0)

    def needed(self, number: int) -> range:
        position = self._position(number)
        return range(int(position), math.ceil(position) + 1)

    def plane(self, number: int, planes: Sequence[Tensor]) -> Tensor:
        plane = planes[0] if len(planes) == 1 else torch.lerp(planes[0], planes[1], self._position(number) % 1)
        if tuple(plane.shape[1:]) == tuple(self.inner):
            return plane
        return F.interpolate(plane[None], size=list(self.inner), mode="bilinear", align_corners=False)[0]


class _Sampled:
    """Any two grids (a sheared scan and its straightened grid): a plane of the target lies aslant in the grid."""

    def __init__(self, old: Sequence[int], new: Sequence[int], axis: int, to_grid: Array) -> None:
        """From the grids' shapes, the axis, and the way from target voxel to grid voxel (4, 4)."""
        self.axis = axis
        self.old = old
        steps = np.stack(
            np.meshgrid(*[np.arange(1 if a == axis else n) for a, n in enumerate(new)], indexing="ij"), axis=-1
        )
        self.first = steps @ to_grid[:3, :3].T + to_grid[:3, 3]  # (…, 3), of the target's first plane
        self.step = to_grid[:3, axis]
        along = self.first[..., axis]
        self.reach = float(along.min()), float(along.max())

    def needed(self, number: int) -> range:
        if self.step[self.axis] <= 0:  # sheared so far that the axes of both grids do not belong together
            return range(self.old[self.axis])
        low, high = (
            min(max(end + number * self.step[self.axis], 0.0), self.old[self.axis] - 1.0) for end in self.reach
        )
        return range(int(low), math.ceil(high) + 1)

    def plane(self, number: int, planes: Sequence[Tensor]) -> Tensor:
        block = torch.stack(list(planes), dim=1 + self.axis)  # (R, I, J, K), one axis short
        position = self.first + number * self.step
        position[..., self.axis] -= self.needed(number).start
        last = np.maximum(np.asarray(block.shape[1:]) - 1, 1)
        position = (2 * position / last - 1)[..., ::-1]  # grid_sample: -1 to 1, and the last axis first
        where = torch.from_numpy(position.astype(np.float32))[None].to(block.device)
        sampled = F.grid_sample(block[None], where, padding_mode="border", align_corners=True)[0]
        return sampled.squeeze(1 + self.axis)
