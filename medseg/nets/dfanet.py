"""DFANet, in 2D and 3D."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, PerAxis, initialize, resize
from medseg.nets.encoders.encoder import plane_stride
from medseg.nets.encoders.xception import XceptionBlock, shrink_blocks
from medseg.nets.network import AxisSizes, SegmentationNetwork


class DFANet(SegmentationNetwork):
    """DFANet: a slim Xception runs three times, each time on what the last run found, enlarged and beside its stages.

    That is aggregation of sub-networks (a run ends in channel attention, is upsampled 4 × and is the next run's
    input) and of sub-stages (each stage also sees the last run's stage of the same resolution). The decoder sums
    every run's first stage and its end.

    Takes any size from `min_size` (64 by default in 2D, 32 in 3D) up; multiples of it need no padding. By default
    1,959,538 parameters in 3D and 1,826,194 in 2D (one channel in, two out).

    By default that is the paper's DFANet A with XceptionA, for which the paper tells 7.8 million parameters: more
    than its table of layers gives. Departs from it: the stem is not strided in 3D by default; attention has an
    activation between its layers and ends in a sigmoid, as the wide layer brings no training from ImageNet here.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        stem_channels: Of the first convolution.
        stem_stride: 1 or 2, of the first convolution: the logits are twice as coarse. None: 2 in 2D, 1 in 3D.
        channels: Of each stage of a run; (32, 64, 128) make XceptionB.
        blocks: Of each stage.
        num_runs: How often the encoder runs, each time with weights of its own.
        attention_channels: Of the layer between the average over the image and the channels' weights.
        decoder_channels: Of the decoder.
        in_plane: Whether strides and poolings leave the third axis alone, for thick slices.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel of the decoder is dropped.

    Reference:
        Li et al. 2019, arXiv:1904.02216.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        stem_channels: int = 8,
        stem_stride: int | None = None,
        channels: Sequence[int] = (48, 96, 192),
        blocks: Sequence[int] = (4, 6, 4),
        num_runs: int = 3,
        attention_channels: int = 1000,
        decoder_channels: int = 32,
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        if len(channels) != len(blocks) or not channels or min(blocks) < 1:
            raise ValueError(f"channels {tuple(channels)} and blocks {tuple(blocks)}; give each stage one, at least 1")
        if num_runs < 1:
            raise ValueError(f"num_runs is {num_runs}; it must be at least 1")
        first = (2 if spatial_dims == 2 else 1) if stem_stride is None else stem_stride
        if first not in (1, 2):
            raise ValueError(f"stem_stride is {first}; it must be 1 or 2")
        on_axes = functools.partial(plane_stride, spatial_dims=spatial_dims, in_plane=in_plane)
        super().__init__(AxisSizes.of_strides([on_axes(first * 2 ** (len(channels) + num_runs - 1))]))
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        self.stem = ConvBlock(layers, in_channels, stem_channels, stride=on_axes(first))
        self.runs = nn.ModuleList()
        for n in range(num_runs):
            narrower = [channels[-1] if n else stem_channels, *channels[:-1]]
            beside = channels if n else [0] * len(channels)
            self.runs.append(
                nn.ModuleList(
                    _stage(layers, narrow + other, wide, num_blocks=number, stride=on_axes(2))
                    for narrow, other, wide, number in zip(narrower, beside, channels, blocks, strict=True)
                )
            )
        self.attention = nn.ModuleList(
            FCAttention(layers, channels[-1], attention_channels, in_plane=in_plane) for _ in range(num_runs)
        )
        self.of_fine = nn.ModuleList(
            ConvBlock(layers, channels[0], decoder_channels, kernel_size=1) for _ in range(num_runs)
        )
        self.of_coarse = nn.ModuleList(
            ConvBlock(layers, channels[-1], decoder_channels, kernel_size=1) for _ in range(num_runs)
        )
        self.merge = ConvBlock(replace(layers, dropout=dropout), decoder_channels, decoder_channels, kernel_size=1)
        self.head = layers.head(decoder_channels, out_channels)
        initialize(self)
        if norm == "none":
            shrink_blocks([module for module in self.runs.modules() if isinstance(module, XceptionBlock)])

    def outputs(self, x: Tensor) -> list[Tensor]:
        fine, coarse = self.encode(x)
        grid = fine[0].shape[2:]  # I/4, with a strided stem
        detail = [resize(reduce(stage), grid) for reduce, stage in zip(self.of_fine, fine, strict=True)]
        context = [resize(reduce(end), grid) for reduce, end in zip(self.of_coarse, coarse, strict=True)]
        merged = torch.stack([self.merge(torch.stack(detail).sum(0)), *context]).sum(0)
        return [resize(self.head(merged), x.shape[2:])]

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """For each run its first stage, and its end after attention."""
        fine, coarse = [], []
        previous: list[Tensor] = []  # the stages of the last run
        x = self.stem(x)
        for run, attend in zip(self.runs, self.attention, strict=True):
            stages = []
            if previous:
                x = resize(x, previous[0].shape[2:])
            for n, stage in enumerate(run.children()):
                x = stage(torch.cat([x, previous[n]], dim=1) if previous else x)
                stages.append(x)
            x = attend(x)
            fine.append(stages[0])
            coarse.append(x)
            previous = stages
        return fine, coarse


class FCAttention(nn.Module):
    """Weighs each channel by the average over the image, through a wide layer.

    The paper takes that layer, 1000 units wide, from a classifier's training on ImageNet.

    Args:
        layers: What the network's layers agree on.
        channels: Of input and output.
        hidden_channels: Of the wide layer.
        in_plane: Whether each slice has an average of its own.
    """

    def __init__(self, layers: Layers, channels: int, hidden_channels: int, *, in_plane: bool = False) -> None:
        super().__init__()
        self.axes = (2, 3) if in_plane else tuple(range(2, 2 + layers.spatial_dims))
        self.weigh = nn.Sequential(
            layers.conv(channels, hidden_channels, kernel_size=1, bias=False),
            layers.make_activation(hidden_channels),
            layers.conv(hidden_channels, channels, kernel_size=1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x.mean(dim=self.axes, keepdim=True))  # the weights are (B, C, 1, 1[, 1])


class _Stage(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x, _ = block(x)
        return x


def _stage(layers: Layers, in_channels: int, channels: int, *, num_blocks: int, stride: PerAxis) -> nn.Module:
    """Blocks of three separable convolutions, the first two a quarter as wide; the first block is strided."""
    narrow = max(1, channels // 4)
    return _Stage(
        *[
            XceptionBlock(layers, channels if n else in_channels, (narrow, narrow, channels), stride=1 if n else stride)
            for n in range(num_blocks)
        ]
    )
