"""Mix Transformer (MiT), SegFormer's encoder, in 2D and 3D."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from medseg.nets.convolution import conv_class
from medseg.nets.encoders.encoder import Encoder, plane_stride
from medseg.nets.transformer import (
    LAYER_NORM_EPS,
    TransformerBlock,
    attend,
    check_heads,
    falling_paths,
    initialize_tokens,
    to_grid,
    to_tokens,
)
from medseg.registry import Registry


@dataclass(frozen=True)
class MiTSize:
    """How large a MiT is.

    Args:
        channels: Of each stage, finest first.
        depths: Transformer blocks of each stage.
        decoder_channels: Of the decoder that SegFormer gives it.
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    decoder_channels: int


MIT_SIZES: Registry[MiTSize] = Registry(
    "variant",
    {
        "b0": MiTSize((32, 64, 160, 256), (2, 2, 2, 2), 256),
        "b1": MiTSize((64, 128, 320, 512), (2, 2, 2, 2), 256),
        "b2": MiTSize((64, 128, 320, 512), (3, 4, 6, 3), 768),
        "b3": MiTSize((64, 128, 320, 512), (3, 4, 18, 3), 768),
        "b4": MiTSize((64, 128, 320, 512), (3, 8, 27, 3), 768),
        "b5": MiTSize((64, 128, 320, 512), (3, 6, 40, 3), 768),
    },
)


class MiT(Encoder):
    """MiT: transformer blocks on tokens that grow coarser stage by stage, without position embeddings.

    Tokens are overlapping patches, so that neighbours know of each other; a 3 × 3 depthwise convolution
    in each MLP tells them where they are. All stages attend to keys on the grid of the deepest one, which
    the paper writes as spatial reductions of 8, 4, 2 and 1. Modules are named as in the published
    ``mit_b0`` to ``mit_b5``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        channels: Of each stage, finest first.
        depths: Transformer blocks of each stage.
        num_heads: Of each stage's attention.
        strides: From the image to the first stage and from each stage to the next.
        mlp_ratio: Hidden channels of an MLP over its channels.
        drop_path: Probability that training leaves out a residual branch of the last block; falls to 0
            towards the first.
        in_plane: Whether the third axis keeps its resolution.

    Reference:
        Xie et al. 2021, arXiv:2105.15203.
    """

    unused = ("head.",)

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        channels: Sequence[int] = MIT_SIZES["b0"].channels,
        depths: Sequence[int] = MIT_SIZES["b0"].depths,
        num_heads: Sequence[int] = (1, 2, 5, 8),
        strides: Sequence[int] = (4, 2, 2, 2),
        mlp_ratio: int = 4,
        drop_path: float = 0.1,
        in_plane: bool = False,
    ) -> None:
        if not len(channels) == len(depths) == len(num_heads) == len(strides) > 0:
            raise ValueError(
                f"{len(channels)} channels, {len(depths)} depths, {len(num_heads)} num_heads and {len(strides)} "
                "strides; give each one entry a stage"
            )
        if min(depths) < 1:
            raise ValueError(f"depths {tuple(depths)}; a stage has at least 1 block")
        totals = [math.prod(strides[: n + 1]) for n in range(len(strides))]
        super().__init__(
            channels, [plane_stride(total, spatial_dims, in_plane=in_plane) for total in totals], spatial_dims
        )
        paths = iter(falling_paths(drop_path, sum(depths)))
        for n, width in enumerate(channels):
            stride = plane_stride(strides[n], spatial_dims, in_plane=in_plane)
            reduction = plane_stride(totals[-1] // totals[n], spatial_dims, in_plane=in_plane)
            narrow = channels[n - 1] if n else in_channels
            blocks = [
                TransformerBlock(
                    width,
                    attention=ReducedAttention(width, num_heads[n], reduction=reduction),
                    mlp=MixFFN(width, mlp_ratio * width, spatial_dims=spatial_dims),
                    drop_path=next(paths),
                )
                for _ in range(depths[n])
            ]
            embedding = OverlapPatchEmbedding(narrow, width, kernel_size=3 if n else 7, stride=stride)
            self.add_module(f"patch_embed{n + 1}", embedding)
            self.add_module(f"block{n + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{n + 1}", nn.LayerNorm(width, eps=LAYER_NORM_EPS))
        initialize_tokens(self)
        _initialize_convs(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for n in range(1, len(self.channels) + 1):
            x = self.get_submodule(f"patch_embed{n}")(x)
            grid = tuple(x.shape[2:])
            tokens = to_tokens(x)
            for block in self.get_submodule(f"block{n}").children():
                tokens = block(tokens, grid)
            x = to_grid(self.get_submodule(f"norm{n}")(tokens), grid)  # (B, channels[n - 1], I / 4, I / 8, … , …)
            features.append(x)
        return features


class OverlapPatchEmbedding(nn.Module):
    """Tokens from patches that share voxels with their neighbours: a strided convolution, then layer norm."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int, stride: Sequence[int]) -> None:
        super().__init__()
        # Not Layers.conv, which pads a kernel of 7 at stride 4 by 2: published weights were trained with 3.
        self.proj = conv_class(len(stride))(
            in_channels, out_channels, kernel_size, stride=tuple(stride), padding=kernel_size // 2
        )
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return to_grid(self.norm(to_tokens(x)), x.shape[2:])


class ReducedAttention(nn.Module):
    """Attention whose keys and values lie on a coarser grid than its queries.

    Args:
        channels: Of a token.
        num_heads: Among which the channels are divided.
        reduction: How much coarser, along each axis.
    """

    def __init__(self, channels: int, num_heads: int, *, reduction: Sequence[int]) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.sr: nn.Module | None = None
        if max(reduction) > 1:
            kernel = tuple(reduction)
            self.sr = conv_class(len(reduction))(channels, channels, kernel, stride=kernel)
            self.norm = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        coarse = tokens if self.sr is None else self.norm(to_tokens(self.sr(to_grid(tokens, grid))))
        keys, values = self.kv(coarse).chunk(2, dim=-1)
        return self.proj(attend(self.q(tokens), keys, values, num_heads=self.num_heads))


class MixFFN(nn.Module):
    """An MLP that between its two layers looks at each token's neighbours, by a 3 × 3 depthwise convolution."""

    def __init__(self, channels: int, hidden_channels: int, *, spatial_dims: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden_channels)
        conv = conv_class(spatial_dims)(hidden_channels, hidden_channels, 3, padding=1, groups=hidden_channels)
        self.dwconv = nn.Sequential(OrderedDict(dwconv=conv))  # its published name
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(hidden_channels, channels)

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        x = self.dwconv(to_grid(self.fc1(tokens), grid))
        return self.fc2(self.activation(to_tokens(x)))


def _initialize_convs(encoder: nn.Module) -> None:
    """As the paper's code: He et al.'s rule, counted over what each voxel feeds."""
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            fan_out = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
