"""From logits on the scan's own grid to its label map, some rows of a plane at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.geometry import Geometry, Volume
from medseg.inference.ensemble import Strip, probabilities
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

    def planes_of(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """An array (C, I, J[, K]) on the scan's grid as planes (P, C, A, B): a view, to be read or written."""
        whole = array if self.source.spatial_dims == 3 else array[..., None]
        order, flips = solid(self.source).axes_to(self._orientation)
        turned = whole.transpose(0, *(axis + 1 for axis in order))
        turned = turned[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in flips))]
        return np.moveaxis(turned, 1 + self.axis, 0)

    @property
    def _orientation(self) -> str:
        return self.orientation if self.source.spatial_dims == 3 else solid(self.source).orientation  # as it lies


def restored(
    strips: Iterable[Strip],
    labels: Labels,
    place: Place,
    *,
    chances: npt.NDArray[np.float32] | None = None,
    uncertainty: Uncertainty | None = None,
    entropy: npt.NDArray[np.uint8] | None = None,
) -> Volume:
    """Decide on the scan's voxels, some rows after the other.

    Args:
        strips: Logits of all that is not background alone.
        labels: What the channels are.
        place: Where they go.
        chances: Filled with the probabilities, (R, I, J[, K]); see `room_for_probabilities`.
        uncertainty: Told of every strip.
        entropy: Filled with its entropies in percent, (1, I, J[, K]).

    Returns:
        The label map (1, I, J[, K]), uint8 or int16, on the scan's grid.
    """
    found = np.zeros((1, *place.source.shape), labels.dtype)
    label_planes = place.planes_of(found)
    chance_planes = None if chances is None else place.planes_of(chances)
    entropy_planes = None if entropy is None else place.planes_of(entropy)
    for strip in strips:
        where = strip.number, slice(None), slice(strip.first_row, strip.first_row + strip.logits.shape[1])
        label = labels.segment(strip.logits[None])
        label_planes[where] = label.cpu().numpy()
        if chance_planes is not None:
            chance_planes[where] = probabilities(strip.logits, labels).cpu().numpy()
        if uncertainty is not None:
            of_strip = uncertainty.add(strip.logits, label[0])
            if entropy_planes is not None:
                entropy_planes[where] = (of_strip[None] * PERCENT).round().byte().cpu().numpy()
        del strip  # or the slab that it is part of would be held while the next one is made
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
