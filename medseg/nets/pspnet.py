"""PSPNet, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from medseg.nets.blocks import ConvBlock, Layers, initialize
from medseg.nets.dilated import DilatedNetwork
from medseg.nets.pyramids import PyramidPooling


class PSPNet(DilatedNetwork):
    """PSPNet: each voxel is classified together with averages over the whole image, its halves, thirds and sixths.

    Takes any size from `min_size` (the output stride, 8 by default) up; multiples of it need no padding. By
    default 106,978,626 parameters in 3D and 46,576,578 in 2D (one channel in, two out).

    Departs from the paper: ResNet's stem is one 7 × 7 convolution (He et al. 2016), not three of 3 × 3; the pooled
    values are normalized over channels and bins, unless ``norm="batch"``, which is the paper's, is asked for.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        encoder: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``xception41``, ``xception65``, ``vgg16`` or
            ``mobilenet_v2``.
        width: Channels of the encoder's stem; all others are in proportion.
        output_stride: 8, 16 or 32: how much coarser than the image the features are that are classified.
        bins: Into which each axis is divided, a number for each scale.
        in_plane: Whether strides, poolings and dilations leave the third axis alone, for thick slices.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped before the classification.
        deep_supervision: Whether training also scores the last stage but one, by a head of its own.

    Reference:
        Zhao et al. 2017, arXiv:1612.01105.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        encoder: str = "resnet50",
        width: int = 64,
        output_stride: int = 8,
        bins: Sequence[int] = (1, 2, 3, 6),
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.1,
        deep_supervision: bool = False,
    ) -> None:
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        super().__init__(
            layers, in_channels, out_channels, encoder=encoder, width=width, output_stride=output_stride,
            in_plane=in_plane, deep_supervision=deep_supervision,
        )  # fmt: skip
        channels = self.encoder.channels[-1]
        share = max(1, channels // len(bins))
        self.pyramid = PyramidPooling(layers, channels, share, bins=bins, in_plane=in_plane)
        narrow = max(1, channels // 4)
        self.merge = ConvBlock(replace(layers, dropout=dropout), channels + len(bins) * share, narrow)
        self.head = layers.head(narrow, out_channels)
        for part in (self.pyramid, self.merge, self.head):
            initialize(part)

    def classified(self, features: Sequence[Tensor]) -> Tensor:
        return self.head(self.merge(self.pyramid(features[-1])))  # (B, R, I/8, …) with an output stride of 8
