"""Attention U-Net, in 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvStage, Layers, PerAxis, TransposedConv, initialize, per_axis, per_level
from medseg.nets.gates import AttentionGate
from medseg.nets.network import AxisSizes, SegmentationNetwork


class AttentionUNet(SegmentationNetwork):
    """Attention U-Net: a U-Net whose skips are gated by what the decoder already knows one level below.

    A gate weighs each voxel of a skip, so that what lies outside the organ is quieted before the decoder
    sees it. The finest skip is not gated: it represents the image too little for that.
    Takes any size from `min_size` (the product of the strides, 16 by default) up; multiples of it need no
    padding. By default 17,356,037 parameters in 3D and 6,152,901 in 2D (one channel in, two out).

    Departs from the paper by default: twice the channels (the paper's are (16, 32, 64, 128, 256)), norm by
    the number of axes (the paper's is batch), LeakyReLU, no deep supervision; with it each level is scored at
    its own resolution, where the paper brings them to full size and merges them.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        channels: Of each level, finest first.
        strides: Between one level and the next; one number, or an entry a step, which may differ by axis.
        kernel_sizes: One number, or an entry a level, which may differ by axis.
        convs_per_stage: One number, or an entry a level.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``leakyrelu``, ``relu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped after an activation.
        deep_supervision: Whether training also scores the decoder's lower levels but the coarsest, each
            with half the weight of the one above.

    Reference:
        Oktay et al. 2018, arXiv:1804.03999.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (32, 64, 128, 256, 320),
        strides: int | Sequence[PerAxis] = 2,
        kernel_sizes: int | Sequence[PerAxis] = 3,
        convs_per_stage: int | Sequence[int] = 2,
        norm: str = "auto",
        activation: str = "leakyrelu",
        dropout: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        depth = len(channels) - 1
        if depth < 2:
            raise ValueError(f"channels {tuple(channels)}; an Attention U-Net has at least three levels")
        steps = [per_axis(s, spatial_dims) for s in per_level("strides", strides, depth)]
        kernels = per_level("kernel_sizes", kernel_sizes, depth + 1)
        convs = per_level("convs_per_stage", convs_per_stage, depth + 1)
        num_extra = depth - 2 if deep_supervision else 0
        multiples = [math.prod(axis) for axis in zip(*steps, strict=True)]
        super().__init__(
            [AxisSizes(multiple, minimum=multiple) for multiple in multiples],
            extra_weights=[0.5**n for n in range(1, num_extra + 1)],
        )
        layers = Layers(spatial_dims, norm=norm, activation=activation, dropout=dropout)

        def stage(n: int, in_channels: int) -> ConvStage:
            return ConvStage(layers, in_channels, channels[n], num_convs=convs[n], kernel_size=kernels[n])

        self.encoder = nn.ModuleList([stage(0, in_channels)])
        self.gates = nn.ModuleList()  # these, the ups and the decoder in the order of the levels, finest first
        self.ups = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for n, step in enumerate(steps):
            width, below = channels[n], channels[n + 1]
            self.encoder.append(nn.Sequential(layers.max_pool(step), stage(n + 1, width)))
            self.gates.append(AttentionGate(layers, width, below, stride=step) if n else IgnoresGate())
            self.ups.append(TransposedConv(layers, below, width, stride=step))
            self.decoder.append(stage(n, 2 * width))
        self.head = layers.head(channels[0], out_channels)
        self.extra_heads = nn.ModuleList(layers.head(channels[n], out_channels) for n in range(1, num_extra + 1))
        initialize(self)

    def outputs(self, x: Tensor) -> list[Tensor]:
        skips: list[Tensor] = []
        for stage in self.encoder:
            x = stage(x)  # (B, channels[n], I / 2^n, …) with strides of 2
            skips.append(x)
        skips.pop()
        heads = [self.head, *self.extra_heads] if self.training else [self.head]
        outputs = []
        for n in reversed(range(len(self.decoder))):
            gated = self.gates[n](skips.pop(), x)
            x = self.decoder[n](torch.cat([gated, self.ups[n](x)], dim=1))
            if n < len(heads):
                outputs.append(heads[n](x))
        return outputs[::-1]


class IgnoresGate(nn.Module):
    """The skip as it is."""

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        return skip
