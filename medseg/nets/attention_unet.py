"""Attention U-Net, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from medseg.nets.blocks import ConvStage, Layers, PerAxis, per_axis, per_level
from medseg.nets.gates import AttentionGate
from medseg.nets.network import AxisSizes
from medseg.nets.u_shape import Decoder, UShaped


class AttentionUNet(UShaped):
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
        layers = Layers(spatial_dims, norm=norm, activation=activation, dropout=dropout)

        encoder: list[nn.Module] = []
        for n, width in enumerate(channels):
            narrow = channels[n - 1] if n else in_channels
            stage = ConvStage(layers, narrow, width, num_convs=convs[n], kernel_size=kernels[n])
            encoder.append(nn.Sequential(layers.max_pool(steps[n - 1]), stage) if n else stage)
        gates = [AttentionGate(layers, channels[n], channels[n + 1], stride=steps[n]) for n in range(1, depth)]
        decoder = Decoder(
            layers,
            channels,
            strides=steps,
            kernel_sizes=kernels,
            convs_per_stage=convs[:-1],
            gates=[IgnoresGate(), *gates],
        )
        super().__init__(
            AxisSizes.of_strides(steps),
            layers,
            out_channels,
            encoder=encoder,
            decoder=decoder,
            deep_supervision=deep_supervision,
        )


class IgnoresGate(nn.Module):
    """The skip as it is."""

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        return skip
