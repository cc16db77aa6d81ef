"""Which memory layout this machine computes a network fastest in, found by trying."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.inference.plan import window_cost

MIN_WINDOWS = 12
"""Trying takes four windows: of fewer than three times as many it is not worth it."""

MIN_GAIN = 1.05
"""Another layout is taken if it is this many times as fast; less may be chance."""

log = logging.getLogger("medseg")


class ChannelsLast(nn.Module):
    """A network whose weights and windows have the channels last in memory, which some processors prefer.

    Args:
        network: Any; its weights change place.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = _laid_out(network, torch.channels_last_3d)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.network(x.contiguous(memory_format=torch.channels_last_3d))
        return result


def faster(
    network: nn.Module, shape: Sequence[int], *, device: torch.device, autocast: torch.dtype | None
) -> nn.Module:
    """The network as it is, or with channels last, as is faster here.

    Args:
        network: On the device, in eval mode; takes volumes.
        shape: Of a batch of windows, (B, C, I, J, K).
        device: Where it is.
        autocast: As for `medseg.inference.sliding_window.slabs`.

    Returns:
        The network, or a wrapper of it. Results differ by rounding.
    """
    plain = window_cost(network, shape, device=device, autocast=autocast).seconds
    turned = ChannelsLast(network)
    last = window_cost(turned, shape, device=device, autocast=autocast).seconds
    log.debug("a batch of windows takes %.3g s, with channels last %.3g s", plain, last)
    if plain > MIN_GAIN * last:
        log.info("windows are computed with channels last, which is %.2f × as fast here", plain / last)
        return turned
    return _laid_out(network, torch.contiguous_format)


def _laid_out(network: nn.Module, layout: torch.memory_format) -> nn.Module:
    laid_out: nn.Module = network.to(memory_format=layout)  # type: ignore[call-overload]  # unknown to torch's stubs
    return laid_out
