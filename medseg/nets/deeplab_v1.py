"""DeepLab v1, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from medseg.nets.blocks import Layers, initialize
from medseg.nets.dilated import DilatedNetwork, scaled_rates
from medseg.nets.pyramids import SummedASPP


class DeepLabV1(DilatedNetwork):
    """DeepLab v1 (LargeFOV): VGG-16 without its last two strides, and a classifier that looks far around by dilation.

    Nothing is upsampled but the logits, at 1/8. Takes any size from `min_size` (the output stride, 8 by default) up;
    multiples of it need no padding. By default 59,349,058 parameters in 3D and 20,493,250 in 2D (one channel in,
    two out).

    Departs from the paper: convolutions of the encoder are normalized (``norm="none"`` is the paper's, with 20,505,429
    parameters for 21 classes); poolings that halve the resolution are 2 × 2, as VGG's; the fully connected CRF that
    sharpens the boundaries is no part of the network but a post-processing of what it predicts.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        width: Channels of VGG's first stage; all others are in proportion.
        output_stride: 8, 16 or 32: how much coarser than the image the features are that are classified.
        rate: Dilation of the classifier's first layer, fc6, at an output stride of 8; at 16 it is halved. None: 12,
            which suits slices of 512 × 512 voxels, in 2D and in plane, else 2, for patches of 96 × 96 × 96.
        fc_channels: Of the classifier's two hidden layers, fc6 and fc7.
        in_plane: Whether strides, poolings and dilations leave the third axis alone, for thick slices.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a unit of the hidden layers is dropped.

    Reference:
        Chen et al. 2015, arXiv:1412.7062.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        width: int = 64,
        output_stride: int = 8,
        rate: int | None = None,
        fc_channels: int = 1024,
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.5,
    ) -> None:
        if fc_channels < 1:
            raise ValueError(f"fc_channels is {fc_channels}; it must be at least 1")
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        super().__init__(
            layers, in_channels, out_channels, encoder="vgg16", width=width, output_stride=output_stride,
            in_plane=in_plane,
        )  # fmt: skip
        self.classifier = SummedASPP(
            layers,
            self.encoder.channels[-1],
            out_channels,
            hidden_channels=fc_channels,
            rates=scaled_rates(
                None if rate is None else [rate],
                spatial_dims,
                output_stride=output_stride,
                in_plane=in_plane,
                of_slices=(12,),
                of_stride=8,
            ),
            dropout=dropout,
            in_plane=in_plane,
        )
        initialize(self.classifier)

    def classified(self, features: Sequence[Tensor]) -> Tensor:
        return self.classifier(features[-1])  # (B, R, I/8, …) with an output stride of 8
