"""BiSeNet, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, initialize, resize
from medseg.nets.dilated import DILATED_ENCODERS
from medseg.nets.encoders.encoder import plane_stride
from medseg.nets.gates import SqueezeExcitation
from medseg.nets.network import AxisSizes, SegmentationNetwork
from medseg.nets.pyramids import BinPooling, pooled_norm

SPATIAL_STRIDE = 8
CONTEXT_LEVELS = 2
"""The encoder's last features, which the context path refines: those at strides 16 and 32."""


class BiSeNet(SegmentationNetwork):
    """BiSeNet: a shallow path keeps an eighth of the resolution, a deep one finds the context; a gate fuses them.

    Takes any size from `min_size` (32 by default) up; multiples of it need no padding. By default 37,592,770
    parameters in 3D and 12,782,530 in 2D (one channel in, two out).

    Departs from the paper: values averaged over the image are normalized over channels, unless ``norm="batch"``,
    which is the paper's, is asked for. Where the paper is silent, as its first author's code: 3 × 3 convolutions
    before the attention and after each sum.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        encoder: Of the context path: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``xception41``,
            ``xception65``, ``mobilenet_v2`` or ``vgg16``.
        width: Channels of the encoder's stem, and of the spatial path.
        context_channels: Of each path's end; the fused features have twice as many.
        reduction: By how much the layer within the fusion's gate is narrower.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped before the classification.
        in_plane: Whether strides and poolings leave the third axis alone, for thick slices.
        deep_supervision: Whether training also scores the context path, at strides 8 and 16, as the paper does.

    Reference:
        Yu et al. 2018, arXiv:1808.00897.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        encoder: str = "resnet18",
        width: int = 64,
        context_channels: int = 128,
        reduction: int = 4,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.0,
        in_plane: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        made = DILATED_ENCODERS[encoder](
            spatial_dims, in_channels, width=width, output_stride=32, in_plane=in_plane, norm=norm,
            activation=activation,
        )  # fmt: skip
        super().__init__(
            AxisSizes.of_strides([made.strides[-1]]), extra_weights=[1.0] * CONTEXT_LEVELS if deep_supervision else []
        )
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        fused = 2 * context_channels
        self.encoder = made
        self.spatial = SpatialPath(layers, in_channels, width, context_channels, in_plane=in_plane)
        self.context = ContextPath(layers, made.channels[-CONTEXT_LEVELS:], context_channels)
        self.fuse = FeatureFusion(layers, fused, reduction=reduction)
        self.head = _head(replace(layers, dropout=dropout), fused, width, out_channels)
        self.extra_heads = nn.ModuleList()
        if deep_supervision:
            self.extra_heads.extend(_head(layers, context_channels, fused, out_channels) for _ in range(CONTEXT_LEVELS))
        for part in (self.spatial, self.context, self.fuse, self.head, self.extra_heads):
            initialize(part)

    def outputs(self, x: Tensor) -> list[Tensor]:
        spatial = self.spatial(x)  # (B, context_channels, I/8, …)
        contexts = self.context(self.encoder(x)[-CONTEXT_LEVELS:], spatial.shape[2:])
        logits = self.head(self.fuse(spatial, contexts[0]))
        pairs = zip(self.extra_heads, contexts, strict=False) if self.training else ()
        return [resize(logits, x.shape[2:]), *[head(context) for head, context in pairs]]


class SpatialPath(nn.Sequential):
    """Three strided convolutions and a 1 × 1 one: details, at an eighth of the resolution."""

    def __init__(
        self, layers: Layers, in_channels: int, width: int, out_channels: int, *, in_plane: bool = False
    ) -> None:
        stride = plane_stride(2, layers.spatial_dims, in_plane=in_plane)
        super().__init__(
            ConvBlock(layers, in_channels, width, kernel_size=7, stride=stride),
            ConvBlock(layers, width, width, stride=stride),
            ConvBlock(layers, width, width, stride=stride),
            ConvBlock(layers, width, out_channels, kernel_size=1),
        )


class ContextPath(nn.Module):
    """From the average over the image down through the encoder's features, coarsest first, each refined and added.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the features, finest first.
        channels: Of the outputs.
    """

    def __init__(self, layers: Layers, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.average = BinPooling(layers, in_channels[-1], channels)
        self.attend = nn.ModuleList(AttentionRefinement(layers, wide, channels) for wide in in_channels)
        self.refine = nn.ModuleList(ConvBlock(layers, channels, channels) for _ in in_channels)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """Refined features, each as fine as the next finer of those given; the first of `size`.

        Args:
            features: Of the encoder, finest first.
            size: Of the spatial path.
        """
        x = self.average(features[-1])
        sizes = [size, *[feature.shape[2:] for feature in features[:-1]]]
        refined: list[Tensor] = []
        for feature, attend, refine, finer in reversed(
            list(zip(features, self.attend, self.refine, sizes, strict=True))
        ):
            x = refine(resize(attend(feature) + x, finer))
            refined.insert(0, x)
        return refined


class AttentionRefinement(nn.Module):
    """A convolution whose channels are weighed by what the whole field of view holds."""

    def __init__(self, layers: Layers, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = ConvBlock(layers, in_channels, channels)
        self.weigh = nn.Sequential(
            layers.conv(channels, channels, kernel_size=1, bias=layers.norm == "none"),
            pooled_norm(layers, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.weigh(x.mean(dim=tuple(range(2, x.dim())), keepdim=True))


class FeatureFusion(nn.Module):
    """Two paths joined; channels weighed by the field of view are added to what they were.

    Args:
        layers: What the network's layers agree on.
        channels: Of both together, and of the output.
        reduction: By how much the layer within the gate is narrower.
    """

    def __init__(self, layers: Layers, channels: int, *, reduction: int) -> None:
        super().__init__()
        self.join = ConvBlock(layers, channels, channels, kernel_size=1)
        self.gate = SqueezeExcitation(layers, channels, reduction=reduction)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        x = self.join(torch.cat([spatial, context], dim=1))
        return x + self.gate(x)


def _head(layers: Layers, in_channels: int, hidden: int, out_channels: int) -> nn.Module:
    return nn.Sequential(ConvBlock(layers, in_channels, hidden), layers.head(hidden, out_channels))
