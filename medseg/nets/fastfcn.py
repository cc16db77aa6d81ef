"""FastFCN, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, initialize, resize
from medseg.nets.dilated import DilatedNetwork, scaled_rates
from medseg.nets.encoders.encoder import plane_stride
from medseg.nets.pyramids import ASPP, PyramidPooling
from medseg.nets.separable import SeparableConv

LEVELS = 3
"""Of the encoder's features, from stride 8 on, that joint pyramid upsampling sees."""

_CHANNELS = {2: 512, 3: 128}


class FastFCN(DilatedNetwork):
    """FastFCN: what dilated encoders compute at great cost, upsampled from a plain one's features instead.

    Joint pyramid upsampling brings the features at strides 8, 16 and 32 to stride 8 and looks at them together,
    by separable convolutions of several dilations; the head of a DeepLab or PSPNet stands on it.

    Takes any size from `min_size` (32) up; multiples of it need no padding. By default 69,991,490 parameters in
    3D and 58,760,642 in 2D (one channel in, two out).

    Departs from the paper: of its three heads the context encoding is left out; ResNet's stem is one 7 × 7
    convolution; separable convolutions have no norm between their halves; in 3D there are fewer channels by default.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        encoder: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``xception41``, ``xception65``, ``vgg16`` or
            ``mobilenet_v2``.
        width: Channels of the encoder's stem; all others are in proportion.
        jpu_channels: To which the upsampling brings each level. None: 512 in 2D, 128 in 3D.
        dilations: Of its separable convolutions, each of which gives as many channels.
        context: The head: ``aspp`` (as in DeepLab v3) or ``psp`` (as in PSPNet).
        rates: Dilations of ``aspp``, at an output stride of 16; here, at 8, they are doubled. None: (6, 12, 18)
            in 2D and in plane, else (1, 2, 3).
        bins: Of ``psp``: into which each axis is divided, a number for each scale.
        head_channels: That the head classifies.
        in_plane: Whether strides, poolings and dilations leave the third axis alone, for thick slices.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped before the classification.
        deep_supervision: Whether training also scores the encoder's last stage but one, by a head of its own.

    Reference:
        Wu et al. 2019, arXiv:1903.11816.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        encoder: str = "resnet50",
        width: int = 64,
        jpu_channels: int | None = None,
        dilations: Sequence[int] = (1, 2, 4, 8),
        context: Literal["aspp", "psp"] = "aspp",
        rates: Sequence[int] | None = None,
        bins: Sequence[int] = (1, 2, 3, 6),
        head_channels: int = 256,
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.1,
        deep_supervision: bool = False,
    ) -> None:
        if context not in ("aspp", "psp"):
            raise ValueError(f"context is {context!r}; it must be one of aspp, psp")
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        super().__init__(
            layers, in_channels, out_channels, encoder=encoder, width=width, output_stride=32,
            in_plane=in_plane, deep_supervision=deep_supervision,
        )  # fmt: skip
        share = _CHANNELS[spatial_dims] if jpu_channels is None else jpu_channels
        self.upsampling = JointPyramidUpsampling(
            layers, self.encoder.channels[-LEVELS:], share, dilations=dilations, in_plane=in_plane
        )
        joined = len(dilations) * share
        if context == "aspp":
            scaled = scaled_rates(rates, spatial_dims, output_stride=8, in_plane=in_plane)
            self.context: nn.Module = ASPP(
                layers, joined, head_channels, rates=scaled, dropout=dropout, in_plane=in_plane
            )
        else:
            pooled = max(1, joined // len(bins))
            pyramid = PyramidPooling(layers, joined, pooled, bins=bins, in_plane=in_plane)
            merge = ConvBlock(replace(layers, dropout=dropout), joined + len(bins) * pooled, head_channels)
            self.context = nn.Sequential(pyramid, merge)
        self.head = layers.head(head_channels, out_channels)
        for part in (self.upsampling, self.context, self.head):
            initialize(part)

    def classified(self, features: Sequence[Tensor]) -> Tensor:
        return self.head(self.context(self.upsampling(features[-LEVELS:])))  # (B, R, I/8, …)


class JointPyramidUpsampling(nn.Module):
    """The last features of an encoder, brought to the finest's resolution as if none of them had been strided.

    Args:
        layers: What the network's layers agree on.
        sources: Channels of the features, finest first.
        channels: To which each is brought; and that each dilation gives.
        dilations: Of the separable convolutions that see them all.
        in_plane: Whether these leave the third axis alone.
    """

    def __init__(
        self,
        layers: Layers,
        sources: Sequence[int],
        channels: int,
        *,
        dilations: Sequence[int] = (1, 2, 4, 8),
        in_plane: bool = False,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(ConvBlock(layers, source, channels) for source in sources)
        self.dilated = nn.ModuleList(
            SeparableConv(
                layers,
                len(sources) * channels,
                channels,
                dilation=plane_stride(dilation, layers.spatial_dims, in_plane=in_plane),
            )
            for dilation in dilations
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, dilations × channels, …) at the resolution of the first of the features, finest first."""
        size = features[0].shape[2:]
        levels = [resize(level(x), size) for level, x in zip(self.levels, features, strict=True)]
        joined = torch.cat(levels, dim=1)
        return torch.cat([conv(joined) for conv in self.dilated], dim=1)
