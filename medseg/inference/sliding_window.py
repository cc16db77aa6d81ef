"""A network over volumes and pictures of any size: window by window, seams blended, slab by slab.

Windows come in order along one axis, so that what they have passed is finished and can be handed on. No more than a
patch's depth of the logits is therefore held, however long the scan; in bands, hardly more than half of that.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor

from medseg.errors import ModelError
from medseg.inference.windows import Axis, Numbers, Windows
from medseg.labels import Labels

CLASSES_AT_ONCE = 8
"""Channels of a window that are turned round at once, so that no second copy of a window is held."""

Part = tuple[int, slice, Tensor]
"""Some planes and channels of a window: the first plane, which channels, and their values (P, R, A, B), float32."""


@dataclass(frozen=True)
class Slab:
    """Finished planes of logits, or the finished rows of some.

    Args:
        first: The number of the first plane along the volume's outer axis.
        first_row: The number of the first row along the first of the other axes.
        planes: (P, R, A, B), float32: P planes of R channels, A and B being the other axes.
    """

    first: int
    first_row: int
    planes: Tensor


class Clock:
    """Adds up the time that a scan's networks compute, and the time that they wait for another scan's.

    A GPU is not waited for until the sum is asked for.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what is computed inside."""
        if device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        stream = torch.cuda.current_stream(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        yield
        end.record(stream)
        self._events.append((begin, end))

    @property
    def seconds(self) -> float:
        """The sum."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds


@torch.inference_mode()
def slabs(
    image: Tensor,
    network: Callable[[Tensor], Tensor],
    windows: Windows,
    *,
    background: Sequence[float],
    batch_size: int = 1,
    autocast: torch.dtype | None = None,
    device: torch.device | None = None,
    clock: Clock | None = None,
    in_bands: bool = False,
    turn: AbstractContextManager[object] | None = None,
) -> Iterator[Slab]:
    """Predict a volume or picture, from one end of the outer axis to the other.

    Args:
        image: (C, I, J[, K]), on the device where the logits are to be put together.
        network: In eval mode; (B, C, patch) → (B, R, patch). For mirroring, see `medseg.inference.tta`.
        windows: Those over the image.
        background: The logits of each of the network's R output channels where there is nothing, see
            `medseg.labels.Labels.background`.
        batch_size: Windows given to the network at once.
        autocast: Lower precision for the network, e.g. ``torch.bfloat16``; None leaves it as it is.
        device: Where the network is; None: where the image is. Else windows travel there and back.
        clock: Told how long the network computes.
        in_bands: Hand rows on as soon as they are finished, which takes less memory, instead of whole planes.
        turn: Held as long as there are windows to be predicted.

    Raises:
        ModelError: At the end, if the network said NaN.

    Yields:
        All planes of the windows' box, in order, each once. In bands, planes of the same rows come in order.
    """
    blended = _Blended(windows, torch.tensor(background, device=image.device), in_bands=in_bands)
    padded = windows.padded(image.unsqueeze(1 + windows.outer) if windows.is_picture else image)
    device, clock = device or image.device, clock or Clock()
    strange = torch.zeros((), dtype=torch.bool, device=image.device)
    coming = (numbers for numbers in windows if numbers not in windows.empty)
    with turn or nullcontext():
        while batch := list(islice(coming, batch_size)):
            patches = torch.stack([padded[windows.read(numbers)] for numbers in batch]).to(device)
            with torch.autocast(device.type, autocast) if autocast else nullcontext(), clock.running(device):
                predicted = network(patches)  # (B, R, patch)
            del patches
            strange |= predicted.sum(dtype=torch.float32).isnan().to(image.device)
            for n, numbers in enumerate(batch):
                yield from blended.finished(before=numbers)
                blended.add(numbers, predicted[n].to(image.device))
            del predicted  # or the next would be made beside it
    if strange:  # asked once, as a GPU would be waited for each time
        raise ModelError("E-NAN", "the network says NaN; was it trained to the end? try another checkpoint, or fp32")
    yield from blended.finished()


def label_map(predicted: Iterable[Slab], labels: Labels, windows: Windows) -> Tensor:
    """What `slabs` yields as a label map (I, J[, K]), uint8 or int16, on the same grid."""
    planes = torch.cat([labels.segment(slab.planes) for slab in predicted])
    return planes[0] if windows.is_picture else planes.movedim(0, windows.outer)


class _Blended:
    """The sums over the windows, in blocks: made when the first window touches them, handed on after the last.

    Blocks begin where windows begin; along the outer axis, and behind the last window's first row, also where they end,
    so that little is held that no window has touched. The outer axis comes first in memory: planes are read in one
    piece. Windows come without the empty ones, which are put in between, as if the network had seen nothing there.
    """

    def __init__(self, windows: Windows, background: Tensor, *, in_bands: bool) -> None:
        self.windows = windows
        self.background = background[:, None, None]
        self.in_bands = in_bands
        self.order = (windows.outer, *windows.inner)
        self.axes = [windows.axes[a] for a in self.order]
        self.weights = [axis.weights.to(background.device) for axis in self.axes]
        planes, rows, _ = self.axes
        self.planes = _stretches({*planes.starts, *_ends(planes)})
        behind = {end for end in _ends(rows) if end > rows.starts[-1]}
        self.rows = _stretches({*rows.starts, *behind} if in_bands else {0, rows.covered})
        self.next_layer = dict(pairwise((*planes.starts, planes.covered)))
        self.blocks: dict[tuple[int, int], Tensor] = {}  # (P, R, A, B), by their first plane and row
        self.empty = deque(numbers for numbers in windows if numbers in windows.empty)
        self.corner = 0, 0

    def finished(self, before: Numbers | None = None) -> Iterator[Slab]:
        """What no window touches any more when this one is the next; without one, all that is left."""
        corner = self._corner(before) if before else (self.axes[0].covered, 0)
        while self.empty and self._corner(self.empty[0]) < corner:
            numbers = self.empty.popleft()
            yield from self._passed(self._corner(numbers))
            self._add(numbers, [(0, slice(None), self.background.expand(self.axes[0].written, -1, 1, 1))])
        yield from self._passed(corner)

    def add(self, numbers: Numbers, patch: Tensor) -> None:
        """Add a window, (R, patch)."""
        self._add(numbers, _parts(patch, self.windows.outer))

    def _corner(self, numbers: Numbers) -> tuple[int, int]:
        """The plane and row that a window begins with; without bands, none is finished before its whole layer is."""
        plane, row, _ = (axis.starts[numbers[a]] for axis, a in zip(self.axes, self.order, strict=True))
        return plane, row if self.in_bands else 0

    def _passed(self, corner: tuple[int, int]) -> Iterator[Slab]:
        """The blocks between the corner of the window before and that of the next."""
        (plane, row), self.corner = self.corner, corner
        last_row = corner[1] if corner[0] == plane else self.axes[1].covered
        for rows in _meeting(self.rows, slice(row, last_row)):
            for planes in _meeting(self.planes, slice(plane, self.next_layer[plane])):
                yield from self._handed_on(planes, rows)

    def _handed_on(self, planes: slice, rows: slice) -> Iterator[Slab]:
        block = self.blocks.pop((planes.start, rows.start))
        own = [_overlap(part, axis.inside) for part, axis in zip((planes, rows), self.axes, strict=False)]
        if all(part.start < part.stop for part in own):
            inside = block[_shifted(own[0], -planes.start), :, _shifted(own[1], -rows.start), self.axes[2].inside]
            first, first_row = (
                part.start - axis.inside.start + self.windows.box[a].start
                for part, axis, a in zip(own, self.axes, self.order, strict=False)
            )
            yield Slab(first, first_row, inside)

    def _add(self, numbers: Numbers, parts: Iterable[Part]) -> None:
        """Add a window, part by part."""
        depth, height, width = (weights[numbers[a]] for weights, a in zip(self.weights, self.order, strict=True))
        weight = (depth[:, None, None] * height[:, None] * width)[:, None]  # (P, 1, A, B)
        planes, rows, columns = (
            slice(axis.starts[numbers[a]], axis.starts[numbers[a]] + axis.written)
            for axis, a in zip(self.axes, self.order, strict=True)
        )
        touched = list(self._touched(planes, rows))
        for first, channels, values in parts:
            values = values.expand(-1, -1, *weight.shape[2:])
            part = slice(first, first + len(values))
            for block, into, own in touched:
                shared = _overlap(part, own[0])
                if shared.start < shared.stop:
                    block[_shifted(shared, into[0].start - own[0].start), channels, into[1], columns].addcmul_(
                        values[_shifted(shared, -first), :, own[1]], weight[shared, :, own[1]]
                    )

    def _touched(self, planes: slice, rows: slice) -> Iterator[tuple[Tensor, tuple[slice, slice], tuple[slice, slice]]]:
        """The blocks that a window lies in, where in them, and which part of it does."""
        for of_planes in _meeting(self.planes, planes):
            for of_rows in _meeting(self.rows, rows):
                shared = _overlap(of_planes, planes), _overlap(of_rows, rows)
                into = _shifted(shared[0], -of_planes.start), _shifted(shared[1], -of_rows.start)
                own = _shifted(shared[0], -planes.start), _shifted(shared[1], -rows.start)
                yield self._block(of_planes, of_rows), into, own

    def _block(self, planes: slice, rows: slice) -> Tensor:
        """The block that begins there, at first with nothing in it."""
        corner = planes.start, rows.start
        if corner not in self.blocks:
            size = (planes.stop - planes.start, len(self.background), rows.stop - rows.start, self.axes[2].covered)
            self.blocks[corner] = torch.zeros(size, device=self.background.device)
        return self.blocks[corner]


def _ends(axis: Axis) -> list[int]:
    return [start + axis.written for start in axis.starts]


def _stretches(borders: Iterable[int]) -> list[slice]:
    """What lies between the borders."""
    return [slice(start, stop) for start, stop in pairwise(sorted(borders))]


def _meeting(stretches: Sequence[slice], part: slice) -> Sequence[slice]:
    """Those that share something with a part, of stretches that follow each other."""
    first = bisect_right(stretches, part.start, key=lambda stretch: stretch.stop)
    return stretches[first : bisect_left(stretches, part.stop, key=lambda stretch: stretch.start)]


def _overlap(one: slice, other: slice) -> slice:
    return slice(max(one.start, other.start), min(one.stop, other.stop))


def _shifted(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _parts(patch: Tensor, outer: int) -> Iterator[Part]:
    """A patch (R, I, J, K) as parts, of which each fits a processor's cache: by classes, or where they come last by planes."""
    channels = len(patch)
    if patch.device.type != "cpu":
        yield 0, slice(None), patch.movedim(outer + 1, 0).float()
    elif patch.stride(0) == 1 < channels:
        for number, plane in enumerate(patch.movedim(outer + 1, 0).movedim(1, -1)):  # (A, B, R)
            turned = plane.reshape(-1, channels).float().t().contiguous()  # a matrix, which torch turns in blocks
            yield number, slice(None), turned.reshape(1, channels, *plane.shape[:2])
    else:
        for first in range(0, channels, CLASSES_AT_ONCE):
            group = slice(first, first + CLASSES_AT_ONCE)
            yield 0, group, _outer_first(patch[group].float(), outer)


def _outer_first(patch: Tensor, outer: int) -> Tensor:
    """A patch (R, I, J, K) as (P, R, A, B)."""
    if outer < 2:
        return patch.movedim(outer + 1, 0)
    channels, height, width, depth = patch.shape  # turned as a matrix, which torch does in blocks that fit its cache
    return patch.reshape(-1, depth).t().contiguous().reshape(depth, channels, height, width)
