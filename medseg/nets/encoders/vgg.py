"""VGG, in 2D and 3D: stages of 3 × 3 convolutions with max-pooling between them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice

from torch import Tensor, nn

from medseg.nets.blocks import Layers, PerAxis, initialize, per_level
from medseg.nets.encoders.encoder import Encoder, plane_stride

VGG16_CHANNELS = (64, 128, 256, 512, 512)
VGG16_CONVS = (2, 2, 3, 3, 3)


class VGG(Encoder):
    """VGG: stages of 3 × 3 convolutions, each at half the resolution of the one before; VGG-16 by default.

    Its features are those of each stage before its pooling, then those after the last one, at 1/32; or, as other
    encoders have them, those after each pooling. With a smaller `output_stride` the last poolings keep the
    resolution, and the convolutions behind them are dilated. Modules are named as in torchvision's ``vgg16`` (with
    ``norm="none"``) and ``vgg16_bn`` (with a norm); with a norm, too, the convolutions keep their bias, as theirs
    do. Without the classifier VGG-16 has 14,714,688 parameters in 2D, with batch norm 14,723,136.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        channels: Of each stage, finest first.
        convs_per_stage: One number, or an entry a stage; (1, 1, 2, 2, 2) makes VGG-11, (2, 2, 4, 4, 4) VGG-19.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``prelu``, ``elu``, ``gelu`` or ``silu``.
        fc_channels: Of the classifier's two hidden layers, made convolutions, after the last pooling; the
            paper's have 4096; 0: left out.
        fc_kernel_size: Of the first of them; 7 in the paper.
        dropout: Probability that a unit of these two layers is dropped; 0.5 in the paper.
        in_plane: Whether the third axis keeps its resolution, and is not dilated along.
        output_stride: Of the last feature, a power of 2; None: every pooling halves the resolution. Poolings that
            do not are 3 × 3, as in DeepLab v1.
        pooled: Whether the features are those after each pooling alone.

    Reference:
        Simonyan and Zisserman 2015, arXiv:1409.1556; Long et al. 2015, arXiv:1411.4038 (the classifier).
    """

    unused = ("classifier.",)

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        channels: Sequence[int] = VGG16_CHANNELS,
        convs_per_stage: int | Sequence[int] = VGG16_CONVS,
        norm: str = "auto",
        activation: str = "relu",
        fc_channels: int = 0,
        fc_kernel_size: PerAxis = 7,
        dropout: float = 0.0,
        in_plane: bool = False,
        output_stride: int | None = None,
        pooled: bool = False,
    ) -> None:
        depth = len(channels)
        if depth < 1:
            raise ValueError("channels is empty; VGG has at least one stage")
        convs = per_level("convs_per_stage", convs_per_stage, depth)
        if min(convs) < 1:
            raise ValueError(f"convs_per_stage {convs}; a stage has at least 1")
        possible = [2**n for n in range(1, depth + 1)]
        if output_stride not in (None, *possible):
            raise ValueError(f"output_stride is {output_stride}; it must be one of {', '.join(map(str, possible))}")
        strides = [min(2**n, output_stride or 2**n) for n in range(depth + 1)]
        on_axes = partial(plane_stride, spatial_dims=spatial_dims, in_plane=in_plane)
        last = fc_channels or channels[-1]
        super().__init__(
            [*channels[:-1], last] if pooled else [*channels, last],
            [on_axes(stride) for stride in strides[pooled:]],
            spatial_dims,
        )
        self.convs_per_stage = convs
        self.pooled = pooled
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        parts: list[nn.Module] = []
        self._stages: list[tuple[int, int]] = []  # where each begins in `features`, and where its pooling lies
        width = in_channels
        for n, (out_channels, num_convs) in enumerate(zip(channels, convs, strict=True)):
            start = len(parts)
            for _ in range(num_convs):
                parts += conv_layers(layers, width, out_channels, dilation=on_axes(2**n // strides[n]))
                width = out_channels
            self._stages.append((start, len(parts)))
            strided = strides[n + 1] > strides[n]
            parts.append(layers.max_pool(on_axes(2)) if strided else dense_pool(on_axes(3)))
        self.features = nn.Sequential(*parts)
        self.classifier = (
            hidden_layers(layers, width, fc_channels, kernel_size=fc_kernel_size, dropout=dropout)
            if fc_channels
            else None
        )
        initialize(self)

    def stage(self, n: int, x: Tensor) -> Tensor:
        """The convolutions of one stage, without its pooling."""
        for layer in islice(self.features, *self._stages[n]):
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> list[Tensor]:
        before, after = [], []
        for n, (_, end) in enumerate(self._stages):
            x = self.stage(n, x)  # (B, channels[n], I / 2^n, …)
            before.append(x)
            x = self.features[end](x)
            after.append(x)
        last = x if self.classifier is None else self.classifier(x)
        return [*after[:-1], last] if self.pooled else [*before, last]


def conv_layers(layers: Layers, in_channels: int, out_channels: int, *, dilation: PerAxis = 1) -> list[nn.Module]:
    """A convolution with its norm, where there is one, and its activation: modules in a row, as torchvision has them."""
    norm = [] if layers.norm == "none" else [layers.make_norm(out_channels)]
    return [
        layers.conv(in_channels, out_channels, kernel_size=3, dilation=dilation),
        *norm,
        layers.make_activation(out_channels),
    ]


def hidden_layers(
    layers: Layers,
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: PerAxis,
    dropout: float,
    dilation: PerAxis = 1,
) -> nn.Sequential:
    """The classifier's two hidden layers as convolutions, modules in a row, as torchvision has them."""
    return nn.Sequential(
        layers.conv(in_channels, out_channels, kernel_size=kernel_size, dilation=dilation),  # fc6
        layers.make_activation(out_channels),
        nn.Dropout(dropout),
        layers.conv(out_channels, out_channels, kernel_size=1),  # fc7
        layers.make_activation(out_channels),
        nn.Dropout(dropout),
    )


def dense_pool(kernel: Sequence[int]) -> nn.Module:
    """Max-pooling that keeps the resolution; kernels are odd."""
    pool = nn.MaxPool2d if len(kernel) == 2 else nn.MaxPool3d
    return pool(tuple(kernel), stride=1, padding=tuple(k // 2 for k in kernel))
