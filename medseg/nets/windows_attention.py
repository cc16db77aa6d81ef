"""Attention within windows that shift from block to block, and the merging and splitting of tokens, in 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.nets.transformer import INITIAL_STD, check_heads


class WindowAttention(nn.Module):
    """Every token looks at those of its window, whose offset from it has a learned bias.

    Where the windows do not divide the grid it is padded, and nothing looks at the padding; along an axis that
    is no longer than the window all tokens share one. Modules are named as in the published Swin Transformers.

    Args:
        channels: Of a token.
        num_heads: Among which the channels are divided.
        window_size: Tokens along each axis.
        shifted: Whether the windows lie half a window further, so that they join what the others keep apart.

    Reference:
        Liu et al. 2021, arXiv:2103.14030.
    """

    def __init__(self, channels: int, num_heads: int, *, window_size: Sequence[int], shifted: bool = False) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        self.num_heads = num_heads
        self.window_size = tuple(window_size)
        self.shifted = shifted
        num_offsets = math.prod(2 * n - 1 for n in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_offsets, num_heads))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=INITIAL_STD)

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens (B, N, C) of a grid, mixed within their windows."""
        window = [min(w, n) for w, n in zip(self.window_size, grid, strict=True)]
        shift = [w // 2 if self.shifted and n > w else 0 for w, n in zip(window, grid, strict=True)]
        padded = [math.ceil(n / w) * w for w, n in zip(window, grid, strict=True)]
        axes = list(range(1, len(grid) + 1))

        x = pad_grid(tokens.unflatten(1, tuple(grid)), padded)
        x = x.roll([-s for s in shift], axes) if any(shift) else x
        bias = self.position_bias(window)[None]  # (1, heads, n, n)
        if any(shift) or padded != list(grid):
            together = _together(grid, padded, window, shift, device=tokens.device)  # (windows, n, n)
            bias = bias + torch.zeros_like(together, dtype=bias.dtype).masked_fill(~together, -math.inf)[:, None]
        x = join_blocks(self._mixed(to_blocks(x, window), bias), window, padded)
        x = x.roll(shift, axes) if any(shift) else x
        kept = [slice(n) for n in grid]
        return self.proj(x[(slice(None), *kept)].flatten(1, -2))

    def position_bias(self, window: Sequence[int]) -> Tensor:
        """What is added to query · key for each pair of tokens of a window, (heads, n, n)."""
        device = self.relative_position_bias_table.device
        index = torch.zeros((), dtype=torch.long, device=device)
        places = torch.meshgrid(*[torch.arange(n, device=device) for n in window], indexing="ij")
        for place, size in zip(places, self.window_size, strict=True):
            offset = place.flatten()[:, None] - place.flatten()[None]
            index = index * (2 * size - 1) + offset + size - 1
        # Not table[index], whose gradient is summed in an order that changes from call to call.
        return F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1)

    def _mixed(self, windows: Tensor, bias: Tensor) -> Tensor:
        """(B, W, n, C) with each window's tokens mixed; bias (W or 1, heads, n, n)."""
        number, size = windows.shape[1:3]
        # Windows and heads together are what torch's attention calls heads, so that all samples share the bias.
        queries, keys, values = (
            part.unflatten(3, (self.num_heads, -1)).transpose(2, 3).flatten(1, 2)  # (B, W·heads, n, C / heads)
            for part in self.qkv(windows).chunk(3, dim=-1)
        )
        shared = bias.expand(number, -1, size, size).flatten(0, 1).to(queries.dtype)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=shared)
        return mixed.unflatten(1, (number, self.num_heads)).transpose(2, 3).flatten(3)


class PatchMerging(nn.Module):
    """Blocks of tokens become one each, of other channels; named as in the published Swin Transformers.

    Args:
        in_channels: Of a token.
        out_channels: Of a merged one.
        stride: Tokens that are merged, along each axis.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.norm = nn.LayerNorm(math.prod(stride) * in_channels)
        self.reduction = nn.Linear(math.prod(stride) * in_channels, out_channels, bias=False)

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, N, in_channels) → (B, N / the product of the strides, out_channels)."""
        return self.reduction(self.norm(to_blocks(tokens.unflatten(1, tuple(grid)), self.stride).flatten(2)))


class PatchExpansion(nn.Module):
    """Each token becomes a block of finer ones: `PatchMerging` backwards.

    Args:
        in_channels: Of a token.
        out_channels: Of a finer one.
        stride: Finer tokens for each, along each axis.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.expand = nn.Linear(in_channels, math.prod(stride) * out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, N, in_channels) → (B, N × the product of the strides, out_channels)."""
        finer = [n * s for n, s in zip(grid, self.stride, strict=True)]
        blocks = self.expand(tokens).unflatten(2, (math.prod(self.stride), -1))
        return self.norm(join_blocks(blocks, self.stride, finer).flatten(1, -2))


def to_blocks(x: Tensor, block: Sequence[int]) -> Tensor:
    """(B, I, J[, K], C), cut into blocks that divide it → (B, blocks, voxels of a block, C), both row by row."""
    dims = len(block)
    for axis in reversed(range(dims)):
        x = x.unflatten(axis + 1, (-1, block[axis]))
    # (B, I / i, i, J / j, j[, …], C)
    order = [0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1]
    return x.permute(order).flatten(dims + 1, 2 * dims).flatten(1, dims)


def join_blocks(blocks: Tensor, block: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Undoes `to_blocks`: (B, blocks, voxels of a block, C) → (B, I, J[, K], C)."""
    dims = len(block)
    numbers = tuple(n // b for n, b in zip(grid, block, strict=True))
    x = blocks.unflatten(2, tuple(block)).unflatten(1, numbers)
    order = [0, *[axis for n in range(dims) for axis in (1 + n, 1 + dims + n)], 2 * dims + 1]
    x = x.permute(order)
    for axis in range(dims):
        x = x.flatten(axis + 1, axis + 2)
    return x


def pad_grid(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, I, J[, K], C), filled up to a size with zeros at the far ends."""
    missing = [wanted - n for wanted, n in zip(size, x.shape[1:-1], strict=True)]
    return F.pad(x, [0, 0, *[amount for n in reversed(missing) for amount in (0, n)]]) if any(missing) else x


def _together(
    grid: Sequence[int], padded: Sequence[int], window: Sequence[int], shift: Sequence[int], *, device: torch.device
) -> Tensor:
    """Which tokens of a window may look at each other, (windows, n, n): neighbours, and padding at padding.

    Rolling the grid brings its near ends into the last windows, beside far ends that are no neighbours of theirs.
    """
    region = torch.zeros((1, *[1] * len(grid), 1), dtype=torch.long, device=device)
    padding = torch.zeros_like(region, dtype=torch.bool)
    for axis, (n, p, s) in enumerate(zip(grid, padded, shift, strict=True), start=1):
        place = torch.arange(p, device=device).roll(-s).view(-1, *[1] * (len(grid) + 1 - axis))
        region = 2 * region + (place < s)
        padding = padding | (place >= n)
    region = region.masked_fill(padding, -1)  # a region of its own: a token that may look at none would give NaN
    blocks = to_blocks(region, window)[0, :, :, 0]  # (windows, n)
    return blocks[:, :, None] == blocks[:, None]
