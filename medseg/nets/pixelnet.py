"""PixelNet, in 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.nets.blocks import Layers, PerAxis, initialize, resize
from medseg.nets.convolution import convolve
from medseg.nets.encoders.vgg import VGG, VGG16_CHANNELS, VGG16_CONVS
from medseg.nets.network import AxisSizes, SegmentationNetwork


class PixelNet(SegmentationNetwork):
    """PixelNet: each voxel is classified by a small MLP on its hypercolumn, what the encoder found there at every depth.

    Neighbors tell the same: in training only some voxels of each image, drawn at random, pass their gradient on, which
    saves about half of the memory in 2D, and a fifth in 3D. Their share of the gradient is scaled up to stand for all, so
    that on average it is the whole one; the loss is that of all voxels.

    Takes any size from `min_size` (32 by default) up; multiples of it need no padding. By default 59,511,106 parameters in 3D
    and 21,196,738 in 2D (one channel in, two out).

    Departs from the paper: fc6 is 3 × 3 and fc7 has 1024 channels by default, the MLP 256 and 256 (64 and 64 in 3D), and
    the encoder is normalized; ``fc_channels=4096, fc_kernel_size=7, mlp_channels=(4096, 4096), num_sampled_pixels=2000,
    dropout=0.5`` is the paper's, with 173,938,517 parameters for 21 classes without norm. Where all voxels are computed,
    the first layer works on each resolution before it is interpolated: the two commute.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        channels: Of each stage of the encoder, finest first.
        convs_per_stage: One number, or an entry a stage.
        fc_channels: Of the encoder's last two layers, fc6 and fc7; 0: left out.
        fc_kernel_size: Of fc6.
        mlp_channels: Of the MLP's hidden layers; None: (256, 256) in 2D, (64, 64) in 3D.
        num_sampled_pixels: Voxels of each image that training learns from in each step; 0: all; None: 2000 in 2D,
            20,000 in 3D.
        norm: Of the encoder: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``prelu``, ``elu``, ``gelu`` or ``silu``.
        dropout: Probability that a unit of fc6, fc7 or the MLP is dropped.
        in_plane: Whether the third axis keeps its resolution, for thick slices.

    Reference:
        Bansal et al. 2017, arXiv:1702.06506; Hariharan et al. 2015, arXiv:1411.5752 (hypercolumns).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = VGG16_CHANNELS,
        convs_per_stage: int | Sequence[int] = VGG16_CONVS,
        fc_channels: int = 1024,
        fc_kernel_size: PerAxis = 3,
        mlp_channels: Sequence[int] | None = None,
        num_sampled_pixels: int | None = None,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.1,
        in_plane: bool = False,
    ) -> None:
        if mlp_channels is None:
            mlp_channels = (256, 256) if spatial_dims == 2 else (64, 64)
        if num_sampled_pixels is None:
            num_sampled_pixels = 2000 if spatial_dims == 2 else 20_000
        if not mlp_channels or min(mlp_channels) < 1:
            raise ValueError(
                f"mlp_channels {tuple(mlp_channels)}; give one hidden layer or more, of at least 1 channel"
            )
        if num_sampled_pixels < 0:
            raise ValueError(f"num_sampled_pixels is {num_sampled_pixels}; give a positive number, or 0 for all")
        encoder = VGG(
            spatial_dims,
            in_channels,
            channels=channels,
            convs_per_stage=convs_per_stage,
            fc_channels=fc_channels,
            fc_kernel_size=fc_kernel_size,
            dropout=dropout,
            norm=norm,
            activation=activation,
            in_plane=in_plane,
        )
        super().__init__(AxisSizes.of_strides([encoder.strides[-1]]))
        layers = Layers(spatial_dims, activation=activation)
        self.encoder = encoder
        self.num_sampled_pixels = num_sampled_pixels
        self.column = layers.conv(sum(encoder.channels), mlp_channels[0], kernel_size=1)
        self.mlp = nn.Sequential()  # what follows the first layer
        for width, following in pairwise([*mlp_channels, out_channels]):
            self.mlp.extend(
                [layers.make_activation(width), nn.Dropout(dropout), layers.conv(width, following, kernel_size=1)]
            )
        initialize(self.column)
        initialize(self.mlp)

    def outputs(self, x: Tensor) -> list[Tensor]:
        features = self.encoder(x)
        size = x.shape[2:]
        if not (self.training and self.num_sampled_pixels):
            return [self._dense(features, size)]
        number = math.prod(size)
        index = torch.randint(number, (x.shape[0], self.num_sampled_pixels), device=x.device)
        # Before the dense logits: under autocast, weights that were first cast without gradient would never get one.
        sampled = self.mlp(self.column(hypercolumns(features, index, size))).flatten(2)  # (B, R, P)
        constant = sampled.detach()
        sampled = constant + (sampled - constant) * (number / self.num_sampled_pixels)  # scales the gradient alone
        with torch.no_grad():
            logits = self._dense(features, size).flatten(2)
        index = index[:, None].expand_as(sampled)
        return [logits.scatter(2, index, sampled.to(logits.dtype)).unflatten(2, size)]

    def _dense(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits (B, R, …) of all voxels."""
        dims = len(size)
        weight, bias = self.column.get_parameter("weight"), self.column.get_parameter("bias")
        hidden = bias.view(-1, *[1] * dims)
        for feature, part in zip(features, weight.split(self.encoder.channels, dim=1), strict=True):
            hidden = hidden + resize(convolve(feature, part, stride=[1] * dims, padding=[0] * dims), size)
        return self.mlp(hidden)


def hypercolumns(features: Sequence[Tensor], index: Tensor, size: Sequence[int]) -> Tensor:
    """What is found at some voxels of the image at every depth, interpolated linearly.

    Args:
        features: (B, C_n, …) at any resolutions.
        index: Of the voxels in the flattened axes of the image, (B, P).
        size: Of the image.

    Returns:
        (B, sum of C_n, P, 1[, 1]).
    """
    kind = torch.promote_types(features[0].dtype, torch.float32)  # places need more digits than bfloat16 has
    places = [
        (2 * place + 1).to(kind) / n - 1  # in (-1, 1)
        for place, n in zip(torch.unravel_index(index, tuple(size)), size, strict=True)
    ]
    grid = torch.stack(places[::-1], dim=-1)  # torch wants the last axis first
    grid = grid.view(*index.shape, *[1] * (len(size) - 1), len(size))
    found = [F.grid_sample(x.to(kind), grid, padding_mode="border", align_corners=False) for x in features]
    return torch.cat(found, dim=1)
