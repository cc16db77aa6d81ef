"""Prediction in one piece, for tests that are about one of its halves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from medseg.geometry import Geometry, Volume
from medseg.inference.resampling import resampled
from medseg.inference.restore import PICTURE_AXIS, Place, restored, room_for_probabilities, solid
from medseg.inference.sliding_window import Slab, slabs
from medseg.inference.windows import Windows
from medseg.labels import Labels
from medseg.model import Window


def sliding_window(image: Tensor, network: nn.Module, window: Window, *, num_outputs: int, **how: Any) -> Tensor:
    """All logits (R, I, J[, K]) of an image (C, I, J[, K])."""
    windows = Windows.over(image.shape[1:], window)
    found = slabs(image, network, windows, background=[0.0] * num_outputs, **how)
    planes = put_together(found, windows, num_outputs)
    return planes[0] if windows.is_picture else planes.movedim(0, 1 + windows.outer)


def put_together(slabs: Iterable[Slab], windows: Windows, num_outputs: int) -> Tensor:
    """All planes (P, R, A, B); each voxel has to come once, and those of the same rows in order."""
    depth, height, width = (windows.axes[a].size for a in (windows.outer, *windows.inner))
    planes = torch.full((depth, num_outputs, height, width), torch.nan)
    come: dict[int, int] = {}
    for slab in slabs:
        thick, _, high, _ = slab.planes.shape
        room = planes[slab.first : slab.first + thick, :, slab.first_row : slab.first_row + high]
        assert room.isnan().all()
        assert come.get(slab.first_row, 0) == slab.first
        come[slab.first_row] = slab.first + thick
        room[:] = slab.planes
    assert not planes.isnan().any()
    return planes


def restore(
    logits: Tensor,
    labels: Labels,
    *,
    grid: Geometry,
    source: Geometry,
    orientation: str,
    axis: int = 0,
    thickness: int = 3,
    with_probabilities: bool = False,
) -> tuple[Volume, Volume | None]:
    """The way back of logits (R, I, J[, K]), handed over in slabs of some planes."""
    if source.spatial_dims == 2:
        logits, axis = logits[..., None], PICTURE_AXIS
    place = Place(source, orientation, axis)
    grid, box = solid(grid), tuple(slice(0, n) for n in solid(grid).shape)
    slabs = in_slabs(logits.movedim(1 + axis, 0), thickness)
    strips = resampled(slabs, labels.background, box=box, grid=grid, target=place.target, axis=axis)
    chances = room_for_probabilities(labels, place) if with_probabilities else None
    label = restored(strips, labels, place, chances=chances)
    return label, None if chances is None else Volume(chances, source)


def in_slabs(planes: Tensor, thickness: int) -> Any:
    """Slabs whose memory is overwritten when the next one is asked for, as those of a prediction are."""
    memory = torch.empty_like(planes[:thickness])
    for first in range(0, len(planes), thickness):
        part = planes[first : first + thickness]
        memory[: len(part)] = part
        yield Slab(first, 0, memory[: len(part)])
        memory.fill_(float("nan"))
