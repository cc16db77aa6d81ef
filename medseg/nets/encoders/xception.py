"""Aligned Xception in 2D and 3D, with the output stride of one's choice."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.nets.blocks import Layers, PerAxis, initialize, per_axis
from medseg.nets.encoders.encoder import Encoder, plane_stride
from medseg.nets.separable import SeparableConv

MIDDLE_BLOCKS = {41: 8, 65: 16}
"""Blocks of the middle flow, by the number of layers."""

BATCH_NORM_EPS = 1e-3  # what the published weights were trained with


class XceptionBlock(nn.Module):
    """Three separable convolutions and the sum with the input.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input.
        widths: Channels of each convolution.
        stride: Of the last convolution and of the shortcut.
        dilation: Of all three.
        residual: Whether the input is summed with the output and an activation comes before each convolution;
            if not, nothing is summed and an activation follows each half of a convolution.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        widths: Sequence[int],
        *,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        residual: bool = True,
    ) -> None:
        super().__init__()
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for n, width in enumerate(widths, start=1):
            if residual:
                parts[f"act{n}"] = layers.make_activation(channels)
            parts[f"conv{n}"] = SeparableConv(
                layers,
                channels,
                width,
                stride=stride if n == len(widths) else 1,
                dilation=dilation,
                norm_between=True,
                activate=not residual,
            )
            channels = width
        self.stack = nn.Sequential(parts)
        self.shortcut: nn.Module | None = None
        if residual:
            same = in_channels == channels and set(per_axis(stride, layers.spatial_dims)) == {1}
            self.shortcut = nn.Identity() if same else _conv(layers, in_channels, channels, 1, stride, activate=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and what its last convolution, which may be strided, works on."""
        *parts, last = self.stack
        inner = x.clone() if self.shortcut is not None else x  # activations work in place; the sum still needs x
        for part in parts:
            inner = part(inner)
        return last(inner) + self.shortcut(x) if self.shortcut is not None else last(inner), inner


class Xception(Encoder):
    """Aligned Xception: a residual network whose convolutions are all depthwise separable.

    Features at strides 2, 4, 8, 16 and 32, each the last one at its resolution. With a smaller `output_stride`
    the last strides become dilations: the network computes the same, more densely. Modules are named as in
    timm's checkpoints, without the classifier: 37,867,312 parameters with 65 layers, 24,920,560 with 41 (2D,
    three channels, batch norm).

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        num_layers: 41 or 65.
        width: Channels of the stem; all others are in proportion.
        output_stride: 8, 16 or 32, of the last feature.
        in_plane: Whether strides and dilations leave the third axis alone.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.

    Reference:
        Chollet 2017, arXiv:1610.02357; Chen et al. 2018, arXiv:1802.02611 (aligned).
    """

    unused = ("head.",)

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        num_layers: int = 65,
        width: int = 64,
        output_stride: int = 32,
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
    ) -> None:
        if num_layers not in MIDDLE_BLOCKS:
            raise ValueError(f"num_layers is {num_layers}; it must be one of {', '.join(map(str, MIDDLE_BLOCKS))}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {output_stride}; it must be 8, 16 or 32")
        stem, entry1, entry2, middle, exit1, exit2, last = (
            max(1, round(width * n / 64)) for n in (32, 128, 256, 728, 1024, 1536, 2048)
        )
        halving = [(entry1,) * 3, (entry2,) * 3, (middle,) * 3, (middle, exit1, exit1)]  # the blocks with a stride of 2
        on_axes = functools.partial(plane_stride, spatial_dims=spatial_dims, in_plane=in_plane)
        strides = [min(2**n, output_stride) for n in range(1, 6)]
        super().__init__([entry1, entry2, middle, exit1, last], [on_axes(stride) for stride in strides], spatial_dims)

        layers = Layers(spatial_dims, norm=norm, activation=activation)
        self.stem = nn.Sequential(_conv(layers, in_channels, stem, 3, on_axes(2)), _conv(layers, stem, width, 3, 1))
        blocks: list[nn.Module] = []
        channels = width
        for n, widths in enumerate(halving):
            if n == 3:
                dilation = on_axes(16 // strides[3])
                blocks += [
                    XceptionBlock(layers, middle, (middle,) * 3, dilation=dilation)
                    for _ in range(MIDDLE_BLOCKS[num_layers])
                ]
            # The stride is the block's last convolution's: those before it see the grid of the block before.
            stride, dilation = on_axes(strides[n + 1] // strides[n]), on_axes(2 ** (n + 1) // strides[n])
            blocks.append(XceptionBlock(layers, channels, widths, stride=stride, dilation=dilation))
            channels = widths[-1]
        dilation = on_axes(32 // strides[4])
        blocks.append(XceptionBlock(layers, channels, (exit2, exit2, last), dilation=dilation, residual=False))
        self.blocks = nn.Sequential(*blocks)
        self.halving = (0, 1, 2, len(blocks) - 2)

        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                module.eps = BATCH_NORM_EPS
        initialize(self)
        if norm == "none":
            shrink_blocks(self.blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        features = []
        for n, block in enumerate(self.blocks):
            x, inner = block(x)
            if n in self.halving:
                features.append(inner)  # (B, channels[n], I / strides[n][0], …)
        return [*features, x]


def shrink_blocks(blocks: Sequence[nn.Module] | nn.Sequential) -> None:
    """Without norms each block would add as much as the sum holds, and more; so all together do."""
    for block in blocks:
        if isinstance(block, XceptionBlock) and block.shortcut is not None:
            with torch.no_grad():
                for tensor in block.stack[-1].get_submodule("conv_pw").parameters():
                    tensor.mul_(2**-1.5 / math.sqrt(len(blocks)))  # 2^-1.5: three halves have no activation


def _conv(
    layers: Layers, in_channels: int, out_channels: int, kernel_size: int, stride: PerAxis, *, activate: bool = True
) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    bias = layers.norm == "none"
    parts["conv"] = layers.conv(in_channels, out_channels, kernel_size=kernel_size, stride=stride, bias=bias)
    parts["bn"] = layers.make_norm(out_channels)
    if activate:
        parts["act"] = layers.make_activation(out_channels)
    return nn.Sequential(parts)
