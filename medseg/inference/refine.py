"""Slabs of logits that a CRF makes follow the image, before they go to the scan's grid."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from medseg.data.body import Box
from medseg.inference.sliding_window import Slab
from medseg.inference.windows import Windows
from medseg.labels import Labels
from medseg.nets.crf import CRF, refine

POSSIBLE = 1e-3
"""Where no organ is as likely as that, the CRF is told that there is none for certain."""


@torch.inference_mode()
def refined(
    slabs: Iterable[Slab],
    image: Tensor,
    crf: CRF,
    labels: Labels,
    windows: Windows,
    *,
    spacing_mm: Sequence[float],
    told: list[str],
) -> Iterator[Slab]:
    """Slabs of whole planes after the CRF, which works on the box around all that may be an organ.

    That box of the network's grid is all that is held of a scan: six 32-bit numbers a voxel for each output.

    Args:
        slabs: What the network says, in any order.
        image: (C, I, J[, K]), as the network sees it.
        crf: With its numbers.
        labels: What the channels are.
        windows: Those over the image, whose box the slabs fill.
        spacing_mm: Voxel size along the image's axes.
        told: Is told how many voxels there were, whether all pairs of them were compared, and the seconds.

    Yields:
        The planes of the windows' box, in order.
    """
    order = [windows.outer, *windows.inner]
    volume = image.unsqueeze(1 + windows.outer) if windows.is_picture else image
    spacing = list(spacing_mm)
    if windows.is_picture:
        spacing.insert(windows.outer, 1.0)  # a slice has no neighbors
    spacing = [spacing[axis] for axis in order]
    box = tuple(windows.box[axis] for axis in order)  # of planes, rows and columns
    background = torch.tensor(labels.background, device=image.device)[:, None, None]
    empty = background.expand(-1, *(side.stop - side.start for side in box[1:]))  # (R, A, B)

    pieces = list(_pieces(slabs, labels, first_column=box[2].start))
    if not pieces:
        for number in range(box[0].start, box[0].stop):
            yield Slab(number, box[1].start, empty[None])
        return
    around = _around([where for where, _ in pieces], _margin(crf, spacing), box)
    size = [side.stop - side.start for side in around]
    logits = background[..., None].expand(-1, *size).clone()  # (R, P, A, B)
    while pieces:
        where, piece = pieces.pop()
        logits[(slice(None), *_within(where, around))] = piece
    seen = volume.permute(0, *(1 + axis for axis in order))[(slice(None), *around)]
    started = time.perf_counter()
    result = refine(logits, seen.contiguous(), spacing, crf, regions=bool(labels.regions))
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    seconds = time.perf_counter() - started
    told.append(f"{' × '.join(map(str, size))} voxels, {result.connections}, {seconds:.1f} s")
    del logits
    rows, columns = _within(around, box)[1:]
    for number in range(box[0].start, box[0].stop):
        plane = empty
        if around[0].start <= number < around[0].stop:
            plane = empty.clone()
            plane[:, rows, columns] = result.logits[:, number - around[0].start]
        yield Slab(number, box[1].start, plane[None])


def _pieces(slabs: Iterable[Slab], labels: Labels, *, first_column: int) -> Iterator[tuple[Box, Tensor]]:
    """Of each slab the box around all that may be an organ: where it is, and its logits (R, P, A, B)."""
    for slab in slabs:
        planes = slab.planes
        if labels.regions:
            possible = planes.amax(dim=1) > math.log(POSSIBLE / (1 - POSSIBLE))
        else:
            possible = planes[:, 0] - planes.logsumexp(dim=1) < math.log1p(-POSSIBLE)
        if not possible.any():
            continue
        inside = [_reach(possible.movedim(axis, 0).flatten(1).any(dim=1)) for axis in range(3)]
        starts = slab.first, slab.first_row, first_column
        where = tuple(slice(s.start + start, s.stop + start) for s, start in zip(inside, starts, strict=True))
        yield where, planes[inside[0], :, inside[1], inside[2]].movedim(1, 0).clone()


def _reach(found: Tensor) -> slice:
    """From the first to the last one that is true."""
    numbers = found.nonzero()
    return slice(int(numbers[0]), int(numbers[-1]) + 1)


def _margin(crf: CRF, spacing_mm: Sequence[float]) -> list[int]:
    """Voxels around an organ that have a say in where it ends."""
    reach_mm = crf.cutoff * max(crf.theta_alpha_mm, crf.theta_gamma_mm)
    return [math.ceil(reach_mm / spacing) for spacing in spacing_mm]


def _around(boxes: Sequence[Box], margin: Sequence[int], limits: Box) -> Box:
    return tuple(
        slice(
            max(limit.start, min(side.start for side in sides) - more),
            min(limit.stop, max(side.stop for side in sides) + more),
        )
        for sides, more, limit in zip(zip(*boxes, strict=True), margin, limits, strict=True)
    )


def _within(box: Box, outer: Box) -> Box:
    """A box counted from the corner of one around it."""
    return tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(box, outer, strict=True))
