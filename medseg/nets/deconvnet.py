"""DeconvNet, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, PerAxis, initialize
from medseg.nets.encoders.vgg import VGG, VGG16_CHANNELS, VGG16_CONVS
from medseg.nets.unpooling import MirroredVGG


class DeconvNet(MirroredVGG):
    """DeconvNet: VGG-16 down to its hidden layers, and all of it mirrored; each unpooling puts values where a maximum was.

    What SegNet left out is here: fc6 and fc7, which see a large part of the image at the bottom, and the mirror image
    of fc6. Takes any size from `min_size` (32 by default) up; multiples of it need no padding. By default 117,756,674
    parameters in 3D and 39,972,482 in 2D (one channel in, two out).

    Departs from the paper: fc6 is 3 × 3 and both layers have 1024 channels by default, so that it can be trained in 3D;
    ``fc_channels=4096, fc_kernel_size=7, norm="batch"`` is the paper's, with 251,805,653 parameters for 21 classes. fc6
    is padded, so that images need not be 224 × 224: its middle voxel is what the paper's gives. Its deconvolutions of
    stride 1 are convolutions, which differ from them by a mirrored kernel. Where two values are close, rounding moves
    the maximum: bfloat16 differs more from float32 than in networks without unpooling.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        channels: Of each stage, finest first.
        convs_per_stage: One number, or an entry a stage, in encoder and decoder alike.
        fc_channels: Of fc6 and fc7, the layers at the bottom.
        fc_kernel_size: Of fc6 and of its mirror image.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``prelu``, ``elu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel of fc6 or fc7 is dropped.
        in_plane: Whether the third axis keeps its resolution, for thick slices.

    Reference:
        Noh et al. 2015, arXiv:1505.04366.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = VGG16_CHANNELS,
        convs_per_stage: int | Sequence[int] = VGG16_CONVS,
        fc_channels: int = 1024,
        fc_kernel_size: PerAxis = 3,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.0,
        in_plane: bool = False,
    ) -> None:
        encoder = VGG(
            spatial_dims,
            in_channels,
            channels=channels,
            convs_per_stage=convs_per_stage,
            norm=norm,
            activation=activation,
            in_plane=in_plane,
        )
        layers = Layers(spatial_dims, norm=norm, activation=activation, bias=True)
        super().__init__(encoder, layers, out_channels, ends_in_logits=False, in_plane=in_plane)
        dropping = replace(layers, dropout=dropout)
        self.fc = nn.Sequential(
            ConvBlock(dropping, channels[-1], fc_channels, kernel_size=fc_kernel_size),  # fc6
            ConvBlock(dropping, fc_channels, fc_channels, kernel_size=1),  # fc7
            ConvBlock(layers, fc_channels, channels[-1], kernel_size=fc_kernel_size),  # fc6 mirrored
        )
        initialize(self.fc)

    def bottom(self, x: Tensor) -> Tensor:
        return self.fc(x)
