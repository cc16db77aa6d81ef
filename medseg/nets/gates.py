"""Gates: a number in (0, 1), learned from context, that features are multiplied with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from medseg.nets.blocks import Layers, PerAxis, resize


class SqueezeExcitation(nn.Module):
    """Weighs each channel by what the whole field of view holds.

    Args:
        layers: What the network's layers agree on.
        channels: Of input and output.
        reduction: By how much the layer between is narrower.

    Reference:
        Hu et al. 2018, arXiv:1709.01507.
    """

    def __init__(self, layers: Layers, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        if reduction < 1:
            raise ValueError(f"reduction is {reduction}; it must be at least 1")
        hidden = max(1, channels // reduction)
        self.weigh = nn.Sequential(
            layers.conv(channels, hidden, kernel_size=1),
            nn.ReLU(inplace=True),
            layers.conv(hidden, channels, kernel_size=1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean(dim=tuple(range(2, x.dim())), keepdim=True)  # (B, C, 1, 1[, 1])
        return x * self.weigh(squeezed)


class AttentionGate(nn.Module):
    """Weighs each voxel of a skip by what the coarser features below it have understood.

    Additive attention, computed on the coarser grid and interpolated to the skip's.

    Args:
        layers: What the network's layers agree on.
        skip_channels: Of the features that are gated.
        gate_channels: Of the coarser features that decide.
        stride: By how much they are coarser.
        hidden: Channels in which both are compared; None: as many as the skip has.

    Reference:
        Oktay et al. 2018, arXiv:1804.03999.
    """

    def __init__(
        self, layers: Layers, skip_channels: int, gate_channels: int, *, stride: PerAxis, hidden: int | None = None
    ) -> None:
        super().__init__()
        hidden = hidden or skip_channels
        self.of_skip = layers.conv(skip_channels, hidden, kernel_size=stride, stride=stride, bias=False)
        self.of_gate = layers.conv(gate_channels, hidden, kernel_size=1)
        self.weigh = layers.conv(hidden, 1, kernel_size=1)

    def weights(self, skip: Tensor, gate: Tensor) -> Tensor:
        """The number in (0, 1) for each voxel of the skip, (B, 1, I, J[, K]).

        Args:
            skip: (B, skip_channels, I, J[, K]).
            gate: (B, gate_channels, I / stride, …).
        """
        compared = F.relu(self.of_skip(skip) + self.of_gate(gate))
        return resize(self.weigh(compared).sigmoid(), skip.shape[2:])

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        """The skip, gated; arguments as those of `weights`."""
        return skip * self.weights(skip, gate)
