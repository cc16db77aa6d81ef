"""A network over volumes and pictures of any size: window by window, seams blended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.model import Weighting, Window

SIGMA_SCALE = 1 / 8
"""Standard deviation of the Gaussian weights, as a share of the patch (nnU-Net's value)."""


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


@torch.inference_mode()
def sliding_window(
    image: Tensor,
    network: nn.Module,
    window: Window,
    *,
    num_outputs: int,
    batch_size: int = 1,
    autocast: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Predict a whole volume or picture.

    A volume smaller than the patch lies in its middle, zeros around it, as in training. A patch with
    two entries is for a network on slices (`medseg.nets.slices.OnSlices`): every slice is predicted, the
    outermost ones standing in for the context they lack. To such a network a picture is a single slice.

    Args:
        image: (C, I, J[, K]), on the device where the logits are to be put together.
        network: In eval mode; (B, C, patch) → (B, R, patch). For mirroring, see `medseg.inference.tta`.
        window: Patch, overlap and weighting; its `mirror_axes` are not read here.
        num_outputs: R, the network's output channels.
        batch_size: Windows given to the network at once.
        autocast: Lower precision for the network, e.g. ``torch.bfloat16``; None leaves it as it is.
        device: Where the network is; None: where the image is. Else windows travel there and back.

    Returns:
        Logits (R, I, J[, K]), float32.
    """
    if image.ndim == 3:
        thick = sliding_window(
            image.unsqueeze(1 + window.slice_axis), network, window,
            num_outputs=num_outputs, batch_size=batch_size, autocast=autocast, device=device,
        )  # fmt: skip
        return thick.squeeze(1 + window.slice_axis)
    axes = _axes(image.shape[1:], window, image.device)
    padded = _pad(image, axes)
    logits = torch.zeros((num_outputs, *(axis.covered for axis in axes)), device=image.device)
    windows = _windows(axes)
    device = device or image.device
    while batch := list(islice(windows, batch_size)):
        patches = torch.stack([padded[_read(axes, numbers)] for numbers in batch]).to(device)
        with torch.autocast(device.type, autocast) if autocast else nullcontext():
            predicted = network(patches)  # (B, R, patch)
        for numbers, patch in zip(batch, predicted.float().to(image.device), strict=True):
            logits[_written(axes, numbers)].addcmul_(patch, _weight(axes, numbers))
    return logits[(slice(None), *(axis.inside for axis in axes))]


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


def _axes(shape: Sequence[int], window: Window, device: torch.device) -> list[Axis]:
    patch = list(window.patch_size)
    slice_axis = None
    if len(patch) < len(shape):
        slice_axis = window.slice_axis
        patch.insert(slice_axis, 1 + 2 * window.context_slices)
    axes = []
    for number, (size, read) in enumerate(zip(shape, patch, strict=True)):
        if number == slice_axis:
            starts = tuple(range(size))
            axes.append(Axis(size, read, 1, window.context_slices, starts, torch.ones(size, 1, device=device)))
            continue
        before = max(0, read // 2 - size // 2)
        starts = window_starts(max(size, read), read, window.overlap)
        weights = _axis_weights(read, starts, window.weighting).to(device)
        axes.append(Axis(size, read, read, before, starts, weights))
    return axes


def _axis_weights(patch: int, starts: Sequence[int], weighting: Weighting) -> Tensor:
    factor = torch.ones(patch, dtype=torch.float64)
    if weighting == "gaussian":
        offset = torch.arange(patch, dtype=torch.float64) - (patch - 1) / 2
        factor = torch.exp(-0.5 * (offset / (patch * SIGMA_SCALE)) ** 2)
    total = torch.zeros(starts[-1] + patch, dtype=torch.float64)
    for start in starts:
        total[start : start + patch] += factor
    return torch.stack([factor / total[start : start + patch] for start in starts]).float()


def _pad(image: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Zeros around a volume smaller than the patch, copies of the outermost slices around slices."""
    zeros: list[int] = []
    for number, axis in enumerate(axes):
        if axis.written == axis.read:
            zeros = [axis.before, axis.padded - axis.size - axis.before, *zeros]  # F.pad starts with the last axis
        else:
            zeros = [0, 0, *zeros]
            slices = torch.arange(-axis.before, axis.size + axis.before, device=image.device)
            image = image.index_select(number + 1, slices.clamp(0, axis.size - 1))
    return F.pad(image, zeros) if any(zeros) else image


def _windows(axes: Sequence[Axis]) -> Iterator[tuple[int, ...]]:
    """Number of each window along each axis; in order along the axis of slices, or else the longest.

    What lies behind the window at hand along that axis is therefore finished.
    """
    outer = max(range(len(axes)), key=lambda a: (axes[a].written < axes[a].read, axes[a].size))
    order = [outer, *(a for a in range(len(axes)) if a != outer)]
    for numbers in product(*(range(len(axes[a].starts)) for a in order)):
        yield tuple(numbers[order.index(a)] for a in range(len(axes)))


def _read(axes: Sequence[Axis], numbers: Sequence[int]) -> tuple[slice, ...]:
    starts = [axis.starts[n] for axis, n in zip(axes, numbers, strict=True)]
    return (slice(None), *(slice(s, s + axis.read) for s, axis in zip(starts, axes, strict=True)))


def _written(axes: Sequence[Axis], numbers: Sequence[int]) -> tuple[slice, ...]:
    starts = [axis.starts[n] for axis, n in zip(axes, numbers, strict=True)]
    return (slice(None), *(slice(s, s + axis.written) for s, axis in zip(starts, axes, strict=True)))


def _weight(axes: Sequence[Axis], numbers: Sequence[int]) -> Tensor:
    """Weight of each voxel of a window, (patch)."""
    weight = torch.ones((), device=axes[0].weights.device)
    for axis, number in zip(axes, numbers, strict=True):
        weight = weight[..., None] * axis.weights[number]
    return weight
