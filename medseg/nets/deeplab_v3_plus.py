"""DeepLab v3+, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, initialize, resize
from medseg.nets.dilated import DilatedNetwork, scaled_rates
from medseg.nets.pyramids import ASPP
from medseg.nets.separable import SeparableConv

LOW_LEVEL = 1  # the encoder's feature at stride 4


class DeepLabV3Plus(DilatedNetwork):
    """DeepLab v3+: DeepLab v3 of depthwise separable convolutions, with a decoder that sharpens it by early features.

    Takes any size from `min_size` (the output stride, 16 by default) up; multiples of it need no padding. By
    default 49,445,554 parameters in 3D and 26,671,570 in 2D (one channel in, two out).

    Departs from the paper: separable convolutions have no norm between their halves but in Xception; the average
    over the image is normalized over channels, unless ``norm="batch"``, which is the paper's, is asked for.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        encoder: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``xception41``, ``xception65``, ``vgg16`` or
            ``mobilenet_v2``.
        width: Channels of the encoder's stem; all others are in proportion.
        output_stride: 8, 16 or 32, of the encoder's last features; 8 is better for small organs, and slower.
        rates: Dilations at an output stride of 16; at 8 they are doubled. None: (6, 12, 18), which suit slices
            of 512 × 512 voxels, in 2D and in plane, else (1, 2, 3), which suit patches of 96 × 96 × 96.
        aspp_channels: Of each branch, and of the decoder.
        low_level_channels: To which the encoder's features at stride 4 are brought.
        in_plane: Whether strides, poolings and dilations leave the third axis alone, for thick slices.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel of the merged branches is dropped.

    Reference:
        Chen et al. 2018, arXiv:1802.02611.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        encoder: str = "resnet50",
        width: int = 64,
        output_stride: int = 16,
        rates: Sequence[int] | None = None,
        aspp_channels: int = 256,
        low_level_channels: int = 48,
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.1,
    ) -> None:
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        super().__init__(
            layers, in_channels, out_channels, encoder=encoder, width=width, output_stride=output_stride,
            in_plane=in_plane,
        )  # fmt: skip
        self.aspp = ASPP(
            layers,
            self.encoder.channels[-1],
            aspp_channels,
            rates=scaled_rates(rates, spatial_dims, output_stride=output_stride, in_plane=in_plane),
            separable=True,
            dropout=dropout,
            in_plane=in_plane,
        )
        self.low_level = ConvBlock(layers, self.encoder.channels[LOW_LEVEL], low_level_channels, kernel_size=1)
        self.decoder = nn.Sequential(
            SeparableConv(layers, low_level_channels + aspp_channels, aspp_channels),
            SeparableConv(layers, aspp_channels, aspp_channels),
        )
        self.head = layers.head(aspp_channels, out_channels)
        for part in (self.aspp, self.low_level, self.decoder, self.head):
            initialize(part)

    def classified(self, features: Sequence[Tensor]) -> Tensor:
        context = self.aspp(features[-1])  # (B, aspp_channels, I/16, …) with an output stride of 16
        low = self.low_level(features[LOW_LEVEL])  # (B, low_level_channels, I/4, …)
        return self.head(self.decoder(torch.cat([low, resize(context, low.shape[2:])], dim=1)))
