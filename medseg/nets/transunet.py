"""TransUNet, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvBlock, ConvStage, Layers, PerAxis, initialize, resize
from medseg.nets.encoders.resnet_v2 import ResNetV2
from medseg.nets.encoders.vit import ViT
from medseg.nets.network import AxisSizes, SegmentationNetwork


@dataclass(frozen=True)
class _Size:
    image_size: int
    width: int
    hidden_channels: int
    num_layers: int
    decoder_channels: tuple[int, ...]


_SIZES = {
    2: _Size(224, 64, 768, 12, (256, 128, 64, 16)),
    3: _Size(96, 32, 384, 6, (128, 64, 32, 16)),
}


class TransUNet(SegmentationNetwork):
    """TransUNet: a U-Net whose bottom is a vision transformer, so that every region can ask every other.

    A ResNet with group norm leads down to 1/16, each voxel there becomes a token, and the decoder (the
    paper's cascaded upsampler, CUP) leads up by interpolation, with skips from the ResNet at 1/8, 1/4 and
    1/2. In 3D all of it is 3D: a token is a patch of 16 × 16 × 16 voxels.

    Takes any size from `min_size` (16 by default) up: position embeddings are interpolated from
    `image_size`. Multiples of `min_size` need no padding. By default 22,476,866 parameters in 3D and
    105,269,794 in 2D (one channel in, two out).

    2D is the paper's R50-ViT-B/16, with 105,277,081 parameters for three channels and 9 classes. In 3D it
    is smaller by default, for patches of 64 to 96 voxels on one GPU or a CPU. Departs from the authors'
    code: the pooling of the ResNet keeps its features aligned with the image, where theirs loses the last
    voxel; shortcuts are normalized in groups of channels, as in the published weights; and upsampling
    does not align corners. The paper starts from published weights of the encoder; in 3D
    they fit with ``width=64, hidden_channels=768, num_layers=12``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        image_size: For which the position embeddings are made; best the patch size it is trained on. None:
            224 in 2D, 96 in 3D.
        width: Channels of the ResNet's stem; its stages have 4, 8, 16 times as many. None: 64 in 2D, 32 in 3D.
        blocks: Bottlenecks of each stage of the ResNet.
        hidden_channels: Of a token. None: 768 in 2D, 384 in 3D.
        num_layers: Of the transformer. None: 12 in 2D, 6 in 3D.
        num_heads: Of its attention; None: one for every 64 channels.
        mlp_ratio: Hidden channels of its MLPs over those of a token.
        decoder_channels: Of each level, coarsest first, one more than `blocks` has entries. None: 256, 128,
            64, 16 in 2D, 128, 64, 32, 16 in 3D.
        norm: Of the decoder: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or
            ``none``.
        activation: Of the decoder: ``relu``, ``leakyrelu``, ``prelu``, ``elu``, ``gelu`` or ``silu``.
        dropout: Probability that a unit of the embeddings and the MLPs is dropped.
        in_plane: Whether the third axis keeps its resolution, for thick slices.

    Reference:
        Chen et al. 2021, arXiv:2102.04306; Chen et al. 2023, arXiv:2310.07781 (in 3D).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        image_size: PerAxis | None = None,
        width: int | None = None,
        blocks: Sequence[int] = (3, 4, 9),
        hidden_channels: int | None = None,
        num_layers: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: int = 4,
        decoder_channels: Sequence[int] | None = None,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.1,
        in_plane: bool = False,
    ) -> None:
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        size = _SIZES[spatial_dims]
        hidden = size.hidden_channels if hidden_channels is None else hidden_channels
        widths = size.decoder_channels if decoder_channels is None else tuple(decoder_channels)
        if len(widths) != len(blocks) + 1:
            raise ValueError(
                f"decoder_channels has {len(widths)} entries; give {len(blocks) + 1}, one more than blocks"
            )
        resnet = ResNetV2(
            spatial_dims, in_channels, width=size.width if width is None else width, blocks=blocks, in_plane=in_plane
        )
        encoder = ViT(
            spatial_dims,
            in_channels,
            image_size=size.image_size if image_size is None else image_size,
            patch_size=1,
            channels=hidden,
            num_layers=size.num_layers if num_layers is None else num_layers,
            num_heads=max(1, hidden // 64) if num_heads is None else num_heads,
            mlp_ratio=mlp_ratio,
            backbone=resnet,
            class_token=False,
            dropout=dropout,
        )
        super().__init__(AxisSizes.of_strides([encoder.strides[-1]]))
        self.encoder = encoder
        self.bottom = ConvBlock(layers, hidden, 2 * widths[0])
        self.decoder = nn.ModuleList()  # coarsest first; the last one has no skip
        narrow = 2 * widths[0]
        for skip, wide in zip([*reversed(encoder.channels[:-1]), 0], widths, strict=True):
            self.decoder.append(ConvStage(layers, narrow + skip, wide))
            narrow = wide
        self.head = layers.conv(narrow, out_channels, kernel_size=3)
        for part in (self.bottom, self.decoder, self.head):
            initialize(part)

    def outputs(self, x: Tensor) -> list[Tensor]:
        size = x.shape[2:]
        *skips, x = self.encoder(x)
        x = self.bottom(x)  # (B, 2 × decoder_channels[0], I/16, …)
        for stage in self.decoder:
            if skips:
                skip = skips.pop()
                x = stage(torch.cat([resize(x, skip.shape[2:]), skip], dim=1))
            else:
                x = stage(resize(x, size))
        return [self.head(x)]
