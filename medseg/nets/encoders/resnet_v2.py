"""ResNet with weight standardization and group norm (Big Transfer's), in 2D and 3D."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from medseg.nets.blocks import PerAxis, per_axis
from medseg.nets.convolution import conv_class, convolve
from medseg.nets.encoders.encoder import Encoder, plane_stride
from medseg.nets.normalization import GroupNorm

EXPANSION = 4
"""Output channels of a bottleneck over those of its 3 × 3 convolution."""

_VARIANCE_EPS = 1e-5


class ResNetV2(Encoder):
    """The ResNet in front of hybrid vision transformers: three stages of bottlenecks, to 1/16, without batch norm.

    Its features are those of the stem, at 1/2, then of each stage, from 1/4 on. Modules are named as in
    timm's hybrids (``vit_base_r50_s16_224``, under ``patch_embed.backbone``).

    Departs from it: the stem's kernels are standardized when published ones are loaded, not at each step, so that
    they can be fitted to other image channels; and strided convolutions pad both ends alike, where TensorFlow,
    which the published weights come from, pads the far end.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        width: Channels of the stem; stages have 4, 8, 16 times as many.
        blocks: Bottlenecks of each stage.
        in_plane: Whether the third axis keeps its resolution.

    Reference:
        Kolesnikov et al. 2020, arXiv:1912.11370; Qiao et al. 2019, arXiv:1903.10520 (weight standardization).
    """

    published: ClassVar[Mapping[str, str]] = {"patch_embed.backbone.": ""}

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        width: int = 64,
        blocks: Sequence[int] = (3, 4, 9),
        in_plane: bool = False,
    ) -> None:
        if not blocks or min(blocks) < 1:
            raise ValueError(f"blocks {tuple(blocks)}; give one stage or more, of at least 1 block each")
        super().__init__(
            [width, *(EXPANSION * width * 2**n for n in range(len(blocks)))],
            [plane_stride(2 ** (n + 1), spatial_dims, in_plane=in_plane) for n in range(len(blocks) + 1)],
            spatial_dims,
        )
        halved = plane_stride(2, spatial_dims, in_plane=in_plane)
        stem = StandardizedConv(spatial_dims, in_channels, width, kernel_size=7, stride=halved, standardize=False)
        self.stem = nn.Sequential(OrderedDict(conv=stem, norm=_norm(width), act=nn.ReLU(inplace=True)))
        kernel = plane_stride(3, spatial_dims, in_plane=in_plane)
        self.pool = (nn.MaxPool2d if spatial_dims == 2 else nn.MaxPool3d)(
            kernel, stride=halved, padding=tuple(k // 2 for k in kernel)
        )
        stages = []
        for n, depth in enumerate(blocks):
            narrow, wide = self.channels[n], self.channels[n + 1]
            stage = [
                Bottleneck(
                    spatial_dims,
                    wide if block else narrow,
                    wide,
                    stride=halved if n and not block else 1,
                )
                for block in range(depth)
            ]
            stages.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*stage))))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.stem(x)]  # (B, width, I/2, …)
        x = self.pool(features[0])
        for stage in self.stages:
            x = stage(x)  # (B, channels[n + 1], I / 2^(n + 2), …)
            features.append(x)
        return features

    @staticmethod
    def fitted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the plane with their standardization carried out.

        Padded with zeros to a third axis, other weights would be standardized to something else. A factor
        that all of a kernel then have in common the group norm after it takes away.
        """
        return {name: standardized(weight) if weight.dim() > 2 else weight for name, weight in weights.items()}


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolutions with a shortcut around them; the 3 × 3 one is strided."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, *, stride: PerAxis = 1) -> None:
        super().__init__()
        inner = out_channels // EXPANSION
        self.downsample: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            conv = StandardizedConv(spatial_dims, in_channels, out_channels, kernel_size=1, stride=stride)
            self.downsample = nn.Sequential(OrderedDict(conv=conv, norm=_norm(out_channels)))
        self.conv1 = StandardizedConv(spatial_dims, in_channels, inner, kernel_size=1)
        self.norm1 = _norm(inner)
        self.conv2 = StandardizedConv(spatial_dims, inner, inner, kernel_size=3, stride=stride)
        self.norm2 = _norm(inner)
        self.conv3 = StandardizedConv(spatial_dims, inner, out_channels, kernel_size=1)
        self.norm3 = _norm(out_channels)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.activation(self.norm1(self.conv1(x)))
        x = self.activation(self.norm2(self.conv2(x)))
        return self.activation(self.norm3(self.conv3(x)) + shortcut)


class StandardizedConv(nn.Module):
    """A convolution without bias whose kernels have mean 0 and variance 1, whatever its weights are.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Of the input.
        out_channels: Of the output.
        kernel_size: Odd, the same along all axes.
        stride: Of the convolution.
        standardize: Whether they have; else they are the weights themselves.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: PerAxis = 1,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        conv = conv_class(spatial_dims)(in_channels, out_channels, kernel_size, bias=False)
        nn.init.kaiming_normal_(conv.weight)
        self.weight = conv.weight
        self.standardize = standardize
        self.stride = per_axis(stride, spatial_dims)
        self.padding = (kernel_size // 2,) * spatial_dims

    def forward(self, x: Tensor) -> Tensor:
        weight = standardized(self.weight) if self.standardize else self.weight
        return convolve(x, weight, stride=self.stride, padding=self.padding)


def standardized(weight: Tensor) -> Tensor:
    """The weights of a convolution, each output channel's brought to mean 0 and variance 1."""
    axes = tuple(range(1, weight.dim()))
    deviation = weight - weight.mean(dim=axes, keepdim=True)
    variance = deviation.square().mean(dim=axes, keepdim=True)
    return deviation / (variance + _VARIANCE_EPS).sqrt()


def _norm(channels: int) -> nn.Module:
    return GroupNorm(math.gcd(channels, 32), channels)
