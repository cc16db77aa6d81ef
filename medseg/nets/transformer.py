"""The parts of transformers, in 2D and 3D: attention, MLP, the block of both, position embeddings for any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from medseg.nets.blocks import resize

LAYER_NORM_EPS = 1e-6
INITIAL_STD = 0.02
"""Of linear layers, class tokens and position embeddings, as in BERT and all that followed."""


class Attention(nn.Module):
    """Every token looks at every token, in several heads at once.

    Args:
        channels: Of a token.
        num_heads: Among which the channels are divided.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens (B, N, C) mixed by how well their queries match the keys of all."""
        queries, keys, values = self.qkv(tokens).chunk(3, dim=-1)
        return self.proj(attend(queries, keys, values, num_heads=self.num_heads))


class Mlp(nn.Module):
    """Two linear layers, applied to each token alone.

    Args:
        channels: Of a token.
        hidden_channels: Between the two.
        dropout: Probability that a unit is dropped after each.
    """

    def __init__(self, channels: int, hidden_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.fc2 = nn.Linear(hidden_channels, channels)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        tokens = self.dropout(self.activation(self.fc1(tokens)))
        return self.dropout(self.fc2(tokens))


class TransformerBlock(nn.Module):
    """Mixes the tokens, then works on each alone; both are normalized first and summed with what they began from.

    Args:
        channels: Of a token.
        attention: Mixes tokens; called with the tokens (B, N, C) and their grid, as is `mlp`.
        mlp: Works on the tokens, alone or with their neighbours.
        drop_path: Probability that training leaves out either of the two for a sample.
    """

    def __init__(self, channels: int, *, attention: nn.Module, mlp: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.attn = attention
        self.norm2 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.mlp = mlp
        self.drop_path = drop_path

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        tokens = tokens + self._drop_path(self.attn(self.norm1(tokens), grid))
        return tokens + self._drop_path(self.mlp(self.norm2(tokens), grid))

    def _drop_path(self, tokens: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return tokens
        return tokens * F.dropout(tokens.new_ones(tokens.shape[0], 1, 1), self.drop_path)


def attend(queries: Tensor, keys: Tensor, values: Tensor, *, num_heads: int) -> Tensor:
    """For each query the mean of the values, weighted by the softmax of query · key / √(channels of a head).

    Args:
        queries: (B, N, C).
        keys: (B, M, C).
        values: (B, M, C).
        num_heads: Parts of the channels, each of which has weights of its own.

    Returns:
        (B, N, C).
    """
    heads = [tokens.unflatten(2, (num_heads, -1)).transpose(1, 2) for tokens in (queries, keys, values)]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def check_heads(channels: int, num_heads: int) -> None:
    """Refuse channels that cannot be divided among the heads.

    Raises:
        ValueError: If they cannot.
    """
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"{channels} channels for {num_heads} heads; the heads must divide the channels")


def falling_paths(drop_path: float, num_blocks: int) -> list[float]:
    """The probability to leave out a block, from 0 for the first to `drop_path` for the last."""
    return [drop_path * n / max(1, num_blocks - 1) for n in range(num_blocks)]


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, I, J[, K]) → (B, I·J[·K], C)."""
    return x.flatten(2).transpose(1, 2)


def to_grid(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, I·J[·K], C) → (B, C, I, J[, K])."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def resize_positions(positions: Tensor, built_grid: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Position embeddings (1, N, C) of one grid of tokens, interpolated to another."""
    return to_tokens(resize(to_grid(positions, built_grid), grid))


def initialize_tokens(module: nn.Module) -> None:
    """Draw the weights of linear layers; their biases are 0. Layer norms start as torch makes them.

    Reference:
        Devlin et al. 2019, arXiv:1810.04805; Dosovitskiy et al. 2021, arXiv:2010.11929.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=INITIAL_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
