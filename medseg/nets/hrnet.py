"""HRNetV2, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from medseg.nets.blocks import ConvBlock, Layers, initialize, resize
from medseg.nets.encoders.hrnet import HRNetEncoder
from medseg.nets.network import AxisSizes, SegmentationNetwork


class HRNet(SegmentationNetwork):
    """HRNetV2: never gives up the high resolution, but lets coarser streams run beside it and exchange with it.

    What a U-Net has to restore, the finest stream, 1/4 of the image, has kept; the head joins all streams there,
    and the logits are interpolated. ``stem_strides=(2, 1)`` keeps 1/2, for thin structures, at four times the
    cost in 2D and eight times in 3D.

    Takes any size from `min_size` (32 by default) up; multiples of it need no padding. By default 28,245,704
    parameters in 3D and 9,635,360 in 2D (one channel in, two out), HRNet-W18; ``width=32`` and ``width=48`` are
    the paper's W32 and W48.

    Departs from the authors' code by default: in 3D instance norm takes the place of batch norm.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        width: Channels of the finest stream; each coarser one has twice as many.
        stem_channels: Of the layers before the streams part.
        stem_strides: Of the stem's two convolutions.
        modules_per_stage: Exchanges between the streams in each stage; there is one more stream than stages.
        blocks_per_module: Residual blocks of each stream between two exchanges.
        in_plane: Whether the third axis keeps its resolution, for thick slices.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped before the logits.

    Reference:
        Wang et al. 2020, arXiv:1908.07919; Sun et al. 2019, arXiv:1904.04514.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        width: int = 18,
        stem_channels: int = 64,
        stem_strides: Sequence[int] = (2, 2),
        modules_per_stage: Sequence[int] = (1, 4, 3),
        blocks_per_module: int = 4,
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        encoder = HRNetEncoder(
            spatial_dims,
            in_channels,
            width=width,
            stem_channels=stem_channels,
            stem_strides=stem_strides,
            modules_per_stage=modules_per_stage,
            blocks_per_module=blocks_per_module,
            in_plane=in_plane,
            norm=norm,
            activation=activation,
        )
        super().__init__(AxisSizes.of_strides([encoder.strides[-1]]))
        self.encoder = encoder
        layers = Layers(spatial_dims, norm=norm, activation=activation, dropout=dropout)
        joined = sum(encoder.channels)
        self.merge = ConvBlock(replace(layers, bias=True), joined, joined, kernel_size=1)  # as published
        self.head = layers.head(joined, out_channels)
        for part in (self.merge, self.head):
            initialize(part)

    def outputs(self, x: Tensor) -> list[Tensor]:
        streams = self.encoder(x)
        finest = streams[0].shape[2:]
        joined = torch.cat([resize(stream, finest) for stream in streams], dim=1)  # (B, 15 × width, I/4, …)
        return [resize(self.head(self.merge(joined)), x.shape[2:])]
