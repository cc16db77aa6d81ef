"""SegNet, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

from medseg.nets.blocks import Layers
from medseg.nets.encoders.vgg import VGG, VGG16_CHANNELS, VGG16_CONVS
from medseg.nets.unpooling import MirroredVGG


class SegNet(MirroredVGG):
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
        layers = Layers(spatial_dims, norm=norm, activation=activation, dropout=dropout)
        super().__init__(encoder, layers, out_channels, ends_in_logits=True, in_plane=in_plane)
