"""Swin Transformer, in 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from medseg.nets.blocks import PerAxis, per_axis, resize
from medseg.nets.convolution import conv_class
from medseg.nets.encoders.encoder import Encoder, plane_stride
from medseg.nets.transformer import (
    Mlp,
    TransformerBlock,
    falling_paths,
    initialize_tokens,
    to_grid,
    to_tokens,
)
from medseg.nets.windows_attention import PatchMerging, WindowAttention

MERGED = 2
"""Tokens that become one from stage to stage, along each axis."""


class Swin(Encoder):
    """Swin Transformer: attention within windows, so that its cost grows with the image and not with its square.

    Every second block shifts the windows; between stages blocks of tokens are merged, and so the windows
    grow until they hold the whole image. Features of each stage, the last one normalized. Modules are
    named as in the published ``swin_tiny_patch4_window7_224``: 27,519,354 parameters in 2D, three channels.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        channels: Of a token of the first stage; each further stage has twice as many.
        depths: Transformer blocks of each stage.
        num_heads: Of each stage's attention.
        window_size: Tokens along each axis of a window.
        patch_size: Voxels along each axis of a token of the first stage.
        mlp_ratio: Hidden channels of an MLP over its channels.
        dropout: Probability that a unit of the embeddings and the MLPs is dropped.
        drop_path: Probability that training leaves out a residual branch of the last block; falls to 0
            towards the first.
        in_plane: Whether the third axis keeps its resolution.

    Reference:
        Liu et al. 2021, arXiv:2103.14030.
    """

    unused = ("head.",)

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        channels: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: PerAxis = 7,
        patch_size: int = 4,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        drop_path: float = 0.1,
        in_plane: bool = False,
    ) -> None:
        if not len(depths) == len(num_heads) > 0 or min(depths) < 1:
            raise ValueError(f"depths {tuple(depths)} and num_heads {tuple(num_heads)}; give each one entry a stage")
        strides = [plane_stride(patch_size * MERGED**n, spatial_dims, in_plane=in_plane) for n in range(len(depths))]
        super().__init__([channels * 2**n for n in range(len(depths))], strides, spatial_dims)
        self.window_size = per_axis(window_size, spatial_dims)
        self.merged = plane_stride(MERGED, spatial_dims, in_plane=in_plane)
        self.patch_embed = PatchEmbedding(in_channels, channels, patch_size=self.strides[0])
        self.dropout = nn.Dropout(dropout)
        paths = falling_paths(drop_path, sum(depths))
        self.layers = nn.ModuleList()
        for n, (width, heads) in enumerate(zip(self.channels, num_heads, strict=True)):
            stage = SwinStage(
                width, heads, window_size=self.window_size, mlp_ratio=mlp_ratio, dropout=dropout,
                drop_paths=paths[sum(depths[:n]) : sum(depths[: n + 1])],
            )  # fmt: skip
            if n + 1 < len(depths):
                stage.add_module("downsample", PatchMerging(width, 2 * width, stride=self.merged))
            self.layers.append(stage)
        self.norm = nn.LayerNorm(self.channels[-1])
        initialize_tokens(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed(x)
        grid = tuple(x.shape[2:])
        tokens = self.dropout(to_tokens(x))
        features = []
        for n, stage in enumerate(self.layers, start=1):
            tokens = stage(tokens, grid)
            last = n == len(self.layers)
            features.append(to_grid(self.norm(tokens) if last else tokens, grid))  # (B, channels[n - 1], I / 4, …)
            if not last:
                tokens = stage.get_submodule("downsample")(tokens, grid)
                grid = tuple(n // m for n, m in zip(grid, self.merged, strict=True))
        return features

    def fitted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published 2D weights whose biases fit these windows, repeated along a third axis, as merged tokens are.

        Args:
            weights: The published state dict, by the names of this encoder; its windows are square.
        """
        fitted = {}
        for name, weight in weights.items():
            if name.endswith(".relative_position_bias_table"):
                fitted[name] = self._fitted_biases(weight)
            elif ".downsample." in name and len(self.merged) == 3 and self.merged[2] > 1:
                fitted[name] = _merging_more(weight, self.merged[2], average=name.endswith(".reduction.weight"))
            elif not name.endswith((".relative_position_index", ".attn_mask")):  # what follows from the sizes
                fitted[name] = weight
        return fitted

    def _fitted_biases(self, published: Tensor) -> Tensor:
        side = math.isqrt(published.shape[0])
        # Offsets in rows and columns become those along our second and first axis.
        table = to_grid(published[None], (side, side)).transpose(2, 3)  # (1, heads, 2 w - 1, 2 w - 1)
        table = resize(table, [2 * n - 1 for n in self.window_size[:2]])
        if len(self.window_size) == 3:
            table = table[..., None].expand(*table.shape, 2 * self.window_size[2] - 1)
        return to_tokens(table)[0]


class SwinStage(nn.Module):
    """Blocks whose windows lie in turn where they are and half a window further; all tokens are of one grid.

    Args:
        channels: Of a token.
        num_heads: Of the attention.
        window_size: Tokens along each axis.
        mlp_ratio: Hidden channels of an MLP over its channels.
        dropout: Of the MLPs.
        drop_paths: For each block the probability that training leaves out a residual branch of it.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        window_size: Sequence[int],
        mlp_ratio: int,
        dropout: float,
        drop_paths: Sequence[float],
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            TransformerBlock(
                channels,
                attention=WindowAttention(channels, num_heads, window_size=window_size, shifted=n % 2 == 1),
                mlp=Mlp(channels, mlp_ratio * channels, dropout=dropout),
                drop_path=path,
            )
            for n, path in enumerate(drop_paths)
        )

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens, grid)
        return tokens


class PatchEmbedding(nn.Module):
    """Tokens from patches side by side, normalized."""

    def __init__(self, in_channels: int, out_channels: int, *, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.proj = conv_class(len(patch_size))(in_channels, out_channels, tuple(patch_size), stride=tuple(patch_size))
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return to_grid(self.norm(to_tokens(x)), x.shape[2:])


def _merging_more(weight: Tensor, depth: int, *, average: bool) -> Tensor:
    """Weights for blocks of 2 × 2 tokens, repeated for blocks that are `depth` deep; `average`d where they are summed."""
    repeated = weight.unflatten(-1, (MERGED**2, -1)).repeat_interleave(depth, dim=-2).flatten(-2)
    return repeated / depth if average else repeated
