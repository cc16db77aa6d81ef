"""UPerNet, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, initialize, resize
from medseg.nets.dilated import DilatedNetwork
from medseg.nets.pyramids import PyramidPooling

_CHANNELS = {2: 512, 3: 128}


class UPerNet(DilatedNetwork):
    """UPerNet: PSPNet's view of the whole image at the bottom of a feature pyramid, whose levels are all classified.

    The pooled features lead down from stride 32 to 4, at each level summed with the encoder's; then all levels,
    coarse and fine, are brought to 1/4 of the image and fused there.

    Takes any size from `min_size` (32) up; multiples of it need no padding. By default 59,380,290 parameters in
    3D and 64,016,322 in 2D (one channel in, two out).

    Departs from the paper: it was made to learn scenes, objects, parts and materials together, of which only the
    head for classes of voxels is left; in 3D there are fewer channels by default; the pooled values are normalized
    over channels and bins, unless ``norm="batch"`` is asked for, which is the paper's.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        encoder: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``xception41``, ``xception65``, ``vgg16`` or
            ``mobilenet_v2``.
        width: Channels of the encoder's stem; all others are in proportion.
        channels: Of each level of the pyramid. None: 512 in 2D, 128 in 3D.
        bins: Into which each axis is divided, a number for each scale.
        in_plane: Whether strides and poolings leave the third axis alone, for thick slices.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped before the classification.
        deep_supervision: Whether training also scores the encoder's last stage but one, by a head of its own.

    Reference:
        Xiao et al. 2018, arXiv:1807.10221.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        encoder: str = "resnet50",
        width: int = 64,
        channels: int | None = None,
        bins: Sequence[int] = (1, 2, 3, 6),
        in_plane: bool = False,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.1,
        deep_supervision: bool = False,
    ) -> None:
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        super().__init__(
            layers, in_channels, out_channels, encoder=encoder, width=width, output_stride=32,
            in_plane=in_plane, deep_supervision=deep_supervision,
        )  # fmt: skip
        share = _CHANNELS[spatial_dims] if channels is None else channels
        *finer, deepest = self.encoder.channels[1:]
        pyramid = PyramidPooling(layers, deepest, share, bins=bins, in_plane=in_plane)
        self.bottom = nn.Sequential(pyramid, ConvBlock(layers, deepest + len(bins) * share, share))
        self.laterals = nn.ModuleList(ConvBlock(layers, width, share, kernel_size=1) for width in finer)
        self.smooth = nn.ModuleList(ConvBlock(layers, share, share) for _ in finer)
        self.fuse = ConvBlock(replace(layers, dropout=dropout), (len(finer) + 1) * share, share)
        self.head = layers.head(share, out_channels)
        for part in (self.bottom, self.laterals, self.smooth, self.fuse, self.head):
            initialize(part)

    def classified(self, features: Sequence[Tensor]) -> Tensor:
        *finer, deepest = features[1:]
        x = self.bottom(deepest)  # (B, channels, I/32, …)
        levels = [x]
        for lateral, smooth, feature in reversed(list(zip(self.laterals, self.smooth, finer, strict=True))):
            x = lateral(feature) + resize(x, feature.shape[2:])
            levels.append(smooth(x))
        finest = levels[-1].shape[2:]
        return self.head(self.fuse(torch.cat([resize(level, finest) for level in reversed(levels)], dim=1)))
