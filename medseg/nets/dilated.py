"""What PSPNet, the DeepLabs and RefineNet share: an encoder that can dilate instead of striding, the auxiliary head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, initialize, resize
from medseg.nets.encoders.encoder import Encoder
from medseg.nets.encoders.mobilenet import MobileNetV2
from medseg.nets.encoders.resnet import ResNet
from medseg.nets.encoders.vgg import VGG
from medseg.nets.encoders.xception import Xception
from medseg.nets.network import AxisSizes, SegmentationNetwork
from medseg.registry import Registry


def _vgg16(spatial_dims: int, in_channels: int, *, width: int, **args: Any) -> VGG:
    """VGG-16 with features at strides 2, 4, 8, 16, 32, as the other encoders have them."""
    return VGG(spatial_dims, in_channels, channels=[width * n for n in (1, 2, 4, 8, 8)], pooled=True, **args)


DILATED_ENCODERS: Registry[Callable[..., Encoder]] = Registry(
    "encoder",
    {
        "vgg16": _vgg16,
        "resnet18": partial(ResNet, num_layers=18),
        "resnet34": partial(ResNet, num_layers=34),
        "resnet50": partial(ResNet, num_layers=50),
        "resnet101": partial(ResNet, num_layers=101),
        "xception41": partial(Xception, num_layers=41),
        "xception65": partial(Xception, num_layers=65),
        "mobilenet_v2": MobileNetV2,
    },
)
"""Makes an encoder of (spatial_dims, in_channels, width, output_stride, in_plane, norm, activation)."""

AUXILIARY_WEIGHT = 0.4
AUXILIARY_DROPOUT = 0.1


class DilatedNetwork(SegmentationNetwork):
    """Classifies an encoder's features at its output stride, and brings the logits to the input's size.

    A subclass says by `classified` how; it makes its own parts after calling this, and initializes them.

    Args:
        layers: What the layers agree on, in the encoder too.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        encoder: Name in DILATED_ENCODERS.
        width: Channels of the encoder's stem.
        output_stride: 8, 16 or 32, of the encoder's last features.
        in_plane: Whether strides, poolings and dilations leave the third axis alone.
        deep_supervision: Whether training also scores the last features but one, by a head of its own.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        out_channels: int,
        *,
        encoder: str,
        width: int,
        output_stride: int,
        in_plane: bool,
        deep_supervision: bool = False,
    ) -> None:
        made = DILATED_ENCODERS[encoder](
            layers.spatial_dims, in_channels, width=width, output_stride=output_stride, in_plane=in_plane,
            norm=layers.norm, activation=layers.activation,
        )  # fmt: skip
        super().__init__(
            AxisSizes.of_strides([made.strides[-1]]),
            extra_weights=[AUXILIARY_WEIGHT] if deep_supervision else [],
        )
        self.encoder = made
        self.extra_heads = nn.ModuleList()
        if deep_supervision:
            self.extra_heads.append(_auxiliary_head(layers, made.channels[-2], out_channels))

    @abstractmethod
    def classified(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, R, …) from the encoder's features, finest first, at any resolution."""

    def outputs(self, x: Tensor) -> list[Tensor]:
        features = self.encoder(x)
        extra = [head(features[-2]) for head in self.extra_heads] if self.training else []
        return [resize(self.classified(features), x.shape[2:]), *extra]


def _auxiliary_head(layers: Layers, channels: int, out_channels: int) -> nn.Module:
    narrow = max(1, channels // 4)
    block = ConvBlock(replace(layers, dropout=AUXILIARY_DROPOUT), channels, narrow)
    head = nn.Sequential(block, layers.head(narrow, out_channels))
    initialize(head)
    return head


def scaled_rates(
    rates: Sequence[int] | None,
    spatial_dims: int,
    *,
    output_stride: int,
    in_plane: bool = False,
    of_slices: Sequence[int] = (6, 12, 18),
    of_stride: int = 16,
) -> list[int]:
    """The dilations that span as many voxels of the image at this output stride as `rates` do at another.

    The papers' span 96 to 288 voxels to either side: in a small 3D patch they would see padding alone.

    Args:
        rates: None: the paper's in 2D and in plane, a sixth of them in 3D.
        spatial_dims: 2 or 3.
        output_stride: At which they will be used.
        in_plane: Whether the third axis is left alone.
        of_slices: The paper's.
        of_stride: The output stride for which `rates` and the paper's are given.
    """
    if rates is None:
        rates = of_slices if spatial_dims == 2 or in_plane else [rate // 6 for rate in of_slices]
    return [max(1, rate * of_stride // output_stride) for rate in rates]
