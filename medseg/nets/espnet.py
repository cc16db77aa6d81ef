"""ESPNet, in 2D and 3D."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, PerAxis, TransposedConv, initialize, shrink_residuals
from medseg.nets.encoders.encoder import Encoder, plane_stride
from medseg.nets.network import AxisSizes, SegmentationNetwork

MIN_DECODER_CHANNELS = 16

_BRANCH = re.compile(r"\.(c1|d\d+)\.conv\.")


class ESPNet(SegmentationNetwork):
    """ESPNet: a convolution is split into a 1 × 1 one and a pyramid of dilated ones that work on few channels.

    The image itself, averaged down, joins the features again at each resolution. Takes any size from `min_size`
    (8 by default) up; multiples of it need no padding. By default 991,677 parameters in 3D and 357,251 in 2D
    (one channel in, two out).

    Departs from the paper: the decoder has at least 16 channels, where the paper's has one a class, too few for
    two; shorter dilations in 3D, as the paper's span 16 voxels at an eighth of the image; instance norm in 3D.
    ``ESPNet(2, 3, 20, norm="batch")`` is the paper's, with 365,109 parameters.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        channels: At strides 2, 4 and 8.
        blocks: ESP modules at strides 4 and 8: the paper's α₂ and α₃.
        dilations: Of a module's branches, ascending, the first 1. None: (1, 2, 4, 8, 16) in 2D and in plane,
            else (1, 2, 3, 4, 5).
        decoder_channels: None: as many as there are classes, at least 16.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``prelu``, ``relu``, ``leakyrelu``, ``elu``, ``gelu`` or ``silu``.
        in_plane: Whether strides, poolings and dilations leave the third axis alone, for thick slices.

    Reference:
        Mehta et al. 2018, arXiv:1803.06815.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (16, 64, 128),
        blocks: Sequence[int] = (2, 8),
        dilations: Sequence[int] | None = None,
        decoder_channels: int | None = None,
        norm: str = "auto",
        activation: str = "prelu",
        in_plane: bool = False,
    ) -> None:
        if dilations is None:
            dilations = (1, 2, 4, 8, 16) if spatial_dims == 2 or in_plane else (1, 2, 3, 4, 5)
        encoder = ESPNetEncoder(
            spatial_dims, in_channels, channels=channels, blocks=blocks, dilations=dilations, norm=norm,
            activation=activation, in_plane=in_plane,
        )  # fmt: skip
        super().__init__(AxisSizes.of_strides([encoder.strides[-1]]))
        self.encoder = encoder
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        stride = plane_stride(2, spatial_dims, in_plane=in_plane)
        width = max(out_channels, MIN_DECODER_CHANNELS) if decoder_channels is None else decoder_channels
        bias = norm == "none"
        self.project = nn.ModuleList(
            layers.conv(wide, width, kernel_size=1, bias=bias) for wide in encoder.channels[1:]
        )
        self.norm = layers.make_norm(width)
        self.up3 = TransposedConv(layers, width, width, stride=stride, bias=bias)
        self.combine = nn.Sequential(
            *_norm_activation(layers, 2 * width),
            ESP(layers, 2 * width, width, dilations=dilations, residual=False, in_plane=in_plane),
        )
        self.up2 = nn.Sequential(
            TransposedConv(layers, width, width, stride=stride, bias=bias), *_norm_activation(layers, width)
        )
        self.merge = ConvBlock(layers, encoder.channels[0] + width, width)
        self.head = TransposedConv(layers, width, out_channels, stride=stride, bias=bias)
        for part in (self.project, self.up3, self.combine, self.up2, self.merge, self.head):
            initialize(part)

    def outputs(self, x: Tensor) -> list[Tensor]:
        fine, middle, coarse = self.encoder(x)
        x = self.up3(self.norm(self.project[1](coarse)))  # (B, decoder_channels, I/4, …)
        x = self.up2(self.combine(torch.cat([self.project[0](middle), x], dim=1)))  # (B, decoder_channels, I/2, …)
        return [self.head(self.merge(torch.cat([x, fine], dim=1)))]


class ESPNetEncoder(Encoder):
    """The encoder of ESPNet, ESPNet-C: features at strides 2, 4 and 8, to which the averaged image is joined.

    The authors' checkpoints fit, without their classifier: 344,329 parameters (2D, three channels, batch norm).

    Args: as `ESPNet`.
    """

    published: ClassVar[Mapping[str, str]] = {
        "level1.bn.": "level1.norm.",
        "level1.act.": "level1.activation.",
        "level2_0.bn.": "level2_0.bn.bn.",
        "level2_0.act.": "level2_0.bn.act.",
        "level3_0.bn.": "level3_0.bn.bn.",
        "level3_0.act.": "level3_0.bn.act.",
    }
    unused = ("classifier.",)

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        channels: Sequence[int],
        blocks: Sequence[int],
        dilations: Sequence[int],
        norm: str,
        activation: str,
        in_plane: bool,
    ) -> None:
        if len(channels) != 3 or len(blocks) != 2:
            raise ValueError(
                f"channels {tuple(channels)} and blocks {tuple(blocks)}; give three, for strides 2, 4 and 8, and two"
            )
        first, middle, last = channels
        joined = [first + in_channels, 2 * middle + in_channels, 2 * last]
        super().__init__(joined, [plane_stride(n, spatial_dims, in_plane=in_plane) for n in (2, 4, 8)], spatial_dims)
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        stride = plane_stride(2, spatial_dims, in_plane=in_plane)
        kernel = plane_stride(3, spatial_dims, in_plane=in_plane)
        average: Any = nn.AvgPool2d if spatial_dims == 2 else nn.AvgPool3d
        self.average = average(kernel, stride=stride, padding=tuple(k // 2 for k in kernel))
        self.level1 = ConvBlock(layers, in_channels, first, stride=stride)
        self.b1 = _norm_activation(layers, joined[0])
        self.level2_0 = ESP(layers, joined[0], middle, dilations=dilations, stride=stride, in_plane=in_plane)
        self.level2 = _modules(layers, middle, blocks[0], dilations, in_plane)
        self.b2 = _norm_activation(layers, joined[1])
        self.level3_0 = ESP(layers, joined[1], last, dilations=dilations, stride=stride, in_plane=in_plane)
        self.level3 = _modules(layers, last, blocks[1], dilations, in_plane)
        self.b3 = _norm_activation(layers, joined[2])
        initialize(self)
        if norm == "none":
            shrink_residuals([m.branches for m in self.modules() if isinstance(m, ESP) and m.residual])

    def forward(self, x: Tensor) -> list[Tensor]:
        halved = self.average(x)
        fine = self.b1(torch.cat([self.level1(x), halved], dim=1))
        entry = self.level2_0(fine)
        middle = self.b2(torch.cat([self.level2(entry), entry, self.average(halved)], dim=1))
        entry = self.level3_0(middle)
        return [fine, middle, self.b3(torch.cat([entry, self.level3(entry)], dim=1))]

    def fitted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_BRANCH.sub(_without_wrapper, name): tensor for name, tensor in weights.items()}


class ESP(nn.Module):
    """Efficient spatial pyramid: to few channels, convolutions of several dilations, and their outputs joined.

    The outputs but the first are summed up on the way, each with those of smaller dilations: alone, the
    farthest taps would leave a grid in them (hierarchical feature fusion).

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input.
        out_channels: Of the output.
        dilations: Of the branches, ascending.
        stride: Of the first convolution, which then is a 3 × 3 one instead of a 1 × 1 one.
        residual: Whether the input is added.
        in_plane: Whether dilations leave the third axis alone.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        out_channels: int,
        *,
        dilations: Sequence[int],
        stride: PerAxis = 1,
        residual: bool = False,
        in_plane: bool = False,
    ) -> None:
        super().__init__()
        narrow = out_channels // len(dilations)
        if len(set(dilations)) < len(dilations):
            raise ValueError(f"dilations {tuple(dilations)}; each must be there once")
        if narrow < 1:
            raise ValueError(f"{out_channels} channels for {len(dilations)} dilations; give at least one each")
        bias = layers.norm == "none"
        self.residual = residual
        self.c1 = layers.conv(in_channels, narrow, kernel_size=1 if stride == 1 else 3, stride=stride, bias=bias)
        self.branches = nn.ModuleDict()
        for n, dilation in enumerate(dilations):
            width = narrow if n else out_channels - (len(dilations) - 1) * narrow
            spread = plane_stride(dilation, layers.spatial_dims, in_plane=in_plane)
            self.branches[f"d{dilation}"] = layers.conv(narrow, width, kernel_size=3, dilation=spread, bias=bias)
        self.bn = _norm_activation(layers, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.c1(x)
        first, *others = [branch(reduced) for branch in self.branches.values()]
        y = torch.cat([first, *itertools.accumulate(others)], dim=1)
        return self.bn(x + y if self.residual else y)


def _without_wrapper(match: re.Match[str]) -> str:
    return ".c1." if match[1] == "c1" else f".branches.{match[1]}."


def _modules(layers: Layers, channels: int, number: int, dilations: Sequence[int], in_plane: bool) -> nn.Sequential:
    return nn.Sequential(
        *[ESP(layers, channels, channels, dilations=dilations, residual=True, in_plane=in_plane) for _ in range(number)]
    )


def _norm_activation(layers: Layers, channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(bn=layers.make_norm(channels), act=layers.make_activation(channels)))
