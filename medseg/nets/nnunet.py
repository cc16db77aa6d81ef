"""nnU-Net's residual-encoder U-Net, in 2D and 3D; its plain network is a `UNet`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from medseg.nets.blocks import (
    ConvBlock,
    ConvStage,
    Layers,
    PerAxis,
    per_axis,
    per_level,
    projection,
)
from medseg.nets.gates import SqueezeExcitation
from medseg.nets.network import AxisSizes
from medseg.nets.u_shape import Decoder, UShaped


class ResidualEncoderUNet(UShaped):
    """nnU-Net's ResEnc: a U-Net with a deep residual encoder and a light decoder.

    Most of its layers lie in the encoder, at low resolution, where they cost little; each pair of
    convolutions learns a residual. nnU-Net recommends it over its plain U-Net wherever the GPU has the memory.
    Takes any size from `min_size` (the product of the strides, 32 by default) up; multiples of it need no
    padding. By default 102,335,170 parameters in 3D and 34,517,122 in 2D (one channel in, two out).

    The default is the network of nnU-Net's "ResEnc L" plan for large volumes (M and XL differ in the patch
    alone) but for two things: convolutions before a norm have no bias (``bias=True`` is nnU-Net's), and no head
    on the coarsest decoder level, which nnU-Net's loss gives the weight 0. For 2D nnU-Net goes on to 512 channels.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        channels: Of each level, finest first.
        strides: Between one level and the next; one number, or an entry a step, which may differ by axis.
        kernel_sizes: One number, or an entry a level, which may differ by axis.
        blocks_per_stage: Residual blocks, of two convolutions each; one number, or an entry a level.
        decoder_convs_per_stage: One number, or an entry for all levels but the deepest.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``leakyrelu``, ``relu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped after an activation.
        bias: Of the convolutions; None: where no norm follows.
        squeeze_excitation: Whether each residual's channels are weighed before it is added.
        deep_supervision: Whether training also scores the decoder's lower levels but the coarsest, each
            with half the weight of the one above.

    Reference:
        Isensee et al. 2024, arXiv:2404.09556; He et al. 2019, arXiv:1812.01187 (the shortcuts).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (32, 64, 128, 256, 320, 320),
        strides: int | Sequence[PerAxis] = 2,
        kernel_sizes: int | Sequence[PerAxis] = 3,
        blocks_per_stage: int | Sequence[int] = (1, 3, 4, 6, 6, 6),
        decoder_convs_per_stage: int | Sequence[int] = 1,
        norm: str = "auto",
        activation: str = "leakyrelu",
        dropout: float = 0.0,
        bias: bool | None = None,
        squeeze_excitation: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        depth = len(channels) - 1
        if depth < 1:
            raise ValueError(f"channels {tuple(channels)}; a U-Net has at least two levels")
        steps = [per_axis(s, spatial_dims) for s in per_level("strides", strides, depth)]
        kernels = per_level("kernel_sizes", kernel_sizes, depth + 1)
        num_blocks = per_level("blocks_per_stage", blocks_per_stage, depth + 1)
        up_convs = per_level("decoder_convs_per_stage", decoder_convs_per_stage, depth)
        if min(num_blocks) < 1:
            raise ValueError(f"blocks_per_stage {num_blocks}; a stage has at least 1")
        layers = Layers(spatial_dims, norm=norm, activation=activation, dropout=dropout, bias=bias)

        def stage(n: int) -> nn.Sequential:
            narrow, step = (channels[n - 1], steps[n - 1]) if n else (channels[0], 1)
            blocks = [residual_block(layers, narrow, channels[n], kernel_size=kernels[n], stride=step)]
            for _ in range(num_blocks[n] - 1):
                blocks.append(residual_block(layers, channels[n], channels[n], kernel_size=kernels[n]))
            if squeeze_excitation:
                for block in blocks:
                    block.blocks.append(SqueezeExcitation(layers, channels[n]))
            return nn.Sequential(*blocks)

        stem = ConvBlock(layers, in_channels, channels[0], kernel_size=kernels[0])
        encoder = [nn.Sequential(stem, stage(0)), *(stage(n) for n in range(1, depth + 1))]
        decoder = Decoder(layers, channels, strides=steps, kernel_sizes=kernels, convs_per_stage=up_convs)
        super().__init__(
            AxisSizes.of_strides(steps),
            layers,
            out_channels,
            encoder=encoder,
            decoder=decoder,
            deep_supervision=deep_supervision,
        )


def residual_block(
    layers: Layers, in_channels: int, out_channels: int, *, kernel_size: PerAxis = 3, stride: PerAxis = 1
) -> ConvStage:
    """Two convolutions and a shortcut around them, which is averaged where the first one is strided."""
    pooled: OrderedDict[str, nn.Module] = OrderedDict()
    steps = per_axis(stride, layers.spatial_dims)
    if max(steps) > 1:
        pool: Any = nn.AvgPool2d if layers.spatial_dims == 2 else nn.AvgPool3d
        pooled["pool"] = pool(steps)
    pooled["projection"] = projection(replace(layers, bias=False), in_channels, out_channels)
    return ConvStage(
        layers,
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        shortcut=nn.Sequential(pooled),
    )
