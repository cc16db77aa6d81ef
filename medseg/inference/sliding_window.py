"""A network over volumes and pictures of any size: window by window, seams blended, slab by slab.

Windows come in order along one axis, so that what they have passed is finished and can be handed on. A buffer as
deep as a patch is therefore all that is held of the logits, however long the scan.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from medseg.inference.windows import Numbers, Windows
from medseg.labels import Labels

CLASSES_AT_ONCE = 8
"""Channels of a window that are turned round at once, so that no second copy of a window is held."""


@dataclass(frozen=True)
class Slab:
    """Finished planes of logits.

    Args:
        first: The number of the first plane along the volume's outer axis.
        planes: (P, R, A, B), float32: P planes of R channels, A and B being the other axes. Its memory is used again
            when the next slab is asked for. Planes are those of the windows' box.
    """

    first: int
    planes: Tensor


class Clock:
    """Adds up the time that networks compute. A GPU is not waited for until the sum is asked for."""

    def __init__(self) -> None:
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

    Yields:
        All planes of the windows' box, in order, each once.
    """
    padded = windows.padded(image.unsqueeze(1 + windows.outer) if windows.is_picture else image)
    blended = _Blended(windows, torch.tensor(background, device=image.device))
    device, clock = device or image.device, clock or Clock()
    coming = (numbers for numbers in windows if numbers not in windows.empty)
    while batch := list(islice(coming, batch_size)):
        patches = torch.stack([padded[windows.read(numbers)] for numbers in batch]).to(device)
        with torch.autocast(device.type, autocast) if autocast else nullcontext(), clock.running(device):
            predicted = network(patches)  # (B, R, patch)
        del patches
        for n, numbers in enumerate(batch):
            yield from blended.finished(windows.start(numbers))
            blended.add(numbers, predicted[n].to(image.device))
        del predicted  # or the next would be made beside it
    yield from blended.finished(windows.axes[windows.outer].covered)


def label_map(predicted: Iterable[Slab], labels: Labels, windows: Windows) -> Tensor:
    """What `slabs` yields as a label map (I, J[, K]), uint8 or int16, on the same grid."""
    planes = torch.cat([labels.segment(slab.planes) for slab in predicted])
    return planes[0] if windows.is_picture else planes.movedim(0, windows.outer)


class _Blended:
    """The sums over the windows, as deep as one of them.

    The outer axis comes first in memory, so that planes are finished, moved and read in one piece. Windows come
    without the empty ones, which are put in between: as if the network had seen nothing there.
    """

    def __init__(self, windows: Windows, background: Tensor) -> None:
        self.windows = windows
        self.background = background[:, None, None]
        outer = windows.axes[windows.outer]
        covered = [windows.axes[a].covered for a in windows.inner]
        self.sums = torch.zeros((outer.written, len(background), *covered), device=background.device)
        self.first = 0  # the plane of the padded box that the sums begin with
        self.weights = [axis.weights.to(background.device) for axis in windows.axes]
        self.empty = deque(numbers for numbers in windows if numbers in windows.empty)

    def finished(self, before: int) -> Iterator[Slab]:
        """The planes before the next window's first, which the sums begin with then."""
        while self.empty and self.windows.start(self.empty[0]) < before:
            numbers = self.empty.popleft()
            yield from self._moved(self.windows.start(numbers))
            self._add(numbers, self.background)
        yield from self._moved(before)

    def add(self, numbers: Numbers, patch: Tensor) -> None:
        """Add a window that begins where the sums do, (R, patch)."""
        for start in range(0, len(patch), CLASSES_AT_ONCE):
            part = _outer_first(patch[start : start + CLASSES_AT_ONCE].float(), self.windows.outer)
            self._add(numbers, part, start)

    def _moved(self, before: int) -> Iterator[Slab]:
        count = before - self.first
        if not count:
            return
        outer, *inner = (self.windows.axes[a].inside for a in (self.windows.outer, *self.windows.inner))
        first, last = max(self.first, outer.start), min(before, outer.stop)
        if first < last:
            own = slice(first - self.first, last - self.first)
            offset = self.windows.box[self.windows.outer].start - outer.start
            yield Slab(first + offset, self.sums[own, :, inner[0], inner[1]])
        for start in range(0, len(self.sums) - count, count):  # in pieces that do not overlap their new place
            piece = self.sums[start + count : start + 2 * count]
            self.sums[start : start + len(piece)] = piece
        self.sums[max(0, len(self.sums) - count) :] = 0
        self.first = before

    def _add(self, numbers: Numbers, values: Tensor, channel: int = 0) -> None:
        """Add values (P, R, A, B), or some that are alike everywhere, to the channels from one on."""
        windows = self.windows
        depth, height, width = (self.weights[a][numbers[a]] for a in (windows.outer, *windows.inner))
        rows, columns = (
            slice(start, start + axis.written)
            for axis, start in ((windows.axes[a], windows.axes[a].starts[numbers[a]]) for a in windows.inner)
        )
        weight = (depth[:, None, None] * height[:, None] * width)[:, None]  # (P, 1, A, B)
        self.sums[:, channel : channel + values.shape[-3], rows, columns].addcmul_(values, weight)


def _outer_first(patch: Tensor, outer: int) -> Tensor:
    """A patch (R, I, J, K) as (P, R, A, B)."""
    if outer < 2:
        return patch.movedim(outer + 1, 0)
    channels, height, width, depth = patch.shape  # turned as a matrix, which torch does in blocks that fit its cache
    return patch.reshape(-1, depth).t().contiguous().reshape(depth, channels, height, width)
