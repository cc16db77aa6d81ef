"""Ways back up: unpooling to where the maxima were, and transposed convolutions that start as interpolation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from medseg.nets.blocks import Layers, PerAxis, per_axis


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
