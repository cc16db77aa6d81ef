"""UNet++, in 2D and 3D, with its pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvStage, Layers, PerAxis, TransposedConv, initialize, per_axis, per_level
from medseg.nets.network import AxisSizes, SegmentationNetwork


class UNetPlusPlus(SegmentationNetwork):
    """UNet++: U-Nets of all depths nested into one, which share an encoder and each see what the others found.

    Between encoder and decoder each skip passes through nodes that merge it with the level below; node
    X(i, j), the j-th of level i, is given all that stand before it on its level. X(0, k) is the output of a
    U-Net with k levels of pooling: with deep supervision each of them learns to segment, and evaluation may
    stop at any (`pruned_at`), for speed, without training again.

    Takes any size from `min_size` (the product of the strides, 16 by default) up; multiples of it need no
    padding. By default 26,201,954 parameters in 3D and 9,045,282 in 2D (one channel in, two out).

    Departs from the paper by default: a norm after each convolution, which then has no bias (``norm="none"``
    is the paper's, with 9,041,601 parameters in 2D for one channel in and one out). Evaluation answers with one
    output alone, as the paper's fast mode; there is no mean of all outputs.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        channels: Of each level, finest first.
        strides: Between one level and the next; one number, or an entry a step, which may differ by axis.
        kernel_sizes: One number, or an entry a level, which may differ by axis.
        convs_per_stage: Of each node; one number, or an entry a level.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``prelu``, ``elu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped after an activation.
        bias: Of the convolutions; None: where no norm follows.
        upsample: ``transposed`` or ``interpolate`` (which keeps the channels of the level below).
        deep_supervision: Whether training scores X(0, k) for all k, all with the same weight and at full size.
        pruned_at: Evaluation stops at X(0, k) for this k, from 1 to the number of strides; None: the last.
            Implies `deep_supervision`, without which no head but the last is trained; weights that were
            trained with deep supervision load, whatever they were pruned at.

    Reference:
        Zhou et al. 2018, arXiv:1807.10165; Zhou et al. 2020, arXiv:1912.05074.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        strides: int | Sequence[PerAxis] = 2,
        kernel_sizes: int | Sequence[PerAxis] = 3,
        convs_per_stage: int | Sequence[int] = 2,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.0,
        bias: bool | None = None,
        upsample: Literal["transposed", "interpolate"] = "transposed",
        deep_supervision: bool = False,
        pruned_at: int | None = None,
    ) -> None:
        depth = len(channels) - 1
        if depth < 1:
            raise ValueError(f"channels {tuple(channels)}; a UNet++ has at least two levels")
        if pruned_at is not None and not 1 <= pruned_at <= depth:
            raise ValueError(f"pruned_at is {pruned_at}; it must be from 1 to {depth}")
        if upsample not in ("transposed", "interpolate"):
            raise ValueError(f"upsample is {upsample!r}; it must be one of transposed, interpolate")
        steps = [per_axis(s, spatial_dims) for s in per_level("strides", strides, depth)]
        kernels = per_level("kernel_sizes", kernel_sizes, depth + 1)
        convs = per_level("convs_per_stage", convs_per_stage, depth + 1)
        num_extra = depth - 1 if deep_supervision or pruned_at is not None else 0
        super().__init__(AxisSizes.of_strides(steps), extra_weights=[1.0] * num_extra)
        self.depth = depth
        self.pruned_at = pruned_at
        layers = Layers(spatial_dims, norm=norm, activation=activation, dropout=dropout, bias=bias)

        def node(i: int, in_channels: int) -> ConvStage:
            return ConvStage(layers, in_channels, channels[i], num_convs=convs[i], kernel_size=kernels[i])

        self.encoder = nn.ModuleList([node(0, in_channels)])  # X(i, 0)
        for i, step in enumerate(steps, start=1):
            self.encoder.append(nn.Sequential(layers.max_pool(step), node(i, channels[i - 1])))
        self.ups = nn.ModuleDict()  # "i_j" leads from X(i + 1, j - 1) to X(i, j)
        self.nodes = nn.ModuleDict()  # "i_j" is X(i, j)
        for j in range(1, depth + 1):
            for i in range(depth + 1 - j):
                width, below = channels[i], channels[i + 1]
                if upsample == "transposed":
                    self.ups[f"{i}_{j}"] = TransposedConv(layers, below, width, stride=steps[i])
                else:
                    self.ups[f"{i}_{j}"] = _interpolation(steps[i])
                self.nodes[f"{i}_{j}"] = node(i, j * width + (width if upsample == "transposed" else below))
        self.head = layers.head(channels[0], out_channels)  # of X(0, depth)
        self.extra_heads = nn.ModuleList(layers.head(channels[0], out_channels) for _ in range(num_extra))
        initialize(self)

    def outputs(self, x: Tensor) -> list[Tensor]:
        depth = self.depth if self.training else self.pruned_at or self.depth
        levels: list[list[Tensor]] = []
        for stage in self.encoder[: depth + 1]:
            x = stage(x)  # (B, channels[i], I / 2^i, …) with strides of 2
            levels.append([x])
        for j in range(1, depth + 1):
            for i in range(depth + 1 - j):
                up = self.ups[f"{i}_{j}"](levels[i + 1][j - 1])
                levels[i].append(self.nodes[f"{i}_{j}"](torch.cat([*levels[i], up], dim=1)))
        heads = [self.head, *self.extra_heads]  # of X(0, depth), X(0, depth - 1), …
        if not self.training:
            return [heads[self.depth - depth](levels[0][depth])]
        return [head(levels[0][depth - n]) for n, head in enumerate(heads)]


def _interpolation(stride: Sequence[int]) -> nn.Module:
    factors = tuple(float(s) for s in stride)
    return nn.Upsample(scale_factor=factors, mode="bilinear" if len(factors) == 2 else "trilinear")
