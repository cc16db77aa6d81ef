"""ENet, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, PerAxis, TransposedConv, initialize, shrink_residuals
from medseg.nets.encoders.encoder import plane_stride
from medseg.nets.network import AxisSizes, SegmentationNetwork
from medseg.nets.unpooling import MaxPoolWithIndices, max_unpool

ASYMMETRIC = 5
"""Length of the kernels that see along one axis each."""


class ENet(SegmentationNetwork):
    """ENet: early downsampling, then narrow bottlenecks, dilated or of kernels along one axis; a small decoder.

    The decoder's shortcuts put values where the encoder's maxima were. Takes any size from `min_size` (8 by
    default) up; multiples of it need no padding. By default 664,615 parameters in 3D and 361,273 in 2D
    (one channel in, two out).

    Departs from the paper: shorter dilations in 3D, as its own span 16 voxels at an eighth of the image; instance
    norm in 3D.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image, which the initial block passes on: fewer than the first of `channels`.
        out_channels: Classes or regions.
        channels: At strides 2, 4 and 8.
        regular_blocks: Bottlenecks at stride 4.
        context_stages: How often the sequence of regular, dilated and asymmetric bottlenecks runs, at stride 8.
        dilations: Of the dilated ones, in order. None: (2, 4, 8, 16) in 2D and in plane, else (2, 3, 4, 5).
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``prelu``, ``relu``, ``leakyrelu``, ``elu``, ``gelu`` or ``silu``.
        dropout: Probability that a bottleneck drops a channel before the sum; at stride 4 a tenth of it.
        in_plane: Whether strides and dilations leave the third axis alone, for thick slices.

    Reference:
        Paszke et al. 2016, arXiv:1606.02147.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (16, 64, 128),
        regular_blocks: int = 4,
        context_stages: int = 2,
        dilations: Sequence[int] | None = None,
        norm: str = "auto",
        activation: str = "prelu",
        dropout: float = 0.1,
        in_plane: bool = False,
    ) -> None:
        if len(channels) != 3:
            raise ValueError(f"channels {tuple(channels)}; give three, for strides 2, 4 and 8")
        first, middle, last = channels
        if in_channels >= first:
            raise ValueError(f"an image of {in_channels} channels; the first of channels, {first}, must be more")
        if dilations is None:
            dilations = (2, 4, 8, 16) if spatial_dims == 2 or in_plane else (2, 3, 4, 5)
        super().__init__(AxisSizes.of_strides([plane_stride(8, spatial_dims, in_plane=in_plane)]))
        layers = Layers(spatial_dims, norm=norm, activation=activation, dropout=dropout)
        early = replace(layers, dropout=dropout / 10)
        stride = plane_stride(2, spatial_dims, in_plane=in_plane)

        self.initial = InitialBlock(layers, in_channels, first, stride=stride)
        self.down1 = DownsamplingBottleneck(early, first, middle, stride=stride)
        self.stage1 = nn.Sequential(*[Bottleneck(early, middle) for _ in range(regular_blocks)])
        self.down2 = DownsamplingBottleneck(layers, middle, last, stride=stride)
        context = []
        for _ in range(context_stages):
            for n, dilation in enumerate(dilations):
                spread = plane_stride(dilation, spatial_dims, in_plane=in_plane)
                context += [Bottleneck(layers, last, asymmetric=n % 2 == 1), Bottleneck(layers, last, dilation=spread)]
        self.context = nn.Sequential(*context)
        self.up2 = UpsamplingBottleneck(layers, last, middle, stride=stride)
        self.stage4 = nn.Sequential(Bottleneck(layers, middle), Bottleneck(layers, middle))
        self.up1 = UpsamplingBottleneck(layers, middle, first, stride=stride)
        self.stage5 = Bottleneck(layers, first)
        self.head = TransposedConv(layers, first, out_channels, stride=stride)
        initialize(self)
        if norm == "none":
            added = [m.expand for m in self.modules() if isinstance(m, Bottleneck)]
            resampling = (self.down1, self.down2, self.up2, self.up1)
            shrink_residuals([*added, *[m.residual[-2] for m in resampling]])

    def outputs(self, x: Tensor) -> list[Tensor]:
        x = self.initial(x)  # (B, channels[0], I/2, …)
        x, places1 = self.down1(x)
        x, places2 = self.down2(self.stage1(x))  # (B, channels[2], I/8, …)
        x = self.up2(self.context(x), places2)
        x = self.up1(self.stage4(x), places1)
        return [self.head(self.stage5(x))]


class InitialBlock(nn.Module):
    """Half the resolution: some channels of a strided convolution, the others the image itself, max-pooled."""

    def __init__(self, layers: Layers, in_channels: int, out_channels: int, *, stride: PerAxis) -> None:
        super().__init__()
        made = out_channels - in_channels
        self.conv = layers.conv(in_channels, made, kernel_size=3, stride=stride, bias=layers.norm == "none")
        self.pool = layers.max_pool(stride)
        self.norm = layers.make_norm(out_channels)
        self.activation = layers.make_activation(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(torch.cat([self.conv(x), self.pool(x)], dim=1)))


class Bottleneck(nn.Module):
    """A shortcut, and beside it: to a quarter of the channels, a convolution among them, back, spatial dropout.

    Args:
        layers: What the network's layers agree on; its dropout comes before the sum.
        channels: Of input and output.
        dilation: Of the convolution.
        asymmetric: Whether it is one of 5 voxels along each axis in turn.
    """

    def __init__(self, layers: Layers, channels: int, *, dilation: PerAxis = 1, asymmetric: bool = False) -> None:
        super().__init__()
        hidden = max(1, channels // 4)
        plain = replace(layers, dropout=0.0)
        self.project = ConvBlock(plain, channels, hidden, kernel_size=1)
        kernels: list[PerAxis] = [3]
        if asymmetric:
            dims = range(layers.spatial_dims)
            kernels = [[ASYMMETRIC if axis == n else 1 for axis in dims] for n in dims]
        self.conv = nn.Sequential(
            *[layers.conv(hidden, hidden, kernel_size=kernel, bias=False) for kernel in kernels[:-1]],
            ConvBlock(plain, hidden, hidden, kernel_size=kernels[-1], dilation=dilation),
        )
        self.expand = ConvBlock(plain, hidden, channels, kernel_size=1, activate=False)
        self.drop = layers.make_dropout()
        self.activation = layers.make_activation(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.drop(self.expand(self.conv(self.project(x)))))


class DownsamplingBottleneck(nn.Module):
    """A bottleneck that strides at its entry, beside a max-pooling that keeps the places of the maxima."""

    def __init__(self, layers: Layers, in_channels: int, out_channels: int, *, stride: PerAxis) -> None:
        super().__init__()
        hidden = max(1, out_channels // 4)
        plain = replace(layers, dropout=0.0)
        self.pool = MaxPoolWithIndices(layers, stride)
        self.residual = nn.Sequential(
            ConvBlock(plain, in_channels, hidden, kernel_size=stride, stride=stride),
            ConvBlock(plain, hidden, hidden),
            ConvBlock(plain, hidden, out_channels, kernel_size=1, activate=False),
            layers.make_dropout(),
        )
        self.activation = layers.make_activation(out_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the places of the maxima, for each channel of the input."""
        pooled, places = self.pool(x)
        residual = self.residual(x)
        missing = residual.shape[1] - pooled.shape[1]
        pooled = F.pad(pooled, [0, 0] * (x.dim() - 2) + [0, missing])  # channels that the input does not have are 0
        return self.activation(pooled + residual), places


class UpsamplingBottleneck(nn.Module):
    """A bottleneck with a transposed convolution, beside an unpooling to where the encoder's maxima were."""

    def __init__(self, layers: Layers, in_channels: int, out_channels: int, *, stride: PerAxis) -> None:
        super().__init__()
        hidden = max(1, out_channels // 4)
        plain = replace(layers, dropout=0.0)
        self.stride = stride
        self.shortcut = ConvBlock(plain, in_channels, out_channels, kernel_size=1, activate=False)
        self.residual = nn.Sequential(
            ConvBlock(plain, in_channels, hidden, kernel_size=1),
            TransposedConv(plain, hidden, hidden, stride=stride, bias=layers.norm == "none"),
            layers.make_norm(hidden),
            layers.make_activation(hidden),
            ConvBlock(plain, hidden, out_channels, kernel_size=1, activate=False),
            layers.make_dropout(),
        )
        self.activation = layers.make_activation(out_channels)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        unpooled = max_unpool(self.shortcut(x), places, stride=self.stride)
        return self.activation(unpooled + self.residual(x))
