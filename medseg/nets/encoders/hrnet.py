"""HRNet, in 2D and 3D."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, initialize, resize, shrink_residuals
from medseg.nets.encoders.encoder import Encoder, plane_stride
from medseg.nets.encoders.resnet import BasicBlock, Bottleneck

STEM_BLOCKS = 4
DOWN = 2
"""By how much each stream is coarser than the one before."""


class HRNetEncoder(Encoder):
    """HRNet: streams of several resolutions side by side, which exchange what they found again and again.

    The finest stream, 1/4 of the image by default, is kept from the first layer to the last; each stage adds
    one of half the resolution and twice the channels. In a module each stream goes through residual blocks of
    its own, then each gets the sum of all, strided or interpolated to its resolution. Features of all streams;
    modules are named as in the published ``hrnetv2_w18_imagenet_pretrained`` and its wider sisters.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        width: Channels of the finest stream.
        stem_channels: Of the stem; its blocks give four times as many.
        stem_strides: Of the stem's two convolutions.
        modules_per_stage: Exchanges of each stage behind the stem; there is one more stream than stages.
        blocks_per_module: Residual blocks of each stream between two exchanges.
        in_plane: Whether the third axis keeps its resolution.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.

    Reference:
        Wang et al. 2020, arXiv:1908.07919.
    """

    unused = ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier.")

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        width: int = 18,
        stem_channels: int = 64,
        stem_strides: Sequence[int] = (2, 2),
        modules_per_stage: Sequence[int] = (1, 4, 3),
        blocks_per_module: int = 4,
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
    ) -> None:
        if len(stem_strides) != 2:
            raise ValueError(f"stem_strides {tuple(stem_strides)}; the stem has two convolutions")
        if not modules_per_stage or min(modules_per_stage) < 1 or blocks_per_module < 1:
            raise ValueError(
                f"modules_per_stage {tuple(modules_per_stage)}, blocks_per_module {blocks_per_module}; "
                "each stage has at least 1 module, and each module at least 1 block"
            )
        on_axes = functools.partial(plane_stride, spatial_dims=spatial_dims, in_plane=in_plane)
        widths = [width * DOWN**n for n in range(len(modules_per_stage) + 1)]
        finest = math.prod(stem_strides)
        super().__init__(widths, [on_axes(finest * DOWN**n) for n in range(len(widths))], spatial_dims)
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        down = on_axes(DOWN)

        first, second = (on_axes(stride) for stride in stem_strides)
        bias = norm == "none"
        self.conv1 = layers.conv(in_channels, stem_channels, kernel_size=3, stride=first, bias=bias)
        self.bn1 = layers.make_norm(stem_channels)
        self.relu1 = layers.make_activation(stem_channels)
        self.conv2 = layers.conv(stem_channels, stem_channels, kernel_size=3, stride=second, bias=bias)
        self.bn2 = layers.make_norm(stem_channels)
        self.relu2 = layers.make_activation(stem_channels)
        wide = Bottleneck.expansion * stem_channels
        self.layer1 = nn.Sequential(
            *[Bottleneck(layers, wide if n else stem_channels, stem_channels) for n in range(STEM_BLOCKS)]
        )
        before = [wide]
        for n, num_modules in enumerate(modules_per_stage, start=2):
            streams = widths[:n]
            self.add_module(f"transition{n - 1}", _transition(layers, before, streams, stride=down))
            exchanges = [ExchangeModule(layers, streams, blocks_per_module, stride=down) for _ in range(num_modules)]
            self.add_module(f"stage{n}", nn.Sequential(*exchanges))
            before = streams
        self.num_stages = len(widths)
        initialize(self)
        if norm == "none":
            self._shrink_sums()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        streams = [self.layer1(x)]
        for n in range(2, self.num_stages + 1):
            *kept, added = self.get_submodule(f"transition{n - 1}").children()
            source = streams[-1]
            streams = [path(stream) for path, stream in zip(kept, streams, strict=True)]
            streams = self.get_submodule(f"stage{n}")([*streams, added(source)])
        return streams  # (B, width × 2^n, I / 4 / 2^n, …)

    def _shrink_sums(self) -> None:
        shrink_residuals([m.last_conv for m in self.modules() if isinstance(m, BasicBlock | Bottleneck)])
        exchanges = [m for m in self.modules() if isinstance(m, ExchangeModule)]
        shrink_residuals([conv for exchange in exchanges for conv in exchange.last_convs()])


class ExchangeModule(nn.Module):
    """Streams that each go their own way, and then each get the sum of what all have found.

    Args:
        layers: What the network's layers agree on.
        widths: Channels of each stream, finest first.
        num_blocks: Residual blocks of each.
        stride: By how much each is coarser than the one before.
    """

    def __init__(self, layers: Layers, widths: Sequence[int], num_blocks: int, *, stride: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*[BasicBlock(layers, width, width) for _ in range(num_blocks)]) for width in widths
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_path(layers, widths, source, target, stride=stride) for source in range(len(widths)))
            for target in range(len(widths))
        )
        self.activations = nn.ModuleList(layers.make_activation(width) for width in widths)

    def forward(self, streams: Sequence[Tensor]) -> list[Tensor]:
        found = [branch(x) for branch, x in zip(self.branches, streams, strict=True)]
        return [
            activation(sum(resize(path(x), own.shape[2:]) for path, x in zip(paths.children(), found, strict=True)))
            for activation, paths, own in zip(self.activations, self.fuse_layers, found, strict=True)
        ]

    def last_convs(self) -> list[nn.Module]:
        """Of each path from one stream to another."""
        paths = [list(path.modules()) for paths in self.fuse_layers for path in paths.children()]
        convs = [[m for m in path if isinstance(m, nn.Conv2d | nn.Conv3d)] for path in paths]
        return [path[-1] for path in convs if path]


def _path(layers: Layers, widths: Sequence[int], source: int, target: int, *, stride: Sequence[int]) -> nn.Module:
    """From one stream to another: strided convolutions to a coarser one, 1 × 1, then interpolated, to a finer one."""
    if source == target:
        return nn.Identity()
    if source > target:
        return _plain(layers, widths[source], widths[target], kernel_size=1, activate=False)
    last = target - source - 1
    return nn.Sequential(
        *[
            _plain(
                layers,
                widths[source],
                widths[target] if n == last else widths[source],
                stride=stride,
                activate=n != last,
            )
            for n in range(target - source)
        ]
    )


def _transition(layers: Layers, before: Sequence[int], after: Sequence[int], *, stride: Sequence[int]) -> nn.ModuleList:
    """The streams so far, brought to their channels where they have others, and a coarser one from the last of them."""
    kept = [
        nn.Identity() if narrow == wide else _plain(layers, narrow, wide)
        for narrow, wide in zip(before, after, strict=False)
    ]
    return nn.ModuleList([*kept, nn.Sequential(_plain(layers, before[-1], after[-1], stride=stride))])


def _plain(layers: Layers, in_channels: int, out_channels: int, **args: Any) -> nn.Sequential:
    """Convolution, norm, activation under the numbers that the published checkpoints give them."""
    return nn.Sequential(*ConvBlock(layers, in_channels, out_channels, **args))
