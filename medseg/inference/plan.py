"""What a scan will take, before it is predicted: windows, seconds and memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from medseg.geometry import Geometry
from medseg.inference.resampling import STRIP_BYTES, has_bands
from medseg.inference.restore import Place, solid
from medseg.inference.windows import Windows
from medseg.model import ModelSpec

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

FLOAT_BYTES = 4
SOURCE_BYTES = 2  # an int16 scan


@dataclass(frozen=True)
class WindowCost:
    """What a batch of windows takes in the network.

    Args:
        seconds: Wall time.
        num_bytes: Memory of the network's device, beyond the weights; 0 where it cannot be told.
    """

    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a scan takes.

    Args:
        num_windows: All of them; what lies in the air around a patient is known only when the scan has been read.
        seconds: In the network.
        host_bytes: Memory at the peak, beyond the loaded model.
        device_bytes: The same on the network's device, where that is a GPU; else 0.
    """

    num_windows: int
    seconds: float
    host_bytes: int
    device_bytes: int

    def __add__(self, other: Plan) -> Plan:
        """Of another model beside this one."""
        return Plan(
            self.num_windows + other.num_windows,
            self.seconds + other.seconds,
            self.host_bytes + other.host_bytes,
            self.device_bytes + other.device_bytes,
        )


@torch.inference_mode()
def window_cost(
    network: nn.Module, shape: Sequence[int], *, device: torch.device, autocast: torch.dtype | None = None
) -> WindowCost:
    """Predict a batch of random windows, the second time by the clock.

    Args:
        network: In eval mode, on the device.
        shape: Of the batch, (B, C, patch).
        device: Where to do it.
        autocast: As for `medseg.inference.sliding_window.slabs`.
    """
    windows = torch.rand(*shape, device=device)
    with torch.autocast(device.type, autocast) if autocast else nullcontext():
        network(windows)
        before = _memory(device, reset=True)
        started = time.perf_counter()
        network(windows)
        after = _memory(device)
    return WindowCost(time.perf_counter() - started, max(0, after - before))


def plan_of(spec: ModelSpec, source: Geometry, cost: WindowCost, *, batch_size: int, on_gpu: bool) -> Plan:
    """What a scan on this grid takes.

    Args:
        spec: The model.
        source: The scan's grid.
        cost: Of a batch of windows.
        batch_size: Windows in it.
        on_gpu: Whether the network is on a GPU, and the logits are put together there.
    """
    grid = spec.preprocessing.geometry(source)
    num_windows = len(Windows.over(grid.shape, spec.window))
    channels = len(spec.channels)
    image = FLOAT_BYTES * channels * grid.num_voxels
    scan = (SOURCE_BYTES * channels + spec.labels.dtype().itemsize) * source.num_voxels
    host = scan + 2 * image  # the next one is read meanwhile
    work = logits_bytes(spec, source, on_gpu=on_gpu) + cost.num_bytes
    seconds = -(-num_windows // batch_size) * cost.seconds
    return Plan(num_windows, seconds, host + (0 if on_gpu else work), image + work if on_gpu else 0)


def logits_bytes(spec: ModelSpec, source: Geometry, *, on_gpu: bool) -> int:
    """What is held of the logits at once, at the most, where they are put together."""
    grid = spec.preprocessing.geometry(source)
    windows = Windows.over(grid.shape, spec.window)
    target = Place(source, spec.preprocessing.orientation, windows.outer).target
    voxels = windows.num_held(in_bands=has_bands(solid(grid), target)) + 2 * _plane(grid, windows.outer)
    return FLOAT_BYTES * spec.labels.num_outputs * voxels + STRIP_BYTES["cuda" if on_gpu else "cpu"]


def _plane(grid: Geometry, axis: int) -> int:
    return grid.num_voxels // grid.shape[axis] if axis < grid.spatial_dims else grid.num_voxels


def _memory(device: torch.device, *, reset: bool = False) -> int:
    """Bytes in use with `reset`, from where on peaks are counted; else the peak since. 0 where nothing tells."""
    if device.type == "cuda":
        if reset:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            return torch.cuda.memory_allocated(device)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            _CLEAR.write_text("5")  # the high-water mark, see proc(5)
        wanted = "VmRSS:" if reset else "VmHWM:"
        return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith(wanted))
    except OSError:  # no Linux
        return 0
