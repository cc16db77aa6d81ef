"""Swin-Unet, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.nets.blocks import PerAxis
from medseg.nets.convolution import conv_class
from medseg.nets.encoders.swin import Swin, SwinStage
from medseg.nets.network import AxisSizes, SegmentationNetwork
from medseg.nets.transformer import falling_paths, initialize_tokens, to_grid, to_tokens
from medseg.nets.windows_attention import PatchExpansion

_CHANNELS = {2: 96, 3: 48}
_WINDOWS = {2: 7, 3: 6}


class SwinUNet(SegmentationNetwork):
    """Swin-Unet: a U-Net without convolutions, whose stages mix tokens within windows that shift from block to block.

    The way down is a Swin Transformer: patches of 4 voxels become tokens, blocks of tokens are merged. The way up
    mirrors it: each token is expanded to a block of finer ones and joined with the skip by a linear layer; the last
    expansion leads back to voxels at once.

    Takes any size from `min_size` (32 by default) up: windows that do not divide the grid are padded and the
    padding is not looked at. Multiples of it need no padding. By default 7,867,692 parameters in 3D and
    27,165,156 in 2D (one channel in, two out).

    2D is the paper's, with 27,168,900 parameters for three channels and 9 classes; in 3D it has half of the
    channels by default, and windows of 6, which divide patches of 96 voxels at every stage. Departs from the
    authors' code: skips leave the encoder behind a stage's blocks, as the paper draws them, not before. The paper
    starts from the published weights of a Swin-T, whose third stage is deeper: they fit with ``depths=(2, 2, 6, 2)``,
    and in 3D with ``channels=96``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        channels: Of a token of the first stage; each further stage has twice as many. None: 96 in 2D, 48 in 3D.
        depths: Transformer blocks of each stage, finest first; the decoder's are the same.
        num_heads: Of each stage's attention.
        window_size: Tokens along each axis of a window; one number, or one an axis. None: 7 in 2D, 6 in 3D.
        patch_size: Voxels along each axis of a token of the first stage; 2 sees finer, at four times the cost in
            2D and eight times in 3D.
        mlp_ratio: Hidden channels of an MLP over its channels.
        dropout: Probability that a unit of the embeddings and the MLPs is dropped.
        drop_path: Probability that training leaves out a residual branch of the deepest block; falls to 0
            towards the finest.
        in_plane: Whether the third axis keeps its resolution, for thick slices.

    Reference:
        Cao et al. 2021, arXiv:2105.05537; Liu et al. 2021, arXiv:2103.14030 (Swin Transformer).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: int | None = None,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: PerAxis | None = None,
        patch_size: int = 4,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        drop_path: float = 0.2,
        in_plane: bool = False,
    ) -> None:
        encoder = Swin(
            spatial_dims,
            in_channels,
            channels=_CHANNELS[spatial_dims] if channels is None else channels,
            depths=depths,
            num_heads=num_heads,
            window_size=_WINDOWS[spatial_dims] if window_size is None else window_size,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            drop_path=drop_path,
            in_plane=in_plane,
        )
        super().__init__(AxisSizes.of_strides([encoder.strides[-1]]))
        self.encoder = encoder
        paths = falling_paths(drop_path, sum(depths))
        self.decoder = nn.ModuleList()  # finest first
        for n, width in enumerate(encoder.channels[:-1]):
            stage = SwinStage(
                width, num_heads[n], window_size=encoder.window_size, mlp_ratio=mlp_ratio, dropout=dropout,
                drop_paths=paths[sum(depths[:n]) : sum(depths[: n + 1])],
            )  # fmt: skip
            self.decoder.append(ExpandingStage(encoder.channels[n + 1], width, stride=encoder.merged, stage=stage))
        finest = encoder.channels[0]
        self.norm = nn.LayerNorm(finest)
        self.expand = PatchExpansion(finest, finest, stride=encoder.strides[0])
        self.head = conv_class(spatial_dims)(finest, out_channels, 1, bias=False)
        for part in (self.decoder, self.expand):
            initialize_tokens(part)

    def outputs(self, x: Tensor) -> list[Tensor]:
        size = x.shape[2:]
        *skips, x = self.encoder(x)
        for stage in reversed(self.decoder):
            x = stage(x, skips.pop())  # (B, channels[n], I / (4 · 2^n), …)
        voxels = self.expand(self.norm(to_tokens(x)), x.shape[2:])
        return [self.head(to_grid(voxels, size))]


class ExpandingStage(nn.Module):
    """One level of the decoder: tokens expanded to the skip's grid, joined with it, and mixed.

    Args:
        in_channels: Of the coarser tokens.
        channels: Of the skip and of the output.
        stride: By how much the skip is finer.
        stage: Mixes the joined tokens.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: Sequence[int], stage: SwinStage) -> None:
        super().__init__()
        self.up = PatchExpansion(in_channels, channels, stride=stride)
        self.join = nn.Linear(2 * channels, channels)
        self.stage = stage

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, channels, …) of the skip's size.

        Args:
            x: (B, in_channels, …).
            skip: (B, channels, …).
        """
        grid = tuple(skip.shape[2:])
        tokens = self.join(torch.cat([self.up(to_tokens(x), x.shape[2:]), to_tokens(skip)], dim=2))
        return to_grid(self.stage(tokens, grid), grid)
