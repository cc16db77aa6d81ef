"""Ways back up: unpooling to where the maxima were, VGG mirrored by it, and transposed convolutions that interpolate."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from medseg.nets.blocks import Layers, PerAxis, initialize, per_axis
from medseg.nets.encoders.encoder import plane_stride
from medseg.nets.encoders.vgg import VGG, conv_layers
from medseg.nets.network import AxisSizes, SegmentationNetwork


class MaxPoolWithIndices(nn.Module):
    """Max-pooling that also says where each maximum was.

    Args:
        layers: What the network's layers agree on.
        stride: Size of the blocks of which one voxel stays.
    """

    def __init__(self, layers: Layers, stride: PerAxis) -> None:
        super().__init__()
        strides = per_axis(stride, layers.spatial_dims)
        self.pool = (nn.MaxPool2d if layers.spatial_dims == 2 else nn.MaxPool3d)(strides, return_indices=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The maxima (B, C, I / stride, …) and their places in the flattened axes of `x`."""
        return self.pool(x)


def max_unpool(x: Tensor, indices: Tensor, *, stride: PerAxis) -> Tensor:
    """Put values where the maxima of an earlier pooling were, and 0 everywhere else.

    Args:
        x: (B, C, I, J[, K]).
        indices: Those that `MaxPoolWithIndices` gave, of the same shape.
        stride: Of that pooling.

    Returns:
        (B, C, I × stride, …).
    """
    size = [n * s for n, s in zip(x.shape[2:], per_axis(stride, x.dim() - 2), strict=True)]
    # Not F.max_unpool3d, which has no deterministic form on a GPU; blocks do not overlap, so a plain scatter will do.
    empty = x.new_zeros(*x.shape[:2], math.prod(size))
    return empty.scatter(2, indices.flatten(2), x.flatten(2)).unflatten(2, size)


class MirroredVGG(SegmentationNetwork):
    """VGG's convolutions and their mirror image; each unpooling puts values where a maximum was.

    What SegNet and DeconvNet have in common. A subclass may compute on the deepest features by `bottom`.

    Args:
        encoder: Without its classifier.
        layers: What the decoder's layers agree on; their dropout follows each stage, of the encoder too.
        out_channels: Classes or regions.
        ends_in_logits: Whether the mirror image of the first convolution gives the logits; else one more does, 1 × 1.
        in_plane: As the encoder's.
    """

    def __init__(
        self, encoder: VGG, layers: Layers, out_channels: int, *, ends_in_logits: bool, in_plane: bool
    ) -> None:
        super().__init__(AxisSizes.of_strides([encoder.strides[-1]]))
        self.encoder = encoder
        self.stride = plane_stride(2, layers.spatial_dims, in_plane=in_plane)
        self.pool = MaxPoolWithIndices(layers, self.stride)
        self.decoder = nn.ModuleList()  # in the order of the stages, finest first
        for n, num_convs in enumerate(encoder.convs_per_stage):
            widths = [encoder.channels[n]] * num_convs
            if n or not ends_in_logits:
                widths.append(encoder.channels[max(0, n - 1)])
            parts = [part for a, b in itertools.pairwise(widths) for part in conv_layers(layers, a, b)]
            self.decoder.append(nn.Sequential(*parts))
        self.head = layers.conv(encoder.channels[0], out_channels, kernel_size=3 if ends_in_logits else 1)
        self.drop = layers.make_dropout()
        initialize(self.decoder)
        initialize(self.head)

    def bottom(self, x: Tensor) -> Tensor:
        """What becomes of the deepest features (B, channels[-1], I / 2^depth, …) before they are unpooled."""
        return x

    def outputs(self, x: Tensor) -> list[Tensor]:
        places = []
        for n in range(len(self.decoder)):
            x, indices = self.pool(self.drop(self.encoder.stage(n, x)))  # (B, channels[n], I / 2^(n+1), …)
            places.append(indices)
        x = self.bottom(x)
        for stage, indices in zip(reversed(self.decoder), reversed(places), strict=True):
            x = self.drop(stage(max_unpool(x, indices, stride=self.stride)))
        return [self.head(x)]


class TransposedBilinear(nn.Module):
    """Upsampling learned by a transposed convolution that starts as (bi-, tri-)linear interpolation.

    At the borders it fades to 0 where interpolation continues the last voxel.

    Args:
        layers: What the network's layers agree on.
        channels: Of input and output; each starts with a kernel for itself alone.
        stride: How much finer the output is.
    """

    def __init__(self, layers: Layers, channels: int, *, stride: PerAxis) -> None:
        super().__init__()
        strides = per_axis(stride, layers.spatial_dims)
        kernel = tuple(2 * s - s % 2 for s in strides)
        conv: Any = nn.ConvTranspose2d if layers.spatial_dims == 2 else nn.ConvTranspose3d
        self.conv = conv(channels, channels, kernel, stride=strides, padding=tuple(s // 2 for s in strides), bias=False)
        linear = torch.ones(())
        for size in kernel:
            linear = linear[..., None] * _triangle(size)
        with torch.no_grad():
            self.conv.weight.zero_()
            for channel in range(channels):
                self.conv.weight[channel, channel] = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _triangle(size: int) -> Tensor:
    """What a voxel adds to its finer neighbours along one axis."""
    reach = (size + 1) // 2
    return 1 - (torch.arange(size) - (size - 1) / 2).abs() / reach
