"""Where windows stand on a volume, in which order they come, and what each counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.data.body import Body, Box
from medseg.model import Weighting, Window

SIGMA_SCALE = 1 / 8
"""Standard deviation of the Gaussian weights, as a share of the patch (nnU-Net's value)."""

Numbers = tuple[int, ...]
"""Which window, counted along each axis."""


@dataclass(frozen=True)
class Axis:
    """How windows stand along one axis of a volume.

    Because windows stand on a grid and weights are products of one factor an axis, the factors can
    be divided by their sum here, once: a voxel's value is final when its last window is added.

    Args:
        size: Voxels of the volume.
        read: Voxels that a window reads.
        written: Voxels that it predicts: all it reads, or on the axis of slices only the middle one.
        before: Voxels of padding in front of the first.
        starts: First voxel of each window, counted from the padding's first.
        weights: (windows, written), adding up to one over the windows that cover a voxel.
    """

    size: int
    read: int
    written: int
    before: int
    starts: tuple[int, ...]
    weights: Tensor

    @property
    def padded(self) -> int:
        return self.starts[-1] + self.read

    @property
    def covered(self) -> int:
        """Voxels that the windows predict, the padded ones among them."""
        return self.starts[-1] + self.written

    @property
    def inside(self) -> slice:
        """The volume's own voxels among the predicted ones."""
        first = self.before if self.written == self.read else 0
        return slice(first, first + self.size)


@dataclass(frozen=True)
class Windows:
    """The windows over a volume.

    A volume smaller than the patch lies in its middle, zeros around it, as in training. A patch with two entries is
    for a network on slices (`medseg.nets.slices.OnSlices`): every slice is predicted, the outermost ones standing in
    for the context they lack. To such a network a picture is a single slice.

    Args:
        box: The part of the volume that they stand on.
        axes: One for each axis of that part.
        outer: The axis that windows come in order along: that of slices, or else the longest, if no other is wanted.
        is_picture: Whether the volume is a picture's single slice.
        empty: Windows that need no network, as there is nothing but air in them.
        num_in_air: How many more there would be without a body.
    """

    box: Box
    axes: tuple[Axis, ...]
    outer: int
    is_picture: bool = False
    empty: frozenset[Numbers] = frozenset()
    num_in_air: int = 0

    @classmethod
    def over(
        cls, shape: Sequence[int], window: Window, *, body: Body | None = None, outer: int | None = None
    ) -> Windows:
        """Those over a volume (I, J, K) or a picture (I, J) of this shape.

        Args:
            shape: Voxels along each axis.
            window: Patch, overlap and weighting.
            body: Where the patient is, which `Window.crop` needs.
            outer: The axis that windows of a volume come in order along; None: see the class.
        """
        slice_axis = window.slice_axis if len(window.patch_size) == 2 else None
        if len(shape) == 2:
            assert slice_axis is not None
            thick = (*shape[:slice_axis], 1, *shape[slice_axis:])
            return replace(cls.over(thick, window), is_picture=True)
        patch = list(window.patch_size)
        if slice_axis is not None:
            patch.insert(slice_axis, 1 + 2 * window.context_slices)
        whole = tuple(slice(0, n) for n in shape)
        everywhere = cls._on(whole, patch, slice_axis, window, outer)
        if body is None or window.crop == "none":
            return everywhere
        spared = everywhere.touching(body)
        if window.crop == "body":
            around = tuple(
                side if axis == slice_axis else _widened(found, read, size)  # slices want their neighbors
                for axis, (side, found, read, size) in enumerate(zip(whole, body.box, patch, shape, strict=True))
            )
            on_box = cls._on(around, patch, slice_axis, window, outer).touching(body)
            spared = min(spared, on_box, key=lambda windows: windows.num_computed)
        return replace(spared, num_in_air=len(everywhere) - spared.num_computed)

    @classmethod
    def _on(cls, box: Box, patch: Sequence[int], slice_axis: int | None, window: Window, outer: int | None) -> Windows:
        axes = []
        for axis, (side, read) in enumerate(zip(box, patch, strict=True)):
            size = side.stop - side.start
            if axis == slice_axis:
                axes.append(Axis(size, read, 1, window.context_slices, tuple(range(size)), torch.ones(size, 1)))
                continue
            starts = window_starts(max(size, read), read, window.overlap)
            weights = _axis_weights(read, starts, window.weighting)
            axes.append(Axis(size, read, read, max(0, read // 2 - size // 2), starts, weights))
        if outer is None:
            longest = max(range(len(axes)), key=lambda axis: axes[axis].size)
            outer = longest if slice_axis is None else slice_axis
        return cls(box, tuple(axes), outer)

    def touching(self, body: Body) -> Windows:
        """The same, those that hold nothing of a body passed over."""
        empty = frozenset(numbers for numbers in self if not body.touches(self._place(numbers)))
        return replace(self, empty=empty)

    def __len__(self) -> int:
        return math.prod(len(axis.starts) for axis in self.axes)

    @property
    def num_computed(self) -> int:
        """Windows that the network sees."""
        return len(self) - len(self.empty)

    def __iter__(self) -> Iterator[Numbers]:
        """All of them; what lies before the window at hand along the outer axis is therefore finished."""
        inner = self.inner
        for numbers in product(*(range(len(self.axes[a].starts)) for a in (self.outer, *inner))):
            placed = dict(zip((self.outer, *inner), numbers, strict=True))
            yield tuple(placed[a] for a in range(len(self.axes)))

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """The other axes."""
        return tuple(a for a in range(len(self.axes)) if a != self.outer)

    def num_held(self, *, in_bands: bool) -> int:
        """Voxels whose logits are held at once, at the most, while `medseg.inference.sliding_window.slabs` passes."""
        planes, rows, columns = (self.axes[a] for a in (self.outer, *self.inner))
        (step, *_), (row_step, *_) = (np.diff((*axis.starts, axis.covered)).tolist() for axis in (planes, rows))
        band = min(rows.covered, rows.written + row_step) if in_bands else rows.covered
        return ((planes.written - step) * rows.covered + step * band) * columns.covered

    def read(self, numbers: Numbers) -> tuple[slice, ...]:
        """What a window takes of the padded image (C, I, J, K)."""
        starts = (axis.starts[n] for axis, n in zip(self.axes, numbers, strict=True))
        return (slice(None), *(slice(s, s + axis.read) for s, axis in zip(starts, self.axes, strict=True)))

    def _place(self, numbers: Numbers) -> Box:
        """The voxels of the volume that a window predicts."""
        place = []
        for axis, number, side in zip(self.axes, numbers, self.box, strict=True):
            first = side.start + axis.starts[number] - axis.inside.start
            place.append(slice(max(side.start, first), min(first + axis.written, side.stop)))
        return tuple(place)

    def padded(self, image: Tensor) -> Tensor:
        """The box of an image (C, I, J, K): zeros around one smaller than the patch, copies of the outermost slices around slices."""
        image = image[(slice(None), *self.box)]
        zeros: list[int] = []
        for number, axis in enumerate(self.axes):
            if axis.written == axis.read:
                zeros = [axis.before, axis.padded - axis.size - axis.before, *zeros]  # F.pad starts with the last axis
            else:
                zeros = [0, 0, *zeros]
                if axis.before:
                    slices = torch.arange(-axis.before, axis.size + axis.before, device=image.device)
                    image = image.index_select(number + 1, slices.clamp(0, axis.size - 1))
        return F.pad(image, zeros) if any(zeros) else image


def window_starts(size: int, patch: int, overlap: float) -> tuple[int, ...]:
    """First voxel of each window along an axis: evenly spaced, the first and the last at the borders.

    Args:
        size: Voxels of the volume, at least `patch`.
        patch: Voxels of the window.
        overlap: Least share of a window that the next one covers again.
    """
    step = max(1.0, patch * (1 - overlap))
    num_steps = -int(-(size - patch) // step)  # rounded up
    return tuple(round(n * (size - patch) / max(1, num_steps)) for n in range(num_steps + 1))


def _widened(side: slice, patch: int, size: int) -> slice:
    """A stretch of an axis, made as long as a patch where the axis is."""
    missing = max(0, patch - (side.stop - side.start))
    start = max(0, min(side.start - missing // 2, size - max(patch, side.stop - side.start)))
    return slice(start, min(size, max(side.stop, start + patch)))


def _axis_weights(patch: int, starts: Sequence[int], weighting: Weighting) -> Tensor:
    factor = torch.ones(patch, dtype=torch.float64)
    if weighting == "gaussian":
        offset = torch.arange(patch, dtype=torch.float64) - (patch - 1) / 2
        factor = torch.exp(-0.5 * (offset / (patch * SIGMA_SCALE)) ** 2)
    total = torch.zeros(starts[-1] + patch, dtype=torch.float64)
    for start in starts:
        total[start : start + patch] += factor
    return torch.stack([factor / total[start : start + patch] for start in starts]).float()
