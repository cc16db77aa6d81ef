"""SETR: Naive, PUP and MLA, in 2D and 3D."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, Layers, PerAxis, initialize, resize
from medseg.nets.dilated import AUXILIARY_WEIGHT
from medseg.nets.encoders.encoder import plane_stride
from medseg.nets.encoders.vit import ViT
from medseg.nets.network import AxisSizes, SegmentationNetwork
from medseg.nets.transformer import LAYER_NORM_EPS, to_grid, to_tokens
from medseg.registry import Registry


@dataclass(frozen=True)
class _Size:
    image_size: int
    patch_size: int
    hidden_channels: int
    num_layers: int
    decoder_channels: int


_SIZES = {2: _Size(224, 16, 768, 12, 256), 3: _Size(96, 8, 384, 6, 64)}

QUARTERS = (6, 12, 18, 24)
"""Of 24 layers, those after which MLA takes features."""
SUPERVISED = (10, 15, 20, 24)
"""Of 24 layers, those after which training scores features too, where the decoder sees the last ones alone."""


class SETR(SegmentationNetwork):
    """SETR: a plain vision transformer is the whole encoder; the image is never downsampled but into patches.

    Its tokens, all at 1/16 of the image's resolution (1/8 in 3D by default), become logits by one of three
    decoders: ``naive`` (two 1 × 1 convolutions, then one interpolation), ``pup`` (progressive upsampling:
    convolutions, each followed by one of 2 ×) or ``mla`` (multi-level aggregation: features after each quarter of
    the layers, summed from the deepest up, refined and joined).

    Takes any size from `min_size` (16 by default in 2D, 8 in 3D) up: position embeddings are interpolated from
    `image_size`. Multiples of `min_size` need no padding. By default 12,394,114 parameters in 3D and 88,946,946 in
    2D (one channel in, two out).

    Smaller by default than the paper's, whose encoder is ViT-L/16: ``hidden_channels=1024, num_layers=24,
    image_size=768`` in 2D, with 305,460,224 parameters. Departs from the paper: auxiliary heads are those of ``naive``;
    features of layers before the last are normalized in the decoder, as in the authors' code. The paper starts
    from published weights: without them it learns slowly, and little from few scans.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        decoder: ``naive``, ``pup`` or ``mla``.
        image_size: For which the position embeddings are made; best the patch size it is trained on. None:
            224 in 2D, 96 in 3D.
        patch_size: Side of the patch that is a token, a power of 2; a smaller one is better for small organs, at
            many times the cost. None: 16, which published weights have, in 2D, 8 in 3D.
        hidden_channels: Of a token. None: 768 in 2D, 384 in 3D.
        num_layers: Of the transformer. None: 12 in 2D, 6 in 3D.
        num_heads: Of its attention; None: one for every 64 channels.
        mlp_ratio: Hidden channels of its MLPs over those of a token.
        decoder_channels: Of the decoder. None: 256 in 2D, 64 in 3D.
        norm: Of the decoder: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or
            ``none``; the encoder has layer norms.
        activation: Of the decoder: ``relu``, ``leakyrelu``, ``prelu``, ``elu``, ``gelu`` or ``silu``.
        dropout: Probability that a unit of the embeddings and the MLPs is dropped.
        drop_path: Probability that training leaves out a residual branch of the last layer; falls to 0 towards
            the first.
        in_plane: Whether the third axis keeps its resolution, for thick slices.
        deep_supervision: Whether training also scores features of layers before the last, by heads of their own.

    Reference:
        Zheng et al. 2021, arXiv:2012.15840.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        decoder: str = "pup",
        image_size: PerAxis | None = None,
        patch_size: int | None = None,
        hidden_channels: int | None = None,
        num_layers: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: int = 4,
        decoder_channels: int | None = None,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.0,
        drop_path: float = 0.1,
        in_plane: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        size = _SIZES[spatial_dims]
        patch = size.patch_size if patch_size is None else patch_size
        if patch < 2 or patch.bit_count() > 1:
            raise ValueError(f"patch_size is {patch}; it must be a power of 2, at least 2")
        hidden = size.hidden_channels if hidden_channels is None else hidden_channels
        depth = size.num_layers if num_layers is None else num_layers
        width = size.decoder_channels if decoder_channels is None else decoder_channels
        make_decoder = DECODERS[decoder]
        several = decoder == "mla"
        taken = _of_layers(QUARTERS if several else SUPERVISED, depth) if several or deep_supervision else [depth]
        encoder = ViT(
            spatial_dims,
            in_channels,
            image_size=size.image_size if image_size is None else image_size,
            patch_size=patch,
            channels=hidden,
            num_layers=depth,
            num_heads=max(1, hidden // 64) if num_heads is None else num_heads,
            mlp_ratio=mlp_ratio,
            features_after=taken,
            dropout=dropout,
            drop_path=drop_path,
            in_plane=in_plane,
        )
        early = len(taken) - 1
        super().__init__(
            AxisSizes.of_strides([encoder.strides[-1]]),
            extra_weights=[AUXILIARY_WEIGHT] * early if deep_supervision else [],
        )
        self.encoder = encoder
        self.decoder = make_decoder(
            layers, hidden, width, out_channels, num_features=len(taken) if several else 1, patch_size=patch,
            in_plane=in_plane,
        )  # fmt: skip
        self.extra_heads = nn.ModuleList()
        if deep_supervision:
            self.extra_heads.extend(AuxiliaryHead(layers, hidden, width, out_channels) for _ in range(early))
        for part in (self.decoder, self.extra_heads):
            initialize(part)

    def outputs(self, x: Tensor) -> list[Tensor]:
        features = self.encoder(x)  # each (B, hidden_channels, I/16, …)
        logits = resize(self.decoder(features), x.shape[2:])
        if not self.training:
            return [logits]
        return [logits, *[head([feature]) for head, feature in zip(self.extra_heads, features, strict=False)]]


class Naive(nn.Module):
    """Two 1 × 1 convolutions on the last features, for all to be interpolated at once."""

    def __init__(self, layers: Layers, in_channels: int, channels: int, out_channels: int, **_: object) -> None:
        super().__init__()
        self.block = ConvBlock(layers, in_channels, channels, kernel_size=1)
        self.head = layers.head(channels, out_channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.head(self.block(features[-1]))


class AuxiliaryHead(Naive):
    """The same on features of an earlier layer, which the encoder does not normalize."""

    def __init__(self, layers: Layers, in_channels: int, channels: int, out_channels: int) -> None:
        super().__init__(layers, in_channels, channels, out_channels)
        self.norm = TokenNorm(in_channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return super().forward([self.norm(features[-1])])


class TokenNorm(nn.LayerNorm):
    """Layer norm of the tokens (B, C, I, J[, K]), each over its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return to_grid(super().forward(to_tokens(x)), x.shape[2:])


class ProgressiveUpsampling(nn.Module):
    """A convolution before each upsampling of 2 ×, up to the image's resolution.

    The logits are computed before the last one, with which a 1 × 1 convolution commutes.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the features.
        channels: Of each convolution.
        out_channels: Classes or regions.
        patch_size: By how much the features are coarser than the image.
        in_plane: Whether the third axis has the image's resolution.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        channels: int,
        out_channels: int,
        *,
        patch_size: int,
        in_plane: bool,
        **_: object,
    ) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        self.blocks = nn.ModuleList(ConvBlock(layers, channels if n else in_channels, channels) for n in range(steps))
        self.head = layers.head(channels, out_channels)
        self.stride = plane_stride(2, layers.spatial_dims, in_plane=in_plane)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = features[-1]
        for n, block in enumerate(self.blocks):
            x = block(_enlarged(x, self.stride) if n else x)
        return self.head(x)  # (B, R, I/2, …)


class MultiLevelAggregation(nn.Module):
    """Features of several layers, each summed with those of all deeper ones, refined at 1/4 and joined.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of each feature.
        channels: To which all are brought; they are refined in half as many.
        out_channels: Classes or regions.
        num_features: How many there are.
        patch_size: By how much the features are coarser than the image.
        in_plane: Whether the third axis has the image's resolution.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        channels: int,
        out_channels: int,
        *,
        num_features: int,
        patch_size: int,
        in_plane: bool,
    ) -> None:
        super().__init__()
        half = max(1, channels // 2)
        make: Callable[..., nn.Module] = functools.partial(ConvBlock, layers)
        self.norms = nn.ModuleList(TokenNorm(in_channels) for _ in range(num_features - 1))  # the last one has been
        self.reduce = nn.ModuleList(make(in_channels, channels, kernel_size=1) for _ in range(num_features))
        self.refine = nn.ModuleList(
            nn.Sequential(make(channels, channels), make(channels, half), make(half, half)) for _ in range(num_features)
        )
        self.head = layers.conv(num_features * half, out_channels, kernel_size=3)
        self.stride = plane_stride(max(1, patch_size // 4), layers.spatial_dims, in_plane=in_plane)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        *early, last = features
        normalized = [*[norm(feature) for norm, feature in zip(self.norms, early, strict=True)], last]
        reduced = [reduce(feature) for reduce, feature in zip(self.reduce, normalized, strict=True)]
        summed = accumulate(reversed(reduced))
        streams = [_enlarged(refine(x), self.stride) for refine, x in zip(self.refine, summed, strict=True)]
        return self.head(torch.cat(streams, dim=1))  # (B, R, I/4, …)


DECODERS: Registry[Callable[..., nn.Module]] = Registry(
    "decoder", {"naive": Naive, "pup": ProgressiveUpsampling, "mla": MultiLevelAggregation}
)
"""Makes a decoder of (layers, in_channels, channels, out_channels, num_features, patch_size, in_plane)."""


def _of_layers(of_24: Sequence[int], num_layers: int) -> list[int]:
    """Numbers of layers of 24 as those of another number of layers."""
    return sorted({max(1, round(n * num_layers / 24)) for n in of_24})


def _enlarged(x: Tensor, stride: Sequence[int]) -> Tensor:
    return resize(x, [n * s for n, s in zip(x.shape[2:], stride, strict=True)])
