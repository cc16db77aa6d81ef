"""VGG, in 2D and 3D: stages of 3 × 3 convolutions with max-pooling between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from torch import Tensor, nn

from medseg.nets.blocks import Layers, PerAxis, initialize, per_level
from medseg.nets.encoders.encoder import Encoder, plane_stride

VGG16_CHANNELS = (64, 128, 256, 512, 512)
VGG16_CONVS = (2, 2, 3, 3, 3)


class VGG(Encoder):
    """VGG: stages of 3 × 3 convolutions, each at half the resolution of the one before; VGG-16 by default.

    Its features are those of each stage before its pooling, then those after the last one, at 1/32.
    Modules are named as in torchvision's ``vgg16`` (with ``norm="none"``) and ``vgg16_bn`` (with a norm);
    with a norm, too, the convolutions keep their bias, as theirs do. Without the classifier VGG-16 has
    14,714,688 parameters in 2D, with batch norm 14,723,136.

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
        in_plane: Whether the third axis keeps its resolution.

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
    ) -> None:
        depth = len(channels)
        if depth < 1:
            raise ValueError("channels is empty; VGG has at least one stage")
        convs = per_level("convs_per_stage", convs_per_stage, depth)
        if min(convs) < 1:
            raise ValueError(f"convs_per_stage {convs}; a stage has at least 1")
        super().__init__(
            [*channels, fc_channels or channels[-1]],
            [plane_stride(2**n, spatial_dims, in_plane=in_plane) for n in range(depth + 1)],
            spatial_dims,
        )
        self.convs_per_stage = convs
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        parts: list[nn.Module] = []
        self._stages: list[tuple[int, int]] = []  # where each begins in `features`, and where its pooling lies
        width = in_channels
        for out_channels, num_convs in zip(channels, convs, strict=True):
            start = len(parts)
            for _ in range(num_convs):
                parts += conv_layers(layers, width, out_channels)
                width = out_channels
            self._stages.append((start, len(parts)))
            parts.append(layers.max_pool(plane_stride(2, spatial_dims, in_plane=in_plane)))
        self.features = nn.Sequential(*parts)
        self.classifier = _hidden_layers(layers, width, fc_channels, fc_kernel_size, dropout) if fc_channels else None
        initialize(self)

    def stage(self, n: int, x: Tensor) -> Tensor:
        """The convolutions of one stage, without its pooling."""
        for layer in islice(self.features, *self._stages[n]):
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for n, (_, end) in enumerate(self._stages):
            x = self.stage(n, x)  # (B, channels[n], I / 2^n, …)
            features.append(x)
            x = self.features[end](x)
        return [*features, x if self.classifier is None else self.classifier(x)]


def conv_layers(layers: Layers, in_channels: int, out_channels: int) -> list[nn.Module]:
    """A convolution with its norm, where there is one, and its activation: modules in a row, as torchvision has them."""
    norm = [] if layers.norm == "none" else [layers.make_norm(out_channels)]
    return [
        layers.conv(in_channels, out_channels, kernel_size=3),
        *norm,
        layers.make_activation(out_channels),
    ]


def _hidden_layers(
    layers: Layers, in_channels: int, out_channels: int, kernel_size: PerAxis, dropout: float
) -> nn.Sequential:
    return nn.Sequential(
        layers.conv(in_channels, out_channels, kernel_size=kernel_size),  # fc6
        layers.make_activation(out_channels),
        nn.Dropout(dropout),
        layers.conv(out_channels, out_channels, kernel_size=1),  # fc7
        layers.make_activation(out_channels),
        nn.Dropout(dropout),
    )
