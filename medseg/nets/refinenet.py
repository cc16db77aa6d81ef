"""RefineNet, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, initialize, per_level, resize, shrink_residuals
from medseg.nets.dilated import DilatedNetwork
from medseg.nets.encoders.encoder import plane_stride
from medseg.nets.encoders.vgg import dense_pool

POOL = 5
"""Kernel of chained residual pooling."""


class RefineNet(DilatedNetwork):
    """RefineNet: from coarse to fine, four blocks each refine what the one below found by the encoder's features.

    All along identity paths, residual convolution units, sums and chained residual pooling, so that the gradient
    reaches the encoder directly. The logits are at 1/4. Takes any size from `min_size` (32 by default) up; multiples of
    it need no padding. By default 106,775,490 parameters in 3D and 90,764,482 in 2D (one channel in, two out).

    Departs from the paper by default: a ResNet of 50 layers, and in 3D half the channels. With ``encoder="resnet101",
    num_pools=4, norm="batch"``, as in its authors' code, it has 118,066,773 parameters for 21 classes. The last
    convolution of each residual part starts small, as no norm holds the sums in bounds.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        encoder: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``xception41``, ``xception65``, ``vgg16`` or
            ``mobilenet_v2``.
        width: Channels of the encoder's stem; all others are in proportion.
        channels: Of each block, finest first; None: (256, 256, 256, 512) in 2D, half in 3D.
        num_pools: Poolings of each chain; 2 in the paper's figure, 4 in its authors' code.
        in_plane: Whether strides and poolings leave the third axis alone, for thick slices.
        norm: Of the encoder: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped before the classification.

    Reference:
        Lin et al. 2017, arXiv:1611.06612.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        encoder: str = "resnet50",
        width: int = 64,
        channels: Sequence[int] | None = None,
        num_pools: int = 2,
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.1,
    ) -> None:
        if channels is None:
            channels = (256, 256, 256, 512) if spatial_dims == 2 else (128, 128, 128, 256)
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        super().__init__(
            layers, in_channels, out_channels, encoder=encoder, width=width, output_stride=32, in_plane=in_plane
        )
        encoded = self.encoder.channels[1:]  # from 1/4 on
        widths = per_level("channels", channels, len(encoded))
        plain = replace(layers, norm="none")  # the blocks have no norms: what they add to must reach the end unchanged
        self.blocks = nn.ModuleList()  # like the channels finest first
        for n, own in enumerate(encoded):
            inputs = [own, *widths[n + 1 : n + 2]]
            self.blocks.append(
                RefineBlock(
                    plain,
                    inputs,
                    widths[n],
                    num_pools=num_pools,
                    num_output_units=1 if n else 3,
                    in_plane=in_plane,
                )
            )
        self.drop = replace(layers, dropout=dropout).make_dropout()
        self.head = layers.conv(widths[0], out_channels, kernel_size=3)
        initialize(self.blocks)
        initialize(self.head)
        _shrink_residuals(self.blocks)

    def classified(self, features: Sequence[Tensor]) -> Tensor:
        coarse: list[Tensor] = []
        for block, feature in zip(reversed(self.blocks), reversed(features[1:]), strict=True):
            coarse = [block([feature, *coarse])]  # (B, channels[n], I / 2^(n+2), …)
        return self.head(self.drop(coarse[0]))


class RefineBlock(nn.Module):
    """Features of several resolutions, joined at the finest and spread over neighborhoods.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of each input; the first is the encoder's and is brought to `out_channels` at once.
        out_channels: Of the output.
        num_pools: Poolings of the chain.
        num_output_units: Residual convolution units at the end.
        in_plane: Whether poolings leave the third axis alone.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: Sequence[int],
        out_channels: int,
        *,
        num_pools: int,
        num_output_units: int,
        in_plane: bool,
    ) -> None:
        super().__init__()
        encoded, *coarser = in_channels
        self.reduce = ConvBlock(layers, encoded, out_channels, activate=False)
        widths = [out_channels, *coarser]
        self.adapt = nn.ModuleList(
            nn.Sequential(ResidualConvUnit(layers, width), ResidualConvUnit(layers, width)) for width in widths
        )
        self.fuse = nn.ModuleList(  # a single input is fused with nothing
            ConvBlock(layers, width, out_channels, activate=False) if coarser else nn.Identity() for width in widths
        )
        self.pool = ChainedResidualPooling(layers, out_channels, num_pools=num_pools, in_plane=in_plane)
        self.refine = nn.Sequential(*[ResidualConvUnit(layers, out_channels) for _ in range(num_output_units)])

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Inputs of the channels given, finest first; the output (B, out_channels, …) has the first one's size."""
        encoded, *coarser = inputs
        fused = [
            fuse(adapt(x))
            for fuse, adapt, x in zip(self.fuse, self.adapt, [self.reduce(encoded), *coarser], strict=True)
        ]
        total = fused[0]
        for x in fused[1:]:
            total = total + resize(x, total.shape[2:])
        return self.refine(self.pool(total))


class ResidualConvUnit(nn.Module):
    """Two 3 × 3 convolutions, each behind an activation, and the sum with the input.

    Args:
        layers: What the network's layers agree on.
        channels: Of input and output.
    """

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        self.activation = layers.make_activation(channels)
        self.first = ConvBlock(layers, channels, channels)
        self.last = ConvBlock(layers, channels, channels, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.first(self.activation(x.clone())))  # activations work in place


class ChainedResidualPooling(nn.Module):
    """The features, summed with their maxima over wider and wider neighborhoods, each computed from the one before.

    Args:
        layers: What the network's layers agree on.
        channels: Of input and output.
        num_pools: Poolings, of 5 × 5 voxels without a stride, each with a convolution.
        in_plane: Whether they leave the third axis alone.
    """

    def __init__(self, layers: Layers, channels: int, *, num_pools: int, in_plane: bool) -> None:
        super().__init__()
        self.activation = layers.make_activation(channels)
        self.pool = dense_pool(plane_stride(POOL, layers.spatial_dims, in_plane=in_plane))
        self.convs = nn.ModuleList(ConvBlock(layers, channels, channels, activate=False) for _ in range(num_pools))

    def forward(self, x: Tensor) -> Tensor:
        x = path = self.activation(x)
        for conv in self.convs:
            path = conv(self.pool(path))
            x = x + path
        return x


def _shrink_residuals(blocks: nn.Module) -> None:
    residuals: list[nn.Module] = []
    for module in blocks.modules():
        if isinstance(module, ResidualConvUnit):
            residuals.append(module.last)
        elif isinstance(module, ChainedResidualPooling):
            residuals.extend(module.convs)
    shrink_residuals(residuals)
