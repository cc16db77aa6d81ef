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
from medseg.nets.encoders.vgg import hidden_layers
from medseg.nets.normalization import GroupNorm
from medseg.nets.separable import SeparableConv


def pooled_norm(layers: Layers, channels: int) -> nn.Module:
    """The norm of the few values that pooling leaves: over all of their channels and bins.

    Instance norm would take a single bin's value away, and batch norm, which ``norm="batch"`` keeps, learns only
    from larger batches: a single value is refused.
    """
    if layers.norm == "none":
        return nn.Identity()
    if layers.norm != "batch":
        return GroupNorm(1, channels)
    norm = layers.make_norm(channels)
    norm.register_forward_pre_hook(_refuse_single_value)
    return norm


def _refuse_single_value(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    if norm.training and inputs[0][:, 0].numel() == 1:
        raise WorkflowError(
            "E-BATCH-SIZE",
            "a batch of one image, which this network pools to a single value that norm 'batch' cannot learn "
            "from; use a batch_size of at least 2, or leave the norm at 'auto'",
        )


class BinPooling(nn.Module):
    """Averages over bins that divide the image, brought to other channels, and interpolated back to every voxel.

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
        parts["norm"] = pooled_norm(layers, out_channels)
        parts["activation"] = layers.make_activation(out_channels)
        self.block = nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        return resize(self.block(self.pool(x)), x.shape[2:])  # pooled to (B, C, bins, bins[, bins])


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


class SummedASPP(nn.Module):
    """The first atrous spatial pyramid: classifiers that each look around at a rate of their own, summed.

    Args:
        layers: What the network's layers agree on; there is no norm here.
        in_channels: Of the input.
        out_channels: Classes or regions.
        hidden_channels: Of each classifier's two hidden layers, the first of which is dilated, as VGG's made
            convolutions; 0: none, the dilated convolution gives the logits.
        rates: Dilation of each.
        dropout: Probability that a unit of the hidden layers is dropped.
        in_plane: Whether dilation leaves the third axis alone.

    Reference:
        Chen et al. 2016, arXiv:1606.00915; with one rate Chen et al. 2015, arXiv:1412.7062.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int,
        rates: Sequence[int],
        dropout: float = 0.0,
        in_plane: bool = False,
    ) -> None:
        super().__init__()
        if not rates:
            raise ValueError("rates is empty; give at least one")
        self.branches = nn.ModuleList()
        for rate in rates:
            dilation = plane_stride(rate, layers.spatial_dims, in_plane=in_plane)
            if hidden_channels:
                hidden = hidden_layers(
                    layers, in_channels, hidden_channels, kernel_size=3, dropout=dropout, dilation=dilation
                )
                self.branches.append(nn.Sequential(*hidden, layers.head(hidden_channels, out_channels)))
            else:
                self.branches.append(layers.conv(in_channels, out_channels, kernel_size=3, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.branches[0](x)
        for branch in self.branches[1:]:
            logits = logits + branch(x)
        return logits
