"""Fast-SCNN, in 2D and 3D."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, initialize, per_level, resize
from medseg.nets.dilated import AUXILIARY_DROPOUT, AUXILIARY_WEIGHT
from medseg.nets.encoders.encoder import plane_stride
from medseg.nets.network import AxisSizes, SegmentationNetwork
from medseg.nets.pyramids import PyramidPooling
from medseg.nets.separable import InvertedResidual, SeparableConv, calm_inverted_residuals


class FastSCNN(SegmentationNetwork):
    """Fast-SCNN: a few layers learn to downsample, once, for both the branch of detail and the branch of context.

    Detail goes past the deep branch as the one skip there is; context comes from inverted residuals and pyramid
    pooling at a quarter of that resolution; both are summed and classified by depthwise separable convolutions.

    Takes any size from `min_size` (32 by default in 2D, 16 in 3D) up; multiples of it need no padding. By default
    1,230,354 parameters in 3D and 1,135,026 in 2D (one channel in, two out).

    Departs from the paper: in 3D the features of detail are at 1/4 of the image's resolution by default, at 1/8 in
    2D as in the paper; convolutions before a norm have no bias; pooled values are normalized over channels and
    bins, unless ``norm="batch"``, which is the paper's, is asked for.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        stem_channels: Of the three layers that learn to downsample.
        channels: Of the three stages of inverted residuals, the first two of which halve the resolution.
        blocks: Inverted residuals of each stage; one number for all, or an entry each.
        expansion: How many times as many channels are inside an inverted residual.
        bins: Of the pyramid pooling, along each axis, a number for each scale.
        output_stride: 2, 4 or 8: how much coarser than the image the features are that are classified; the
            context is four times as coarse. None: 8 in 2D, 4 in 3D.
        in_plane: Whether strides and poolings leave the third axis alone, for thick slices.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``relu6``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped before the classification.
        deep_supervision: Whether training also scores the features of detail, by a head of their own.

    Reference:
        Poudel et al. 2019, arXiv:1902.04502.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        stem_channels: Sequence[int] = (32, 48, 64),
        channels: Sequence[int] = (64, 96, 128),
        blocks: int | Sequence[int] = 3,
        expansion: int = 6,
        bins: Sequence[int] = (1, 2, 3, 6),
        output_stride: int | None = None,
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.1,
        deep_supervision: bool = False,
    ) -> None:
        if len(stem_channels) != 3 or len(channels) != 3:
            raise ValueError(f"stem_channels {tuple(stem_channels)} and channels {tuple(channels)}; give three of each")
        stride = (8 if spatial_dims == 2 else 4) if output_stride is None else output_stride
        if stride not in (2, 4, 8):
            raise ValueError(f"output_stride is {stride}; it must be 2, 4 or 8")
        on_axes = functools.partial(plane_stride, spatial_dims=spatial_dims, in_plane=in_plane)
        super().__init__(
            AxisSizes.of_strides([on_axes(4 * stride)]), extra_weights=[AUXILIARY_WEIGHT] if deep_supervision else []
        )
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        steps = [on_axes(2 if 2**n <= stride else 1) for n in (1, 2, 3)]
        first, second, detail = stem_channels
        self.learning_to_downsample = nn.Sequential(
            ConvBlock(layers, in_channels, first, stride=steps[0]),
            SeparableConv(layers, first, second, stride=steps[1], norm_between=True),
            SeparableConv(layers, second, detail, stride=steps[2], norm_between=True),
        )
        residuals: list[nn.Module] = []
        narrow = detail
        for wide, number, step in zip(channels, per_level("blocks", blocks, 3), (2, 2, 1), strict=True):
            for n in range(number):
                by = 1 if n else on_axes(step)
                residuals.append(InvertedResidual(layers, narrow, wide, stride=by, expansion=expansion))
                narrow = wide
        share = max(1, narrow // len(bins))
        self.global_features = nn.Sequential(
            *residuals,
            PyramidPooling(layers, narrow, share, bins=bins, in_plane=in_plane),
            ConvBlock(layers, narrow + len(bins) * share, narrow, kernel_size=1),
        )
        self.fusion = FeatureFusion(layers, detail, narrow)
        self.classifier = nn.Sequential(
            SeparableConv(layers, narrow, narrow, norm_between=True),
            SeparableConv(layers, narrow, narrow, norm_between=True),
            replace(layers, dropout=dropout).make_dropout(),
            layers.head(narrow, out_channels),
        )
        self.extra_heads = nn.ModuleList()
        if deep_supervision:
            block = ConvBlock(replace(layers, dropout=AUXILIARY_DROPOUT), detail, max(1, detail // 2))
            self.extra_heads.append(nn.Sequential(block, layers.head(max(1, detail // 2), out_channels)))
        initialize(self)
        if norm == "none":
            calm_inverted_residuals(self)

    def outputs(self, x: Tensor) -> list[Tensor]:
        detail = self.learning_to_downsample(x)  # (B, 64, I/8, …)
        context = self.global_features(detail)  # (B, 128, I/32, …)
        logits = self.classifier(self.fusion(detail, context))
        extra = [head(detail) for head in self.extra_heads] if self.training else []
        return [resize(logits, x.shape[2:]), *extra]


class FeatureFusion(nn.Module):
    """Coarse features brought to the grid of fine ones, smoothed there, and summed with them.

    Args:
        layers: What the network's layers agree on.
        fine_channels: Of the fine features.
        channels: Of the coarse ones and of the output.
    """

    def __init__(self, layers: Layers, fine_channels: int, channels: int) -> None:
        super().__init__()
        self.smooth = ConvBlock(layers, channels, channels, groups=channels)
        self.coarse = ConvBlock(layers, channels, channels, kernel_size=1, activate=False)
        self.fine = ConvBlock(layers, fine_channels, channels, kernel_size=1, activate=False)
        self.activation = layers.make_activation(channels)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        upsampled = self.smooth(resize(coarse, fine.shape[2:]))
        return self.activation(self.coarse(upsampled) + self.fine(fine))
