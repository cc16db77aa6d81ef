"""Vision Transformer (ViT), in 2D and 3D, alone or behind a convolutional encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from medseg.nets.blocks import PerAxis, per_axis, resize
from medseg.nets.convolution import conv_class
from medseg.nets.encoders.encoder import Encoder, plane_stride
from medseg.nets.encoders.resnet_v2 import ResNetV2
from medseg.nets.transformer import (
    INITIAL_STD,
    LAYER_NORM_EPS,
    Attention,
    Mlp,
    TransformerBlock,
    falling_paths,
    initialize_tokens,
    resize_positions,
    to_grid,
    to_tokens,
)

_BACKBONE = "patch_embed.backbone."


class ViT(Encoder):
    """ViT: the image cut into patches, each a token; layers in which every token looks at every other.

    Images of another size than it was built for interpolate its position embeddings. Its features are
    those of `backbone`, where it has one, but the coarsest, then those after each of `features_after`, all
    on the grid of the tokens. Modules are named as in timm's ``vit_base_patch16_224``; with a backbone as
    in ``vit_base_r50_s16_224``. ViT-B/16 has 85,798,656 parameters in 2D.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        image_size: For which its position embeddings are made, one number or one an axis.
        patch_size: Side of a patch; with a backbone, in voxels of its coarsest features.
        channels: Of a token.
        num_layers: Transformer blocks.
        num_heads: Of their attention.
        mlp_ratio: Hidden channels of an MLP over its channels.
        features_after: The numbers of layers after which features are taken, rising to `num_layers`; None:
            after the last one only, whose features alone are normalized.
        backbone: Of whose coarsest features the tokens are made, instead of the image's voxels.
        class_token: Whether a token of no patch takes part, as in classifiers. Inflated to 3D, a network with
            one does not quite give the 2D result on equal slices, as it weighs less among more patches.
        dropout: Probability that a unit of the embeddings and the MLPs is dropped.
        drop_path: Probability that training leaves out a residual branch of the last layer; falls to 0
            towards the first.
        in_plane: Whether the third axis keeps its resolution.

    Reference:
        Dosovitskiy et al. 2021, arXiv:2010.11929.
    """

    unused = ("head.", "pre_logits.")

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        image_size: PerAxis,
        patch_size: int = 16,
        channels: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_ratio: int = 4,
        features_after: Sequence[int] | None = None,
        backbone: ResNetV2 | None = None,
        class_token: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        in_plane: bool = False,
    ) -> None:
        taken = (num_layers,) if features_after is None else tuple(features_after)
        if taken[-1:] != (num_layers,) or list(taken) != sorted({*taken}) or taken[0] < 1:
            raise ValueError(
                f"features_after {taken}; give rising numbers from 1 to num_layers, {num_layers}, the last"
            )
        patch = plane_stride(patch_size, spatial_dims, in_plane=in_plane)
        finest = (1,) * spatial_dims if backbone is None else backbone.strides[-1]
        stride = tuple(f * p for f, p in zip(finest, patch, strict=True))
        super().__init__(
            [*(() if backbone is None else backbone.channels[:-1]), *[channels] * len(taken)],
            [*(() if backbone is None else backbone.strides[:-1]), *[stride] * len(taken)],
            spatial_dims,
        )
        self.features_after = taken
        self.grid = tuple(math.ceil(n / s) for n, s in zip(per_axis(image_size, spatial_dims), stride, strict=True))
        self.patch_embed = PatchEmbedding(in_channels, channels, patch_size=patch, backbone=backbone)
        self.cls_token = nn.Parameter(torch.empty(1, 1, channels)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, int(class_token) + math.prod(self.grid), channels))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                channels,
                attention=Attention(channels, num_heads),
                mlp=Mlp(channels, mlp_ratio * channels, dropout=dropout),
                drop_path=path,
            )
            for path in falling_paths(drop_path, num_layers)
        )
        self.norm = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        initialize_tokens(self)
        for parameter in [self.pos_embed, *([] if self.cls_token is None else [self.cls_token])]:
            nn.init.trunc_normal_(parameter, std=INITIAL_STD)

    def forward(self, x: Tensor) -> list[Tensor]:
        features, patches = self.patch_embed(x)
        grid = tuple(patches.shape[2:])
        tokens = to_tokens(patches)  # (B, N, channels)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = self.dropout(tokens + self._positions(grid))
        for n, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, grid)
            if n in self.features_after:
                last = n == len(self.blocks)
                features.append(to_grid((self.norm(tokens) if last else tokens)[:, self._num_class_tokens :], grid))
        return features

    def fitted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published 2D weights whose position embeddings fit this encoder's grid, repeated along a third axis.

        Rows and columns of patches become our second and first axis. The backbone's weights, too, are brought
        to the form that it can be inflated from.

        Args:
            weights: The published state dict, by the names of this encoder; its grid of patches is square.
        """
        fitted = dict(weights)
        convs = {name: weight for name, weight in fitted.items() if name.startswith(_BACKBONE)}
        fitted.update(ResNetV2.fitted(convs))
        if self.cls_token is None:
            fitted.pop("cls_token", None)
        if "pos_embed" in fitted:
            fitted["pos_embed"] = self._fitted_positions(fitted["pos_embed"])
        return fitted

    @property
    def _num_class_tokens(self) -> int:
        return 0 if self.cls_token is None else 1

    def _positions(self, grid: Sequence[int]) -> Tensor:
        of_class, of_grid = self.pos_embed.tensor_split([self._num_class_tokens], dim=1)
        return torch.cat([of_class, resize_positions(of_grid, self.grid, grid)], dim=1)

    def _fitted_positions(self, published: Tensor) -> Tensor:
        side = math.isqrt(published.shape[1])
        of_class, of_grid = published.tensor_split([published.shape[1] - side**2], dim=1)
        of_grid = to_grid(of_grid, (side, side)).transpose(2, 3)  # (1, C, rows, columns) → (1, C, I, J)
        of_grid = resize(of_grid, self.grid[:2])
        if len(self.grid) == 3:
            of_grid = of_grid[..., None].expand(-1, -1, -1, -1, self.grid[2])
        return torch.cat([of_class[:, : self._num_class_tokens], to_tokens(of_grid)], dim=1)


class PatchEmbedding(nn.Module):
    """Tokens from patches side by side: of the image, or of the coarsest features that a backbone makes of it."""

    def __init__(
        self, in_channels: int, out_channels: int, *, patch_size: Sequence[int], backbone: ResNetV2 | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        narrow = in_channels if backbone is None else backbone.channels[-1]
        self.proj = conv_class(len(patch_size))(narrow, out_channels, tuple(patch_size), stride=tuple(patch_size))
        nn.init.normal_(self.proj.weight, std=1 / math.sqrt(self.proj.weight[0].numel()))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The backbone's finer features, and the patches on their grid."""
        if self.backbone is None:
            return [], self.proj(x)
        *finer, x = self.backbone(x)
        return finer, self.proj(x)
