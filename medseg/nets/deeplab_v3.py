"""DeepLab v3, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from medseg.nets.blocks import ConvBlock, Layers, initialize
from medseg.nets.dilated import DilatedNetwork, scaled_rates
from medseg.nets.pyramids import ASPP


class DeepLabV3(DilatedNetwork):
    """DeepLab v3: dilated convolutions keep the encoder's features dense, and look around at several rates.

    Takes any size from `min_size` (the output stride, 8 by default) up; multiples of it need no padding. By
    default 91,772,226 parameters in 3D and 39,627,714 in 2D (one channel in, two out).

    Departs from the paper as torchvision does: the blocks of a stage share one dilation (no multi-grid), and a 3 × 3
    convolution follows the pyramid. The average over the image is normalized over channels, unless ``norm="batch"``,
    which is the paper's, is asked for.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        encoder: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``xception41``, ``xception65``, ``vgg16`` or
            ``mobilenet_v2``.
        width: Channels of the encoder's stem; all others are in proportion.
        output_stride: 8, 16 or 32: how much coarser than the image the features are that are classified.
        rates: Dilations at an output stride of 16; at 8 they are doubled. None: (6, 12, 18), which suit slices
            of 512 × 512 voxels, in 2D and in plane, else (1, 2, 3), which suit patches of 96 × 96 × 96.
        aspp_channels: Of each branch, and of what is classified.
        in_plane: Whether strides, poolings and dilations leave the third axis alone, for thick slices.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel of the merged branches is dropped.
        deep_supervision: Whether training also scores the last stage but one, by a head of its own.

    Reference:
        Chen et al. 2017, arXiv:1706.05587.
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
        rates: Sequence[int] | None = None,
        aspp_channels: int = 256,
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
        self.aspp = ASPP(
            layers,
            self.encoder.channels[-1],
            aspp_channels,
            rates=scaled_rates(rates, spatial_dims, output_stride=output_stride, in_plane=in_plane),
            dropout=dropout,
            in_plane=in_plane,
        )
        self.refine = ConvBlock(layers, aspp_channels, aspp_channels)
        self.head = layers.head(aspp_channels, out_channels)
        for part in (self.aspp, self.refine, self.head):
            initialize(part)

    def classified(self, features: Sequence[Tensor]) -> Tensor:
        return self.head(self.refine(self.aspp(features[-1])))  # (B, R, I/8, …) with an output stride of 8
