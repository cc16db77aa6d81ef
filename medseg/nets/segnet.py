"""SegNet, in 2D and 3D."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from medseg.nets.blocks import Layers, initialize
from medseg.nets.encoders.encoder import plane_stride
from medseg.nets.encoders.vgg import VGG, VGG16_CHANNELS, VGG16_CONVS, conv_layers
from medseg.nets.network import AxisSizes, SegmentationNetwork
from medseg.nets.unpooling import MaxPoolWithIndices, max_unpool


class SegNet(SegmentationNetwork):
    """SegNet: VGG-16's convolutions and their mirror image; each unpooling puts values where a maximum was.

    The decoder gets no features from the encoder but these places: boundaries come back sharp at little
    memory. Takes any size from `min_size` (32 by default) up; multiples of it need no padding. By default
    88,281,410 parameters in 3D and 29,443,010 in 2D (one channel in, two out).

    Departs from the paper by default: instance norm in 3D; ``norm="batch"`` is the paper's, with
    29,455,125 parameters for 21 classes. Where two values are close, rounding moves the maximum: bfloat16
    differs more from float32 than in networks without unpooling.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        channels: Of each stage, finest first.
        convs_per_stage: One number, or an entry a stage, in encoder and decoder alike.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``prelu``, ``elu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped after a stage, as in Bayesian SegNet.
        in_plane: Whether the third axis keeps its resolution, for thick slices.

    Reference:
        Badrinarayanan et al. 2017, arXiv:1511.00561; Kendall et al. 2017, arXiv:1511.02680 (dropout).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = VGG16_CHANNELS,
        convs_per_stage: int | Sequence[int] = VGG16_CONVS,
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
        super().__init__(AxisSizes.of_strides([encoder.strides[-1]]))
        layers = Layers(spatial_dims, norm=norm, activation=activation, dropout=dropout)
        self.encoder = encoder
        self.stride = plane_stride(2, spatial_dims, in_plane=in_plane)
        self.pool = MaxPoolWithIndices(layers, self.stride)
        self.decoder = nn.ModuleList()  # in the order of the stages, finest first
        for n, num_convs in enumerate(encoder.convs_per_stage):
            widths = [channels[n]] * num_convs
            if n:
                widths.append(channels[n - 1])
            parts = [part for a, b in itertools.pairwise(widths) for part in conv_layers(layers, a, b)]
            self.decoder.append(nn.Sequential(*parts))
        self.head = layers.conv(channels[0], out_channels, kernel_size=3)
        self.drop = layers.make_dropout()
        initialize(self.decoder)
        initialize(self.head)

    def outputs(self, x: Tensor) -> list[Tensor]:
        places = []
        for n in range(len(self.decoder)):
            x, indices = self.pool(self.drop(self.encoder.stage(n, x)))  # (B, channels[n], I / 2^(n+1), …)
            places.append(indices)
        for stage, indices in zip(reversed(self.decoder), reversed(places), strict=True):
            x = self.drop(stage(max_unpool(x, indices, stride=self.stride)))
        return [self.head(x)]
