"""Context at several scales: averages over a pyramid of bins, and convolutions dilated at several rates."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from medseg.errors import WorkflowError
from medseg.nets.blocks import ConvBlock, Layers, resize
from medseg.nets.encoders.encoder import plane_stride
from medseg.nets.separable import SeparableConv


class BinPooling(nn.Module):
    """Averages over bins that divide the image, brought to other channels, and interpolated back to every voxel.

    The few values that pooling leaves are normalized over all channels and bins: instance norm would take a
    single bin's value away, and batch norm, which ``norm="batch"`` keeps, learns only from larger batches.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input.
        out_channels: Of the output.
        bins: Along each axis.
        in_plane: Whether the third axis keeps its resolution.
    """

    def __init__(
        self, layers: Layers, in_channels: int, out_channels: int, *, bins: int = 1, in_plane: bool = False
    ) -> None:
        super().__init__()
        third = None if in_plane else bins  # None: as many as there are voxels
        self.pool = (
            nn.AdaptiveAvgPool2d(bins) if layers.spatial_dims == 2 else nn.AdaptiveAvgPool3d((bins, bins, third))
        )
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["conv"] = layers.conv(in_channels, out_channels, kernel_size=1, bias=layers.norm == "none")
        own_norm = layers.norm in ("batch", "none")
        parts["norm"] = layers.make_norm(out_channels) if own_norm else nn.GroupNorm(1, out_channels)
        parts["activation"] = layers.make_activation(out_channels)
        self.block = nn.Sequential(parts)
        self.needs_batch = layers.norm == "batch"

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x)  # (B, C, bins, bins[, bins])
        if self.needs_batch and self.training and pooled[:, 0].numel() == 1:
            raise WorkflowError(
                "E-BATCH-SIZE",
                "a batch of one image, which this network pools to a single value that norm 'batch' cannot learn "
                "from; use a batch_size of at least 2, or leave the norm at 'auto'",
            )
        return resize(self.block(pooled), x.shape[2:])


class PyramidPooling(nn.Module):
    """The features, joined by their averages over coarser and coarser bins.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input.
        out_channels: Of each scale; the output has them all, behind the input's.
        bins: Along each axis, a number for each scale.
        in_plane: Whether the third axis keeps its resolution.

    Reference:
        Zhao et al. 2017, arXiv:1612.01105.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        out_channels: int,
        *,
        bins: Sequence[int] = (1, 2, 3, 6),
        in_plane: bool = False,
    ) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            BinPooling(layers, in_channels, out_channels, bins=number, in_plane=in_plane) for number in bins
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *[scale(x) for scale in self.scales]], dim=1)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: convolutions of several rates beside the image's average, then merged.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input.
        out_channels: Of each branch and of the output.
        rates: Dilation of each 3 × 3 convolution: how far apart the voxels are that it sees.
        separable: Whether these are depthwise separable.
        dropout: Probability that a channel of the output is dropped.
        in_plane: Whether dilation and pooling leave the third axis alone.

    Reference:
        Chen et al. 2017, arXiv:1706.05587.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        out_channels: int = 256,
        *,
        rates: Sequence[int] = (6, 12, 18),
        separable: bool = False,
        dropout: float = 0.0,
        in_plane: bool = False,
    ) -> None:
        super().__init__()
        make_atrous = SeparableConv if separable else ConvBlock
        self.branches = nn.ModuleList([ConvBlock(layers, in_channels, out_channels, kernel_size=1)])
        for rate in rates:
            dilation = plane_stride(rate, layers.spatial_dims, in_plane=in_plane)
            self.branches.append(make_atrous(layers, in_channels, out_channels, dilation=dilation))
        self.branches.append(BinPooling(layers, in_channels, out_channels, in_plane=in_plane))
        merged = len(self.branches) * out_channels
        self.project = ConvBlock(replace(layers, dropout=dropout), merged, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([branch(x) for branch in self.branches], dim=1))
