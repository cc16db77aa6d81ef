"""Logits on the network's grid, brought to the scan's grid: between planes, then between columns, then between rows.

Slabs of some rows become strips of some rows as they come, so that neither grid's logits are ever held whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.data.body import Box
from medseg.geometry import Array, Geometry
from medseg.inference.ensemble import Strip, Strips
from medseg.inference.sliding_window import Slab

STRIP_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Logits that are decided on at once: what a processor's cache holds, and what keeps a GPU busy."""


def mirrored(
    slabs: Iterable[Slab], box: Box, grid: Geometry, orientation: str, axis: int
) -> tuple[Iterator[Slab], Box, Geometry]:
    """Slabs of whole planes whose rows and columns run as they do in another orientation.

    Args:
        slabs: On a box of `grid`.
        box: Where it is.
        grid: Its axes are those of the orientation, in the same order, some of them running the other way.
        orientation: E.g. ``"RAS"``.
        axis: The one that planes follow each other along, which runs the same way in both.

    Returns:
        The slabs, the box and the grid.
    """
    _, flips = grid.axes_to(orientation)
    box = tuple(
        slice(n - side.stop, n - side.start) if flip else side
        for side, n, flip in zip(box, grid.shape, flips, strict=True)
    )
    inner = [a for a in range(3) if a != axis]
    dims = [2 + place for place, a in enumerate(inner) if flips[a]]
    first_row = box[inner[0]].start
    turned = (Slab(slab.first, first_row, slab.planes.flip(dims)) for slab in slabs)
    return turned, box, grid.oriented(orientation)


def has_bands(grid: Geometry, target: Geometry) -> bool:
    """Whether `resampled` takes slabs of some rows: not where the target's planes lie aslant."""
    return grid.matches(target) or grid.shares_field_of_view(target)


def resampled(
    slabs: Iterable[Slab], background: Sequence[float], *, box: Box, grid: Geometry, target: Geometry, axis: int
) -> Strips:
    """Linear interpolation on another grid, plane after plane along an axis.

    Args:
        slabs: Logits on a box of `grid`: all planes in order, or, see `has_bands`, in order for each band of rows.
        background: Logits around it, one for each of R channels.
        box: Where it is.
        grid: Where the logits are.
        target: Where they are wanted; its axes lie closest to those of `grid` of the same number.
        axis: The one that planes follow each other along.

    Yields:
        The target's planes, strip by strip, in order as the slabs are; without those that are background alone.
    """
    way = _way(grid, target, axis)
    bands: dict[int, _Band] = {}
    seams: dict[int, Tensor] = {}  # by planes of the target: the last row of the band before
    for slab in slabs:
        if slab.first_row not in bands:
            bands[slab.first_row] = _Band(grid.shape, box, axis, background, slab)
        yield from bands[slab.first_row].strips(slab, way, target.shape[axis], seams)
        del slab  # or it would be held while the next one is made


class _Band:
    """Some rows of a whole grid's planes (R, A, B), while slabs of a box in it come one after the other.

    The first band has the rows before the box, too, and the last one those behind it.
    """

    def __init__(self, shape: Sequence[int], box: Box, axis: int, background: Sequence[float], first: Slab) -> None:
        self.num_rows, num_columns = (n for a, n in enumerate(shape) if a != axis)
        rows, columns = (side for a, side in enumerate(box) if a != axis)
        stop = first.first_row + first.planes.shape[2]
        self.rows = slice(
            0 if first.first_row == rows.start else first.first_row, self.num_rows if stop == rows.stop else stop
        )
        self.within = slice(None), slice(first.first_row - self.rows.start, stop - self.rows.start), columns
        self.num_planes = shape[axis]
        self.reach = box[axis]
        self.number = 0  # of the target's plane to come
        self.held: dict[int, Tensor] = {}  # planes of slabs before
        values = torch.tensor(background, device=first.planes.device)[:, None, None]
        self.empty = values.expand(-1, self.rows.stop - self.rows.start, num_columns)

    def strips(self, slab: Slab, way: _Way, num_planes: int, seams: dict[int, Tensor]) -> Iterator[Strip]:
        """The band's rows of the target's planes that are known when the next slab is there."""
        self.first, self.planes = slab.first, slab.planes
        while self.number < num_planes and (needed := way.needed(self.number))[-1] < self.known:
            if self.holds_something(needed):
                plane = way.between(self.number, [self[n] for n in needed])
                if (seam := seams.pop(self.number, None)) is not None:
                    plane = torch.cat([seam, plane], dim=1)
                if way.seam and self.rows.stop < self.num_rows:
                    seams[self.number] = plane[:, -1:].clone()
                for first_row, logits in way.rows(plane, self.rows):
                    yield Strip(self.number, first_row, logits)
            self.number += 1
        self.keep(way.needed(self.number)[0] if self.number < num_planes else self.known)

    @property
    def known(self) -> int:
        """Up to which plane, and without it, they are there."""
        end = self.first + len(self.planes)
        return end if end < self.reach.stop else self.num_planes

    def holds_something(self, numbers: range) -> bool:
        """Whether some of the planes cut the box."""
        return numbers[0] < self.reach.stop and numbers[-1] >= self.reach.start

    def __getitem__(self, number: int) -> Tensor:
        if number in self.held:
            return self.held[number]
        if not self.reach.start <= number < self.reach.stop:
            return self.empty
        plane = self.planes[number - self.first]
        if plane.shape == self.empty.shape:
            return plane
        whole = self.empty.clone()
        whole[self.within] = plane
        return whole

    def keep(self, first: int) -> None:
        """Hold what is needed from one plane on, and let the slab go."""
        numbers = range(max(first, self.reach.start), self.first + len(self.planes))
        self.held = {n: self.held[n] if n in self.held else self[n].clone() for n in numbers}
        del self.planes


class _Way(Protocol):
    """How a plane of the target comes about."""

    seam: bool
    """Whether rows are made of those of two bands."""

    def needed(self, number: int) -> range:
        """The planes of the grid that it is made of; none of them is below those of the planes before it."""

    def between(self, number: int, planes: Sequence[Tensor]) -> Tensor:
        """The plane between those planes (R, A, B), or a band of it."""

    def rows(self, plane: Tensor, band: slice) -> Iterator[tuple[int, Tensor]]:
        """The target's rows (R, A', B') that a band of the plane adds, which the row before it may precede."""


def _way(grid: Geometry, target: Geometry, axis: int) -> _Way:
    if grid.matches(target):
        return _AsItIs()
    if grid.shares_field_of_view(target):
        return _Stretched(grid.shape, target.shape, axis)
    return _Sampled(grid.shape, target.shape, axis, np.linalg.inv(grid.affine) @ target.affine)


def _in_strips(start: int, stop: int, *, num_channels: int, num_columns: int, device: torch.device) -> Iterator[slice]:
    """Rows of a plane, as many as are to be worked on at once."""
    count = max(1, STRIP_BYTES[device.type] // (num_channels * num_columns * torch.float32.itemsize))
    for first in range(start, stop, count):
        yield slice(first, min(first + count, stop))


class _AsItIs:
    """Grids that are the same."""

    seam = False

    def needed(self, number: int) -> range:
        return range(number, number + 1)

    def between(self, number: int, planes: Sequence[Tensor]) -> Tensor:
        return planes[0]

    def rows(self, plane: Tensor, band: slice) -> Iterator[tuple[int, Tensor]]:
        channels, _, columns = plane.shape
        for part in _in_strips(band.start, band.stop, num_channels=channels, num_columns=columns, device=plane.device):
            yield part.start, plane[:, part.start - band.start : part.stop - band.start]


class _Stretched:
    """Grids with the same axes and faces: between two planes, then along their columns, then between two rows."""

    seam = True

    def __init__(self, old: Sequence[int], new: Sequence[int], axis: int) -> None:
        """From the grids' shapes, and the axis that planes follow each other along."""
        self.planes = _positions(old[axis], new[axis])
        (old_rows, _), (new_rows, self.num_columns) = (
            [n for a, n in enumerate(shape) if a != axis] for shape in (old, new)
        )
        self.between_rows = _positions(old_rows, new_rows)

    def needed(self, number: int) -> range:
        low, high, _ = self.planes
        return range(int(low[number]), int(high[number]) + 1)

    def between(self, number: int, planes: Sequence[Tensor]) -> Tensor:
        return planes[0] if len(planes) == 1 else torch.lerp(planes[0], planes[1], float(self.planes[2][number]))

    def rows(self, plane: Tensor, band: slice) -> Iterator[tuple[int, Tensor]]:
        low, high, share = self.between_rows
        channels, device, above = len(plane), plane.device, band.stop - plane.shape[1]
        start, stop = np.searchsorted(high, [band.start, band.stop]).tolist()
        for part in _in_strips(start, stop, num_channels=channels, num_columns=self.num_columns, device=device):
            first, last = int(low[part.start]), int(high[part.stop - 1])
            wide = self._widened(plane[:, first - above : last + 1 - above])
            rows, below = (torch.from_numpy(which[part] - first).to(device) for which in (low, high))
            found = wide.index_select(1, rows)
            found.lerp_(wide.index_select(1, below), torch.from_numpy(share[part]).to(device)[:, None])
            yield part.start, found

    def _widened(self, rows: Tensor) -> Tensor:
        """Rows (R, A, B) stretched to the number of columns."""
        channels, count, columns = rows.shape
        if columns == self.num_columns:
            return rows
        if rows.device.type != "cpu":  # a GPU takes few lines at a time
            return F.interpolate(rows[None], size=[count, self.num_columns], mode="bilinear", align_corners=False)[0]
        lines = rows.reshape(-1, 1, columns)  # in one dimension, which takes half of the time of two
        wide = F.interpolate(lines, size=self.num_columns, mode="linear", align_corners=False)
        return wide.reshape(channels, count, self.num_columns)


def _positions(old: int, new: int) -> tuple[Array, Array, Array]:
    """Between which two of the old, and how far from the first of them, the new ones lie."""
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0.0, old - 1.0)
    return np.floor(at).astype(np.int64), np.ceil(at).astype(np.int64), (at % 1).astype(np.float32)


class _Sampled:
    """Any two grids (a sheared scan and its straightened grid): a plane of the target lies aslant in the grid."""

    seam = False

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

    def between(self, number: int, planes: Sequence[Tensor]) -> Tensor:
        block = torch.stack(list(planes), dim=1 + self.axis)  # (R, I, J, K), one axis short
        position = self.first + number * self.step
        position[..., self.axis] -= self.needed(number).start
        last = np.maximum(np.asarray(block.shape[1:]) - 1, 1)
        position = (2 * position / last - 1)[..., ::-1]  # grid_sample: -1 to 1, and the last axis first
        where = torch.from_numpy(position.astype(np.float32))[None].to(block.device)
        sampled = F.grid_sample(block[None], where, padding_mode="border", align_corners=True)[0]
        return sampled.squeeze(1 + self.axis)

    def rows(self, plane: Tensor, band: slice) -> Iterator[tuple[int, Tensor]]:
        return _AsItIs().rows(plane, slice(0, plane.shape[1]))
