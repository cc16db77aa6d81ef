"""MobileNetV2 in 2D and 3D, with the output stride of one's choice."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, initialize
from medseg.nets.encoders.encoder import Encoder, plane_stride
from medseg.nets.separable import InvertedResidual, calm_inverted_residuals

STEM_CHANNELS = 32
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Of each stage: expansion, channels at a stem of 32, blocks, stride of the first of them."""
LAST_CHANNELS = 1280


class MobileNetV2(Encoder):
    """MobileNetV2: inverted residuals, whose convolutions in space are all depthwise; a tenth of a ResNet-50's size.

    Features at strides 2, 4, 8, 16 and 32, each the last one at its resolution. With a smaller `output_stride` the
    last strides become dilations: the network computes the same, more densely. Modules are named as in
    torchvision's ``mobilenet_v2``, without the classifier: 2,223,872 parameters (2D, three channels, batch norm).

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        width: Channels of the stem; all others are in proportion. Published weights have 32.
        output_stride: 8, 16 or 32, of the last feature.
        in_plane: Whether strides and dilations leave the third axis alone.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu6``, which published weights were trained with, ``relu``, ``leakyrelu``, ``elu``,
            ``prelu``, ``gelu`` or ``silu``.

    Reference:
        Sandler et al. 2018, arXiv:1801.04381.
    """

    unused = ("classifier.",)

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        width: int = STEM_CHANNELS,
        output_stride: int = 32,
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu6",
    ) -> None:
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {output_stride}; it must be 8, 16 or 32")
        on_axes = functools.partial(plane_stride, spatial_dims=spatial_dims, in_plane=in_plane)
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        blocks: list[nn.Module] = [nn.Sequential(*ConvBlock(layers, in_channels, width, stride=on_axes(2)))]
        channels, nominal, dilation = width, 2, 1  # nominal: the stride that there would be without dilation
        taken: list[tuple[int, int]] = []  # where a feature is, and its channels
        for expansion, wide, num_blocks, step in STAGES:
            stride = step if nominal < output_stride else 1
            if step > 1:
                taken.append((len(blocks) - 1, channels))
            for n in range(num_blocks):
                out_channels = _scaled(wide, width)
                blocks.append(
                    InvertedResidual(
                        layers,
                        channels,
                        out_channels,
                        stride=1 if n else on_axes(stride),
                        dilation=on_axes(dilation),
                        expansion=expansion,
                    )
                )
                channels = out_channels
                if not n:  # what would have been strided still sees the grid of the block before
                    nominal, dilation = nominal * step, dilation * (step // stride)
        last = _scaled(LAST_CHANNELS, width)
        blocks.append(nn.Sequential(*ConvBlock(layers, channels, last, kernel_size=1)))
        taken.append((len(blocks) - 1, last))
        super().__init__(
            [wide for _, wide in taken], [on_axes(min(2**n, output_stride)) for n in range(1, 6)], spatial_dims
        )
        self.features = nn.Sequential(*blocks)
        self._taken = tuple(n for n, _ in taken)
        initialize(self)
        if norm == "none":
            calm_inverted_residuals(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for n, block in enumerate(self.features):
            x = block(x)
            if n in self._taken:
                found.append(x)  # (B, channels[len(found)], I / 2, I / 4, …)
        return found


def _scaled(channels: int, width: int) -> int:
    return max(1, round(channels * width / STEM_CHANNELS))
