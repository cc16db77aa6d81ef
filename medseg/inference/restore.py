"""From logits on the network's grid to a label map on the scan's own grid, one plane at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.data.body import Box
from medseg.geometry import Array, Geometry, Volume
from medseg.inference.sliding_window import Slab
from medseg.labels import Labels


def restored(
    slabs: Iterable[Slab],
    labels: Labels,
    *,
    axis: int,
    grid: Geometry,
    source: Geometry,
    orientation: str,
    box: Box | None = None,
    with_probabilities: bool = False,
) -> tuple[Volume, Volume | None]:
    """Bring a prediction back to the scan or picture it was made for, while it is being made.

    Logits are interpolated linearly, the outermost ones reaching to the edge, and decided on the
    scan's voxels. Of the scan's size only one plane is held for all channels.

    Args:
        slabs: Logits on `grid`, or a box of it, all planes in order.
        labels: What the channels are.
        axis: The one that planes follow each other along; of a picture it does not matter.
        grid: `Preprocessing.geometry` of `source`.
        source: The scan's grid; its axes need not be orthogonal.
        orientation: The orientation of `grid`, e.g. ``"RAS"``.
        box: The part of `grid` that the logits are of, background being around it; None: all of it.
        with_probabilities: Whether to return probabilities too; they take R times the scan's memory.

    Returns:
        The label map (1, I, J[, K]), uint8 or int16, and the probabilities (R, I, J[, K]), float32, or
        None; both with `source` as geometry.
    """
    if source.spatial_dims == 2:
        thick = _one_slice(source)
        label, probabilities = restored(
            slabs, labels, axis=2,
            grid=_one_slice(grid), source=thick, orientation=thick.orientation, with_probabilities=with_probabilities,
        )  # fmt: skip
        return Volume(label.array[..., 0], source), probabilities and Volume(probabilities.array[..., 0], source)
    target = source.oriented(orientation)
    found = np.zeros((1, *source.shape), labels.dtype)
    chances = np.zeros((labels.num_outputs, *source.shape), np.float32) if with_probabilities else None
    if chances is not None and not labels.regions:
        chances[0] = 1
    box = box or tuple(slice(0, n) for n in grid.shape)
    planes = resampled_planes(slabs, labels.background, box=box, grid=grid, target=target, axis=axis)
    for number, plane in planes:  # (R, A, B)
        place = (slice(None),) * (1 + axis) + (number,)
        _as_oriented(found, source, orientation)[place] = labels.segment(plane[None]).cpu().numpy()
        if chances is not None:
            of_plane = plane.sigmoid() if labels.regions else plane.softmax(dim=0)
            _as_oriented(chances, source, orientation)[place] = of_plane.cpu().numpy()
    return Volume(found, source), None if chances is None else Volume(chances, source)


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


def _one_slice(picture: Geometry) -> Geometry:
    return Geometry((*picture.shape, 1), picture.affine)


def _as_oriented(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], source: Geometry, orientation: str) -> Array:
    """A view of an array (C, I, J, K) on the source's grid whose axes lie as `Volume.oriented` lays them."""
    order, flips = source.axes_to(orientation)
    turned = array.transpose(0, *(axis + 1 for axis in order))
    return turned[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in flips))]  # type: ignore[return-value]
