"""Which memory layout this machine computes a network fastest in, found by trying."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from medseg.inference.plan import window_cost

MIN_WINDOWS = 40
"""Trying takes four windows: for fewer than ten times as many it is not worth it."""

MIN_GAIN = 1.05
"""Another layout is taken if it is this many times as fast; less may be chance."""

log = logging.getLogger("medseg")


def lay_out(network: nn.Module, shape: Sequence[int], *, device: torch.device, autocast: torch.dtype | None) -> bool:
    """Put a network's weights into the layout that it is faster with here: as they were, or with channels last.

    Convolutions compute in the layout of their weights, whatever that of the image. Results differ by rounding.

    Args:
        network: On the device, in eval mode; takes volumes.
        shape: Of a batch of windows, (B, C, I, J, K).
        device: Where it is.
        autocast: As for `medseg.inference.sliding_window.slabs`.

    Returns:
        Whether channels are last now.
    """
    plain = window_cost(network, shape, device=device, autocast=autocast).seconds
    _change(network, torch.channels_last_3d)
    last = window_cost(network, shape, device=device, autocast=autocast).seconds
    if plain > MIN_GAIN * last:
        log.info("windows are computed with channels last, which is %.2f × as fast here", plain / last)
        return True
    _change(network, torch.contiguous_format)
    log.info("windows are computed as the network was made: with channels last it is %.2f × as fast here", plain / last)
    return False


def _change(network: nn.Module, layout: torch.memory_format) -> None:
    network.to(memory_format=layout)  # type: ignore[call-overload]  # which torch's stubs do not know
