"""SegFormer B0 to B5, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Interpolation, Layers, initialize, resize
from medseg.nets.encoders.mit import MIT_SIZES, MiT
from medseg.nets.network import AxisSizes, SegmentationNetwork


class SegFormer(SegmentationNetwork):
    """SegFormer: a transformer that sees the whole image at every stage, and a decoder of 1 × 1 convolutions alone.

    The decoder brings all stages to one width and to the resolution of the finest, 1/4 of the image's,
    fuses them there and upsamples the logits 4×: what is thinner than that is lost, which ``strides=(2,
    2, 2, 2)`` remedies at more than four times the cost in 2D and eight times in 3D.

    Takes any size from `min_size` (the product of the strides, 32 by default) up, as it has no position
    embeddings; multiples of it need no padding. By default 6,268,642 parameters in 3D and 3,711,522 in 2D
    (one channel in, two out).

    Departs from the paper by default: in 3D instance norm takes the place of batch norm, the only one in
    the decoder. ``SegFormer(2, 3, 150, variant="b5", norm="batch")`` is the paper's largest, with
    84,708,694 parameters.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        variant: ``b0``, ``b1``, ``b2``, ``b3``, ``b4`` or ``b5``: which sizes hold where the next three are None.
        channels: Of each stage of the encoder, finest first.
        depths: Transformer blocks of each stage.
        decoder_channels: To which the decoder brings every stage.
        num_heads: Of each stage's attention.
        strides: From the image to the first stage and from each stage to the next.
        norm: Of the decoder: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or
            ``none``; the encoder has layer norms.
        activation: Of the decoder: ``relu``, ``leakyrelu``, ``prelu``, ``elu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped before the logits.
        drop_path: Probability that training leaves out a residual branch of the last transformer block;
            falls to 0 towards the first.
        in_plane: Whether the third axis keeps its resolution, for thick slices.

    Reference:
        Xie et al. 2021, arXiv:2105.15203; Perera et al. 2024, arXiv:2404.10156 (in 3D).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        variant: str = "b0",
        channels: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        decoder_channels: int | None = None,
        num_heads: Sequence[int] = (1, 2, 5, 8),
        strides: Sequence[int] = (4, 2, 2, 2),
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.1,
        drop_path: float = 0.1,
        in_plane: bool = False,
    ) -> None:
        size = MIT_SIZES[variant]
        encoder = MiT(
            spatial_dims,
            in_channels,
            channels=size.channels if channels is None else channels,
            depths=size.depths if depths is None else depths,
            num_heads=num_heads,
            strides=strides,
            drop_path=drop_path,
            in_plane=in_plane,
        )
        super().__init__(AxisSizes.of_strides([encoder.strides[-1]]))
        self.encoder = encoder
        width = size.decoder_channels if decoder_channels is None else decoder_channels
        layers = Layers(spatial_dims, norm=norm, activation=activation, dropout=dropout)
        finest = encoder.strides[0]
        self.levels = nn.ModuleList([layers.conv(encoder.channels[0], width, kernel_size=1)])
        for narrow, coarser in zip(encoder.channels[1:], encoder.strides[1:], strict=True):
            stride = [c // f for c, f in zip(coarser, finest, strict=True)]
            self.levels.append(Interpolation(layers, narrow, width, stride=stride))
        self.fuse = ConvBlock(layers, len(self.levels) * width, width, kernel_size=1)
        self.head = layers.head(width, out_channels)
        for part in (self.levels, self.fuse, self.head):
            initialize(part)

    def outputs(self, x: Tensor) -> list[Tensor]:
        levels = [level(feature) for level, feature in zip(self.levels, self.encoder(x), strict=True)]
        fused = self.fuse(torch.cat(levels, dim=1))  # (B, decoder_channels, I/4, J/4[, K/4])
        return [resize(self.head(fused), x.shape[2:])]
