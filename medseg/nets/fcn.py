"""FCN-32s, FCN-16s and FCN-8s, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from medseg.nets.blocks import Layers, PerAxis, initialize
from medseg.nets.encoders.encoder import plane_stride
from medseg.nets.encoders.vgg import VGG, VGG16_CHANNELS, VGG16_CONVS
from medseg.nets.network import AxisSizes, SegmentationNetwork
from medseg.nets.unpooling import TransposedBilinear


class FCN(SegmentationNetwork):
    """FCN: a classifier, VGG-16, run as a convolution over the whole image; scores of finer poolings are summed in.

    FCN-8s, which is the default, scores the last three poolings: the coarsest scores are upsampled 2×,
    summed with those of the pooling above, twice, and then upsampled 8×. ``output_stride=16`` and 32 are
    FCN-16s and FCN-32s; each halving of it adds a pooling, down to 2.

    Takes any size from `min_size` (32 by default) up; multiples of it need no padding. By default
    59,367,494 parameters in 3D and 20,495,942 in 2D (one channel in, two out).

    Departs from the paper by default: the classifier's first layer is 3 × 3 and both have 1024 channels,
    which DeepLab found to do as well, and convolutions of the encoder are normalized; ``fc_channels=4096,
    fc_kernel_size=7, norm="none"`` is the paper's, with 134,489,759 parameters for 21 classes. Scores
    start random, not at 0; the image is not padded by 100 voxels, as no convolution shrinks it. Published
    weights of the classifier fit only the paper's.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        output_stride: How much coarser than the image the finest scores are; 8, 16, 32 or other powers of 2.
        channels: Of each stage of the encoder, finest first.
        convs_per_stage: One number, or an entry a stage.
        fc_channels: Of the classifier's two layers, fc6 and fc7.
        fc_kernel_size: Of fc6.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``prelu``, ``elu``, ``gelu`` or ``silu``.
        dropout: Probability that a unit of the classifier's layers is dropped.
        upsample: ``transposed`` (learned, starts as interpolation) or ``interpolate``.
        in_plane: Whether the third axis keeps its resolution, for thick slices.

    Reference:
        Long et al. 2015, arXiv:1411.4038; Chen et al. 2015, arXiv:1412.7062 (the smaller classifier).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        output_stride: int = 8,
        channels: Sequence[int] = VGG16_CHANNELS,
        convs_per_stage: int | Sequence[int] = VGG16_CONVS,
        fc_channels: int = 1024,
        fc_kernel_size: PerAxis = 3,
        norm: str = "auto",
        activation: str = "relu",
        dropout: float = 0.5,
        upsample: Literal["transposed", "interpolate"] = "transposed",
        in_plane: bool = False,
    ) -> None:
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
        strides = [2**n for n in range(len(channels), 0, -1)]
        if output_stride not in strides:
            raise ValueError(f"output_stride is {output_stride}; it must be one of {', '.join(map(str, strides))}")
        if upsample not in ("transposed", "interpolate"):
            raise ValueError(f"upsample is {upsample!r}; it must be one of transposed, interpolate")
        super().__init__(AxisSizes.of_strides([encoder.strides[-1]]))
        layers = Layers(spatial_dims)
        self.encoder = encoder
        self.pool = layers.max_pool(plane_stride(2, spatial_dims, in_plane=in_plane))
        num_skips = strides.index(output_stride)
        scored = [encoder.channels[-1], *reversed(channels[-1 - num_skips : -1])]
        self.scores = nn.ModuleList(layers.head(width, out_channels) for width in scored)  # coarsest first
        initialize(self.scores)

        def up(by: int) -> nn.Module:
            stride = plane_stride(by, spatial_dims, in_plane=in_plane)
            if upsample == "transposed":
                return TransposedBilinear(layers, out_channels, stride=stride)
            return nn.Upsample(
                scale_factor=tuple(map(float, stride)), mode="bilinear" if spatial_dims == 2 else "trilinear"
            )

        self.ups = nn.ModuleList([*(up(2) for _ in range(num_skips)), up(output_stride)])

    def outputs(self, x: Tensor) -> list[Tensor]:
        *stages, coarsest = self.encoder(x)
        stages.pop()  # its pooling is what `coarsest` was computed from
        scores = self.scores[0](coarsest)
        for score, up in zip(self.scores[1:], self.ups[:-1], strict=True):
            scores = up(scores) + score(self.pool(stages.pop()))  # twice as fine each time
        return [self.ups[-1](scores)]
