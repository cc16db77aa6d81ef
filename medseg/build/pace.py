"""How long a training will take, roughly: one of its steps is measured, on a smaller patch where it would take long."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from medseg.build.model import Hardware, network, specification
from medseg.data.manifest import Manifest
from medseg.errors import MedsegError
from medseg.inference.predictor import has_bf16
from medseg.memory import is_out_of_memory
from medseg.nets.slices import OnSlices
from medseg.workflow import Workflow

BUDGET_SECONDS = 2.0
"""A step that would take longer is not measured, but extrapolated from a smaller patch by its voxels."""

_FORWARD_SHARE = 1 / 3  # of a step; the way back takes twice as long as the way there


@dataclass(frozen=True)
class Pace:
    """What one step of a training takes.

    Args:
        seconds: Of a whole batch of whole patches, forward and backward.
        how: What was measured, for people.
    """

    seconds: float
    how: str


def measured_pace(workflow: Workflow, source: Manifest, patch: Sequence[int]) -> Pace | None:
    """Time one step of the workflow's network on random numbers, on the device that training would use.

    Args:
        workflow: The workflow.
        source: Its manifest.
        patch: In three axes.

    Returns:
        None where the network cannot be built, or does not fit into memory.
    """
    device = Hardware().accelerator
    try:
        net: Any = network(specification(workflow, source), deep_supervision=workflow.train.deep_supervision)
        precision = workflow.train.precision
        autocast = precision == "bf16" or (precision == "auto" and has_bf16(device))
        return _pace(net.to(device).train(), workflow, len(source.channels), tuple(patch), device, autocast=autocast)
    except MedsegError:
        return None
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return None
        raise


def hours(workflow: Workflow, pace: Pace, shapes: Sequence[Sequence[int]], patch: Sequence[int]) -> float:
    """The whole training: its steps, and the windows of its validations; reading is taken to hide behind them.

    Args:
        workflow: The workflow.
        pace: What one step takes.
        shapes: Of the cases held out, on the network's grid.
        patch: As in `measured_pace`.
    """
    train, validate, infer = workflow.train, workflow.validate_, workflow.infer
    window = pace.seconds / train.batch_size * _FORWARD_SHARE
    validations = math.ceil(train.iterations / train.validate_every)
    windows = validations * sum(_num_windows(s, patch, validate.overlap) for s in shapes[: validate.max_cases])
    scored = sum(_num_windows(shape, patch, infer.overlap) for shape in shapes)
    windows += (2 << len(infer.mirror_axes)) * scored  # best and last, in all mirrored copies
    return (train.iterations * train.accumulate * pace.seconds + windows * window) / 3600


def _pace(
    net: Any, workflow: Workflow, num_channels: int, patch: tuple[int, ...], device: str, *, autocast: bool
) -> Pace:
    batch, fixed = workflow.train.batch_size, workflow.data.slice_axis if isinstance(net, OnSlices) else None
    axes = [axis for axis in range(len(patch)) if axis != fixed]
    least = (net.network if isinstance(net, OnSlices) else net).min_size
    size = list(patch)
    for axis, smallest in zip(axes, least, strict=True):
        size[axis] = min(patch[axis], max(smallest, patch[axis] // 8))
    while True:
        seconds = min(
            _step(net, (batch, num_channels, *size), device, autocast=autocast) for _ in range(2)
        )  # the first one warms up
        larger = [min(whole, 2 * n) for whole, n in zip(patch, size, strict=True)]
        if larger == size or seconds * math.prod(larger) / math.prod(size) > BUDGET_SECONDS:
            break
        size = larger
    share = math.prod(size) / math.prod(patch)
    scaled = "" if share == 1 else f", scaled to {batch} × {_times(patch)}"
    how = f"one step of {batch} × {_times(size)} voxels takes {seconds:.2g} s on this machine's {device}{scaled}"
    return Pace(seconds / share, how)


def _step(net: Any, shape: Sequence[int], device: str, *, autocast: bool) -> float:
    image = torch.rand(*shape, device=device)
    started = time.monotonic()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        outputs = net(image)
        loss = sum(output.float().square().mean() for output in (outputs if isinstance(outputs, list) else [outputs]))
    torch.autograd.backward(loss)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started


def _num_windows(shape: Sequence[int], patch: Sequence[int], overlap: float) -> int:
    num_windows = 1
    for size, read in zip(shape, patch, strict=True):
        num_windows *= math.ceil(max(0, size - read) / max(1.0, read * (1 - overlap))) + 1
    return num_windows


def _times(size: Sequence[int]) -> str:
    return " × ".join(map(str, size))
