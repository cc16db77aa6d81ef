"""V-Net, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, ConvStage, Layers, TransposedConv, initialize, per_level
from medseg.nets.network import AxisSizes, SegmentationNetwork


class VNet(SegmentationNetwork):
    """V-Net: stages of 5 × 5 × 5 convolutions that each learn a residual, strided convolutions between them.

    Takes any size from `min_size` (16 by default) up; multiples of it need no padding. By default
    65,179,010 parameters in 3D and 13,279,042 in 2D (one channel in, two out).

    Departs from the paper by default: convolutions are normalized and so have no bias;
    ``norm="none"`` is the paper's. An image of several channels is repeated until the first stage's
    channels are filled, where the paper has one. Widespread implementations (MONAI's among them) are
    smaller, with ``convs_per_stage=(1, 1, 2, 3, 2), decoder_convs_per_stage=(1, 1, 2, 2)``; they also
    reach the classes by a 5 × 5 × 5 convolution before the 1 × 1 × 1 one, which here is alone.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        channels: Of each level, finest first; the decoder has twice as many at all levels but the deepest.
        convs_per_stage: One number, or an entry a level.
        decoder_convs_per_stage: Likewise, for all levels but the deepest; None: as in the encoder.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``prelu``, ``leakyrelu``, ``relu``, ``elu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped after an activation.
        bias: Of the convolutions; None: where no norm follows.

    Reference:
        Milletari et al. 2016, arXiv:1606.04797.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        convs_per_stage: int | Sequence[int] = (1, 2, 3, 3, 3),
        decoder_convs_per_stage: int | Sequence[int] | None = None,
        norm: str = "auto",
        activation: str = "prelu",
        dropout: float = 0.0,
        bias: bool | None = None,
    ) -> None:
        depth = len(channels) - 1
        if depth < 1:
            raise ValueError(f"channels {tuple(channels)}; a V-Net has at least two levels")
        convs = per_level("convs_per_stage", convs_per_stage, depth + 1)
        up_convs = convs[:-1]
        if decoder_convs_per_stage is not None:
            up_convs = per_level("decoder_convs_per_stage", decoder_convs_per_stage, depth)
        super().__init__([AxisSizes(2**depth, minimum=2**depth)] * spatial_dims)
        layers = Layers(spatial_dims, norm=norm, activation=activation, dropout=dropout, bias=bias)

        def stage(width: int, num_convs: int) -> ConvStage:
            return ConvStage(layers, width, width, num_convs=num_convs, kernel_size=5, shortcut=nn.Identity())

        first = ConvStage(
            layers, in_channels, channels[0], num_convs=convs[0], kernel_size=5, shortcut=RepeatChannels(channels[0])
        )
        self.encoder = nn.ModuleList([first])
        self.ups = nn.ModuleList()  # these and the decoder in the order of the levels, finest first
        self.decoder = nn.ModuleList()
        for n in range(depth):
            narrow, wide = channels[n], channels[n + 1]
            down = ConvBlock(layers, narrow, wide, kernel_size=2, stride=2)
            self.encoder.append(nn.Sequential(down, stage(wide, convs[n + 1])))
            below = wide if n == depth - 1 else 2 * wide
            self.ups.append(
                nn.Sequential(
                    TransposedConv(layers, below, narrow, stride=2),
                    layers.make_norm(narrow),
                    layers.make_activation(narrow),
                )
            )
            self.decoder.append(stage(2 * narrow, up_convs[n]))
        self.head = layers.head(2 * channels[0], out_channels)
        initialize(self)

    def outputs(self, x: Tensor) -> list[Tensor]:
        skips: list[Tensor] = []
        for stage in self.encoder:
            x = stage(x)  # (B, channels[n], I / 2^n, …)
            skips.append(x)
        skips.pop()
        for up, stage in zip(reversed(self.ups), reversed(self.decoder), strict=True):
            x = stage(torch.cat([up(x), skips.pop()], dim=1))  # (B, 2 channels[n], I / 2^n, …)
        return [self.head(x)]


class RepeatChannels(nn.Module):
    """An image repeated along its channels, so that it can be summed with a first stage's output."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return x  # the sum itself repeats it
        times = -(-self.channels // x.shape[1])
        return torch.cat([x] * times, dim=1)[:, : self.channels]
