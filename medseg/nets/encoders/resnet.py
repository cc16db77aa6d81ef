"""ResNets in 2D and 3D, with the output stride of one's choice."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from medseg.nets.blocks import Layers, PerAxis, initialize, per_axis, shrink_residuals
from medseg.nets.encoders.encoder import Encoder, plane_stride


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and the sum with the input: the block of ResNet-18 and 34.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input.
        width: Channels of the 3 × 3 convolutions; the output has `expansion` times as many.
        stride: Of the first 3 × 3 convolution and of the shortcut.
        dilation: Of that 3 × 3 convolution.
        inner_dilation: Of 3 × 3 convolutions that follow it.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        width: int,
        *,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        inner_dilation: PerAxis = 1,
    ) -> None:
        super().__init__()
        bias = layers.norm == "none"
        self.conv1 = layers.conv(in_channels, width, kernel_size=3, stride=stride, dilation=dilation, bias=bias)
        self.bn1 = layers.make_norm(width)
        self.relu1 = layers.make_activation(width)
        self.conv2 = layers.conv(width, width, kernel_size=3, dilation=inner_dilation, bias=bias)
        self.bn2 = layers.make_norm(width)
        self.downsample = shortcut(layers, in_channels, width, stride=stride)
        self.relu2 = layers.make_activation(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.downsample(x))

    @property
    def last_conv(self) -> nn.Module:
        """Whose result is added."""
        return self.conv2


class Bottleneck(nn.Module):
    """1 × 1 to few channels, 3 × 3, 1 × 1 to many, and the sum with the input: the block from ResNet-50 on.

    The stride is the 3 × 3 convolution's, as in torchvision; in the paper it is the first 1 × 1 convolution's.

    Args: as `BasicBlock`; nothing follows the 3 × 3 convolution that could be dilated.
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        width: int,
        *,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        inner_dilation: PerAxis = 1,
    ) -> None:
        super().__init__()
        bias = layers.norm == "none"
        wide = width * self.expansion
        self.conv1 = layers.conv(in_channels, width, kernel_size=1, bias=bias)
        self.bn1 = layers.make_norm(width)
        self.relu1 = layers.make_activation(width)
        self.conv2 = layers.conv(width, width, kernel_size=3, stride=stride, dilation=dilation, bias=bias)
        self.bn2 = layers.make_norm(width)
        self.relu2 = layers.make_activation(width)
        self.conv3 = layers.conv(width, wide, kernel_size=1, bias=bias)
        self.bn3 = layers.make_norm(wide)
        self.downsample = shortcut(layers, in_channels, wide, stride=stride)
        self.relu3 = layers.make_activation(wide)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        return self.relu3(self.bn3(self.conv3(y)) + self.downsample(x))

    @property
    def last_conv(self) -> nn.Module:
        """Whose result is added."""
        return self.conv3


def shortcut(layers: Layers, in_channels: int, out_channels: int, *, stride: PerAxis) -> nn.Module:
    """The input itself, or brought to the block's channels and resolution; named as in torchvision."""
    if in_channels == out_channels and set(per_axis(stride, layers.spatial_dims)) == {1}:
        return nn.Identity()
    conv = layers.conv(in_channels, out_channels, kernel_size=1, stride=stride, bias=layers.norm == "none")
    return nn.Sequential(conv, layers.make_norm(out_channels))


RESNETS: Mapping[int, tuple[type[BasicBlock] | type[Bottleneck], Sequence[int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
"""By their number of layers: the block that all is made of, and how many the stages have, finest first."""


class ResNet(Encoder):
    """ResNet: stages of blocks that each learn a residual, so that a hundred layers still train.

    Features of the stem (stride 2) and of the four stages (strides 4, 8, 16 and 32). With a smaller
    `output_stride` the last stages are not strided but dilated: they compute the same, more densely. Modules
    are named as in torchvision's checkpoints, without the classifier: 11,176,512 parameters for 18 layers,
    21,284,672 for 34, 23,508,032 for 50 and 42,500,160 for 101 (2D, three channels).

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        num_layers: 18, 34, 50 or 101.
        width: Channels of the stem; the stages have 1, 2, 4 and 8 times as many, from 50 layers on 4 times those.
        output_stride: 8, 16 or 32, of the last feature.
        in_plane: Whether strides, poolings and dilations leave the third axis alone.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.

    Reference:
        He et al. 2016, arXiv:1512.03385.
    """

    unused = ("fc.",)

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        num_layers: int = 50,
        width: int = 64,
        output_stride: int = 32,
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
    ) -> None:
        if num_layers not in RESNETS:
            raise ValueError(f"num_layers is {num_layers}; it must be one of {', '.join(map(str, RESNETS))}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {output_stride}; it must be 8, 16 or 32")
        block, blocks_per_stage = RESNETS[num_layers]
        widths = [width * 2**n for n in range(4)]
        strides = [min(2**n, output_stride) for n in range(1, 6)]
        on_axes = functools.partial(plane_stride, spatial_dims=spatial_dims, in_plane=in_plane)
        channels = [width, *[block.expansion * w for w in widths]]
        super().__init__(channels, [on_axes(stride) for stride in strides], spatial_dims)

        layers = Layers(spatial_dims, norm=norm, activation=activation)
        self.conv1 = layers.conv(in_channels, width, kernel_size=7, stride=on_axes(2), bias=norm == "none")
        self.bn1 = layers.make_norm(width)
        self.relu = layers.make_activation(width)
        max_pool = nn.MaxPool2d if spatial_dims == 2 else nn.MaxPool3d
        self.maxpool = max_pool(on_axes(3), stride=on_axes(2), padding=tuple(n // 2 for n in on_axes(3)))
        dilation = 1
        for n, num_blocks in enumerate(blocks_per_stage):
            # What would have been strided still sees the grid of the stage before: its dilation.
            entry, dilation = dilation, 2 ** (n + 2) // strides[n + 1]
            stride = strides[n + 1] // strides[n] if n else 1  # the first stage's is the pooling's
            self.add_module(
                f"layer{n + 1}",
                nn.Sequential(
                    *[
                        block(
                            layers,
                            channels[n + 1] if i else channels[n],
                            widths[n],
                            stride=1 if i else on_axes(stride),
                            dilation=on_axes(dilation if i else entry),
                            inner_dilation=on_axes(dilation),
                        )
                        for i in range(num_blocks)
                    ]
                ),
            )
        initialize(self)
        if norm == "none":
            shrink_residuals([m.last_conv for m in self.modules() if isinstance(m, BasicBlock | Bottleneck)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.relu(self.bn1(self.conv1(x)))
        features = [x]  # (B, width, I/2, J/2[, K/2])
        x = self.maxpool(x)
        for n in range(1, 5):
            x = self.get_submodule(f"layer{n}")(x)  # (B, channels[n], I / strides[n][0], …)
            features.append(x)
        return features
