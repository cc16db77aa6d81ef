"""UNet 3+, in 2D and 3D, with its class-guided module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, ConvStage, Layers, PerAxis, initialize, per_axis, per_level, resize
from medseg.nets.network import AxisSizes, SegmentationNetwork


@dataclass(frozen=True)
class _Size:
    channels: tuple[int, ...]
    skip_channels: int


_SIZES = {2: _Size((64, 128, 256, 512, 1024), 64), 3: _Size((32, 64, 128, 256, 320), 16)}

CLASSIFIER_DROPOUT = 0.5


class UNet3Plus(SegmentationNetwork):
    """UNet 3+: each level of the decoder sees all scales at once, finer ones from the encoder, coarser ones decoded.

    Every scale gives a level the same few channels; finer ones are max-pooled to it, coarser ones interpolated.
    The class-guided module asks the deepest features which classes are in the image at all, and holds back
    the logits of those that are not: fewer organs invented where there are none.

    Takes any size from `min_size` (the product of the strides, 16 by default) up; multiples of it need no
    padding. By default 10,308,546 parameters in 3D and 26,966,978 in 2D (one channel in, two out).

    In 3D it is narrower by default than the paper's, whose 320 channels at full resolution no workstation holds.
    Departs from the paper: coarser scales are convolved before they are interpolated, not after, with the same
    weights at a fraction of the work; by default convolutions before a norm have no bias. The class-guided
    module multiplies the odds of each class by the probability that it is present, so that it learns with the
    rest, where the paper's answers yes or no for all organs together. As losses compare images, its
    classification loss is that of the scores on the deepest grid, whose largest says that a class is present.
    ``UNet3Plus(2, 3, 1, norm="batch", bias=True, deep_supervision=True)`` has the authors' 26,989,637 parameters.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        channels: Of each level of the encoder, finest first. None: 64 to 1024 in 2D, 32 to 320 in 3D.
        skip_channels: That each scale gives to each level of the decoder. None: 64 in 2D, 16 in 3D.
        strides: Between one level and the next; one number, or an entry a step, which may differ by axis.
        kernel_sizes: One number, or an entry a level, which may differ by axis.
        convs_per_stage: Of the encoder; one number, or an entry a level.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``prelu``, ``elu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped after an activation.
        bias: Of the convolutions; None: where no norm follows.
        deep_supervision: Whether training also scores every coarser level, all with the same weight.
        class_guided: Whether the class-guided module is there. Implies `deep_supervision`, and adds its scores
            to the outputs of training.

    Reference:
        Huang et al. 2020, arXiv:2004.08790.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] | None = None,
        skip_channels: int | None = None,
        strides: int | Sequence[PerAxis] = 2,
        kernel_sizes: int | Sequence[PerAxis] = 3,
        convs_per_stage: int | Sequence[int] = 2,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.0,
        bias: bool | None = None,
        deep_supervision: bool = False,
        class_guided: bool = False,
    ) -> None:
        layers = Layers(spatial_dims, norm=norm, activation=activation, dropout=dropout, bias=bias)
        widths = _SIZES[spatial_dims].channels if channels is None else tuple(channels)
        share = _SIZES[spatial_dims].skip_channels if skip_channels is None else skip_channels
        depth = len(widths) - 1
        if depth < 1:
            raise ValueError(f"channels {widths}; a UNet 3+ has at least two levels")
        steps = [per_axis(s, spatial_dims) for s in per_level("strides", strides, depth)]
        kernels = per_level("kernel_sizes", kernel_sizes, depth + 1)
        convs = per_level("convs_per_stage", convs_per_stage, depth + 1)
        num_heads = depth if deep_supervision or class_guided else 0
        super().__init__(AxisSizes.of_strides(steps), extra_weights=[1.0] * (num_heads + class_guided))

        self.encoder = nn.ModuleList()
        for n, width in enumerate(widths):
            narrow = widths[n - 1] if n else in_channels
            stage = ConvStage(layers, narrow, width, num_convs=convs[n], kernel_size=kernels[n])
            self.encoder.append(nn.Sequential(layers.max_pool(steps[n - 1]), stage) if n else stage)
        wide = (depth + 1) * share
        found = [*[wide] * depth, widths[-1]]  # by level, once it is decoded; the deepest is as it is
        self.levels = nn.ModuleList()  # of the decoder, finest first
        for n in range(depth):
            sources = [*widths[: n + 1], *found[n + 1 :]]
            self.levels.append(FullScaleStage(layers, sources, share, steps=steps, level=n, kernel_size=kernels[n]))
        self.head = layers.conv(wide, out_channels, kernel_size=3)
        self.extra_heads = nn.ModuleList(
            layers.conv(width, out_channels, kernel_size=3) for width in (found[1:] if num_heads else ())
        )
        self.classifier = (
            nn.Sequential(nn.Dropout(CLASSIFIER_DROPOUT), layers.head(widths[-1], out_channels))
            if class_guided
            else None
        )
        initialize(self)

    def outputs(self, x: Tensor) -> list[Tensor]:
        scales = []
        for stage in self.encoder:
            x = stage(x)  # (B, channels[n], I / 2^n, …) with strides of 2
            scales.append(x)
        scores = None if self.classifier is None else self.classifier(x)  # (B, R, I/16, …)
        for n in reversed(range(len(self.levels))):
            scales[n] = self.levels[n](scales)  # from here on the coarser levels find it decoded
        heads = [self.head, *self.extra_heads] if self.training else [self.head]
        logits = [head(scale) for head, scale in zip(heads, scales, strict=False)]
        if scores is None:
            return logits
        held_back = F.logsigmoid(scores.flatten(2).amax(dim=2))  # log of the probability that a class is present
        guided = [x + held_back.view(*held_back.shape, *[1] * (x.dim() - 2)) for x in logits]
        return [*guided, scores] if self.training else guided


class FullScaleStage(nn.Module):
    """One level of the decoder: every scale brought to its resolution and to the same few channels, then merged.

    Args:
        layers: What the network's layers agree on.
        sources: Channels of each scale, finest first.
        channels: That each gets.
        steps: Strides between one scale and the next.
        level: Which of the scales it decodes.
        kernel_size: Of its convolutions.
    """

    def __init__(
        self,
        layers: Layers,
        sources: Sequence[int],
        channels: int,
        *,
        steps: Sequence[Sequence[int]],
        level: int,
        kernel_size: PerAxis,
    ) -> None:
        super().__init__()
        self.scales = nn.ModuleList()
        for n, width in enumerate(sources):
            block = ConvBlock(layers, width, channels, kernel_size=kernel_size)
            stride = [math.prod(axis) for axis in zip(*steps[n:level], strict=True)]
            self.scales.append(nn.Sequential(layers.max_pool(stride), block) if n < level else block)
        wide = len(sources) * channels
        self.merge = ConvBlock(layers, wide, wide, kernel_size=kernel_size)
        self.level = level

    def forward(self, scales: Sequence[Tensor]) -> Tensor:
        """The level, decoded, (B, number of scales × channels, …).

        Args:
            scales: Features of each scale, finest first: the encoder's down to this level, below it decoded.
        """
        size = scales[self.level].shape[2:]
        brought = [resize(scale(x), size) for scale, x in zip(self.scales, scales, strict=True)]
        return self.merge(torch.cat(brought, dim=1))
