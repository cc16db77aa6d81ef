"""DeepLab v2, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medseg.nets.blocks import Layers, initialize, resize
from medseg.nets.dilated import DilatedNetwork, scaled_rates
from medseg.nets.pyramids import SummedASPP


class DeepLabV2(DilatedNetwork):
    """DeepLab v2 (ASPP): several classifiers, each dilated at a rate of its own, see the same features; logits are summed.

    With several `scales` the image is seen at each, and each voxel's logit is the highest. Takes any size from
    `min_size` (the output stride, 8 by default) up; multiples of it need no padding. By default 46,597,448 parameters in 3D
    and 23,649,224 in 2D (one channel in, two out).

    Departs from the paper by default: a ResNet of 50 layers, and one scale. The paper's are ``encoder="resnet101",
    norm="batch"``, with 44,048,532 parameters for 21 classes, ``encoder="vgg16", norm="none"``, with 37,877,652, and
    ``scales=(1, 0.75, 0.5)``, each supervised in training. ResNet's strides are torchvision's. The fully connected CRF
    that sharpens the boundaries is no part of the network but a post-processing of what it predicts.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        encoder: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``xception41``, ``xception65``, ``vgg16`` or
            ``mobilenet_v2``.
        width: Channels of the encoder's stem; all others are in proportion.
        output_stride: 8, 16 or 32: how much coarser than the image the features are that are classified.
        rates: Dilations at an output stride of 8; at 16 they are halved. None: (6, 12, 18, 24), which suit slices
            of 512 × 512 voxels, in 2D and in plane, else (1, 2, 3, 4), which suit patches of 96 × 96 × 96.
        fc_channels: Of each classifier's two hidden layers; 0: none; None: 1024 with VGG-16, else 0.
        scales: At which the image is seen, largest first, relative to its size.
        in_plane: Whether strides, poolings, dilations and scales leave the third axis alone, for thick slices.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a unit of the hidden layers is dropped.

    Reference:
        Chen et al. 2016, arXiv:1606.00915.
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
        fc_channels: int | None = None,
        scales: Sequence[float] = (1.0,),
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.5,
    ) -> None:
        if not scales or min(scales) <= 0 or list(scales) != sorted(scales, reverse=True):
            raise ValueError(f"scales {tuple(scales)}; give positive numbers, the largest first")
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        super().__init__(
            layers, in_channels, out_channels, encoder=encoder, width=width, output_stride=output_stride,
            in_plane=in_plane,
        )  # fmt: skip
        self.scales = tuple(scales)
        self.extra_weights = (1.0,) * len(scales) if len(scales) > 1 else ()
        if fc_channels is None:
            fc_channels = 1024 if encoder == "vgg16" else 0
        self.aspp = SummedASPP(
            layers,
            self.encoder.channels[-1],
            out_channels,
            hidden_channels=fc_channels,
            rates=scaled_rates(
                rates,
                spatial_dims,
                output_stride=output_stride,
                in_plane=in_plane,
                of_slices=(6, 12, 18, 24),
                of_stride=8,
            ),
            dropout=dropout,
            in_plane=in_plane,
        )
        initialize(self.aspp)

    def classified(self, features: Sequence[Tensor]) -> Tensor:
        return self.aspp(features[-1])  # (B, R, I/8, …) with an output stride of 8

    def outputs(self, x: Tensor) -> list[Tensor]:
        seen = [self.classified(self.encoder(resize(x, self._size(x, scale)))) for scale in self.scales]
        highest = seen[0]
        for logits in seen[1:]:
            highest = torch.maximum(highest, resize(logits, highest.shape[2:]))
        return [resize(highest, x.shape[2:]), *(seen if self.extra_weights and self.training else [])]

    def _size(self, x: Tensor, scale: float) -> list[int]:
        """The image's size at a scale, to the nearest that the encoder's strides divide."""
        sizes = []
        for n, axis in zip(x.shape[2:], self.sizes, strict=True):
            scaled = n if axis.multiple == 1 else round(n * scale / axis.multiple) * axis.multiple
            sizes.append(max(scaled, min(n, 2 * axis.multiple)))  # norms cannot learn from a single voxel
        return sizes
