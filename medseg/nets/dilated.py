"""What PSPNet and the DeepLabs share: encoders that dilate instead of striding, and the auxiliary head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from medseg.nets.blocks import ConvBlock, Layers
from medseg.nets.encoders.encoder import Encoder
from medseg.nets.encoders.resnet import ResNet
from medseg.nets.encoders.xception import Xception
from medseg.nets.network import AxisSizes
from medseg.registry import Registry

DILATED_ENCODERS: Registry[Callable[..., Encoder]] = Registry(
    "encoder",
    {
        "resnet18": partial(ResNet, num_layers=18),
        "resnet34": partial(ResNet, num_layers=34),
        "resnet50": partial(ResNet, num_layers=50),
        "resnet101": partial(ResNet, num_layers=101),
        "xception41": partial(Xception, num_layers=41),
        "xception65": partial(Xception, num_layers=65),
    },
)
"""Makes an encoder of (spatial_dims, in_channels, width, output_stride, in_plane, norm, activation)."""

AUXILIARY_WEIGHT = 0.4
AUXILIARY_DROPOUT = 0.1


def input_sizes(encoder: Encoder) -> list[AxisSizes]:
    """For each axis the sizes that the encoder's strides divide."""
    return [AxisSizes(stride, minimum=stride) for stride in encoder.strides[-1]]


def scaled_rates(
    rates: Sequence[int] | None, spatial_dims: int, *, output_stride: int, in_plane: bool = False
) -> list[int]:
    """The dilations that span as many voxels of the image at this output stride as `rates` do at 16.

    The paper's span 96 to 288 voxels to either side: in a small 3D patch they would see padding alone.
    """
    if rates is None:
        rates = (6, 12, 18) if spatial_dims == 2 or in_plane else (1, 2, 3)
    return [max(1, rate * 16 // output_stride) for rate in rates]


def auxiliary_head(layers: Layers, encoder: Encoder, out_channels: int) -> nn.Module:
    """Logits from the last feature but one, for training alone."""
    channels = encoder.channels[-2]
    block = ConvBlock(replace(layers, dropout=AUXILIARY_DROPOUT), channels, max(1, channels // 4))
    return nn.Sequential(block, layers.head(max(1, channels // 4), out_channels))
