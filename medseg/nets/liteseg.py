"""LiteSeg, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, initialize, resize
from medseg.nets.dilated import DilatedNetwork
from medseg.nets.encoders.encoder import plane_stride
from medseg.nets.pyramids import BinPooling
from medseg.nets.separable import SeparableConv

LOW_LEVEL = 1  # the encoder's feature at stride 4


class LiteSeg(DilatedNetwork):
    """LiteSeg: DeepLab v3+ made small: MobileNetV2, separable convolutions, and a pyramid of two layers a branch.

    In this deeper pyramid (DASPP) an ordinary convolution follows each dilated one, and fills the holes between the
    voxels that it saw; the pyramid's input takes part in the merge.

    Takes any size from `min_size` (the output stride, 16 by default) up; multiples of it need no padding. By
    default 3,303,658 parameters in 3D and 3,096,442 in 2D (one channel in, two out).

    Departs from the authors' code: the output stride is 16 by default, not 32; 1 × 1 convolutions are not preceded
    by depthwise ones, which only scale each channel; all activations are the encoder's; the average over the image
    is normalized over channels, unless ``norm="batch"``, which is the paper's, is asked for.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        encoder: ``mobilenet_v2``, ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``xception41``,
            ``xception65`` or ``vgg16``.
        width: Channels of the encoder's stem; all others are in proportion. Published weights of MobileNetV2 have
            32, those of the others 64.
        output_stride: 8, 16 or 32, of the encoder's last features; 8 is better for small organs, and slower.
        rates: Dilations of the pyramid's branches. None: (3, 6, 9), which suit slices of 512 × 512 voxels, in 2D
            and in plane, else (1, 2, 3), which suit patches of 96 × 96 × 96.
        pyramid_channels: Of each branch, and of the decoder.
        in_plane: Whether strides, poolings and dilations leave the third axis alone, for thick slices.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu6``, which published weights of MobileNetV2 were trained with, ``relu``, ``leakyrelu``,
            ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel of the merged branches is dropped.

    Reference:
        Emara et al. 2019, arXiv:1912.06683.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        encoder: str = "mobilenet_v2",
        width: int = 32,
        output_stride: int = 16,
        rates: Sequence[int] | None = None,
        pyramid_channels: int = 96,
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu6",
        dropout: float = 0.0,
    ) -> None:
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        super().__init__(
            layers, in_channels, out_channels, encoder=encoder, width=width, output_stride=output_stride,
            in_plane=in_plane,
        )  # fmt: skip
        if rates is None:
            rates = (3, 6, 9) if spatial_dims == 2 or in_plane else (1, 2, 3)
        deepest = self.encoder.channels[-1]
        self.pyramid = DeeperASPP(layers, deepest, pyramid_channels, rates=rates, in_plane=in_plane, dropout=dropout)
        self.decoder = nn.Sequential(
            SeparableConv(layers, self.encoder.channels[LOW_LEVEL] + pyramid_channels, pyramid_channels),
            SeparableConv(layers, pyramid_channels, pyramid_channels),
        )
        self.head = layers.head(pyramid_channels, out_channels)
        for part in (self.pyramid, self.decoder, self.head):
            initialize(part)

    def classified(self, features: Sequence[Tensor]) -> Tensor:
        low = features[LOW_LEVEL]  # (B, 24, I/4, …)
        context = resize(self.pyramid(features[-1]), low.shape[2:])
        return self.head(self.decoder(torch.cat([context, low], dim=1)))


class DeeperASPP(nn.Module):
    """DASPP: dilated convolutions at several rates, each followed by one without dilation; merged with the input.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input.
        out_channels: Of each branch and of the output.
        rates: Dilation of each branch's first convolution.
        in_plane: Whether dilation and pooling leave the third axis alone.
        dropout: Probability that a channel of the output is dropped.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        out_channels: int,
        *,
        rates: Sequence[int],
        in_plane: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([ConvBlock(layers, in_channels, out_channels, kernel_size=1, activate=False)])
        for rate in rates:
            dilation = plane_stride(rate, layers.spatial_dims, in_plane=in_plane)
            dilated = SeparableConv(layers, in_channels, out_channels, dilation=dilation, activate=False)
            self.branches.append(nn.Sequential(dilated, SeparableConv(layers, out_channels, out_channels)))
        self.branches.append(BinPooling(layers, in_channels, out_channels, in_plane=in_plane))
        merged = in_channels + len(self.branches) * out_channels
        self.merge = ConvBlock(replace(layers, dropout=dropout), merged, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat([x, *[branch(x) for branch in self.branches]], dim=1))
