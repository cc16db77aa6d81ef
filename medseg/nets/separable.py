"""Convolutions that split their work: depthwise separable ones, inverted residuals, grouped ones that are shuffled."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, PerAxis, per_axis, shrink_residuals


class SeparableConv(nn.Sequential):
    """Depthwise separable convolution: first in space, each channel alone, then across channels; norm, activation.

    From 256 to 256 channels it has a ninth of an ordinary 3 × 3 convolution's weights, and a twenty-fourth of a
    3 × 3 × 3 one's. Modules are named as in timm's Xception.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input.
        out_channels: Of the output.
        kernel_size: Of the depthwise convolution.
        stride: Of the depthwise convolution.
        dilation: Of the depthwise convolution.
        norm_between: Whether a norm follows the depthwise convolution too.
        activate: Whether activations follow the norms.

    Reference:
        Chollet 2017, arXiv:1610.02357; Chen et al. 2018, arXiv:1802.02611 (dilated).
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: PerAxis = 3,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        norm_between: bool = False,
        activate: bool = True,
    ) -> None:
        bias = layers.norm == "none"
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["conv_dw"] = layers.conv(
            in_channels,
            in_channels,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            groups=in_channels,
            bias=bias and norm_between,  # else the second convolution's does
        )
        if norm_between:
            parts["bn_dw"] = layers.make_norm(in_channels)
            if activate:
                parts["act_dw"] = layers.make_activation(in_channels)
        parts["conv_pw"] = layers.conv(in_channels, out_channels, kernel_size=1, bias=bias)
        parts["bn_pw"] = layers.make_norm(out_channels)
        if activate:
            parts["act_pw"] = layers.make_activation(out_channels)
        super().__init__(parts)


class InvertedResidual(nn.Module):
    """From few channels to many, a depthwise convolution there, and back to few, without an activation at the end.

    The sum with the input, where both have the same shape, is thus between the narrow ends: what is kept for it
    is small. Modules are named as in torchvision's MobileNetV2.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Of the depthwise convolution.
        dilation: Of the depthwise convolution.
        expansion: How many times as many channels lie between as come in.

    Reference:
        Sandler et al. 2018, arXiv:1801.04381.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        out_channels: int,
        *,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        expansion: int = 6,
    ) -> None:
        super().__init__()
        if expansion < 1:
            raise ValueError(f"expansion is {expansion}; it must be at least 1")
        wide = expansion * in_channels
        parts = []
        if expansion > 1:
            parts.append(nn.Sequential(*ConvBlock(layers, in_channels, wide, kernel_size=1)))
        depthwise = ConvBlock(layers, wide, wide, stride=stride, dilation=dilation, groups=wide)
        parts.append(nn.Sequential(*depthwise))
        narrow = ConvBlock(layers, wide, out_channels, kernel_size=1, activate=False)
        self.conv = nn.Sequential(*parts, *narrow)
        self.summed = in_channels == out_channels and set(per_axis(stride, layers.spatial_dims)) == {1}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.summed else self.conv(x)


def calm_inverted_residuals(network: nn.Module) -> None:
    """Scale the weights that `initialize` drew, where no norm keeps activations at their size.

    The first convolution of a block follows no activation that would halve its input's variance; and all
    sums together add as much as one block gives.
    """
    last_convs = []
    for block in network.modules():
        if isinstance(block, InvertedResidual):
            first, *_, last = (m for m in block.conv.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
            with torch.no_grad():
                first.weight.mul_(math.sqrt(0.5))
            last_convs += [last] if block.summed else []
    shrink_residuals(last_convs)


class ShuffledConv(nn.Sequential):
    """Grouped convolution, norm, activation; then the channels are dealt out, so that the next groups see all of them.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input.
        out_channels: Of the output; like `in_channels` divisible by `groups`.
        groups: Into which the channels are split: weights and work become as many times fewer.
        kernel_size: Of the convolution.
        stride: Of the convolution.

    Reference:
        Zhang et al. 2018, arXiv:1707.01083 (ShuffleNet).
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        kernel_size: PerAxis = 1,
        stride: PerAxis = 1,
    ) -> None:
        conv = ConvBlock(layers, in_channels, out_channels, kernel_size=kernel_size, stride=stride, groups=groups)
        super().__init__(conv, nn.ChannelShuffle(groups))
