"""U-Net, in 2D and 3D: the paper's, nnU-Net's plain one, and what lies between, by arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import nn

from medseg.nets.blocks import (
    ConvStage,
    Interpolation,
    Layers,
    Padding,
    PerAxis,
    TransposedConv,
    per_axis,
    per_level,
    projection,
)
from medseg.nets.network import AxisSizes
from medseg.nets.u_shape import Decoder, UShaped


class UNet(UShaped):
    """U-Net: an encoder that halves the resolution, a decoder that restores it, skips between equals.

    Takes any size from `min_size` (the product of the strides, 16 by default) up; multiples of it need no
    padding. By default 16,544,130 parameters in 3D and 5,685,058 in 2D (one channel in, two out).

    Departs from the paper by default: convolutions keep the size, are normalized, have no bias, and
    strided ones downsample; LeakyReLU; fewer channels. The paper's own is
    ``UNet(2, 1, 2, channels=(64, 128, 256, 512, 1024), norm="none", activation="relu",
    downsample="maxpool", padding="valid")`` with 31,030,658 parameters; its logits are smaller than the
    input (572 → 388), so it cannot be trained by a workflow; ``padding="same"`` can. nnU-Net's plain
    U-Net adds ``bias=True, deep_supervision=True`` to the defaults, and a head on the coarsest decoder
    level, which its loss gives the weight 0 and which is left out here.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        channels: Of each level, finest first.
        strides: Between one level and the next; one number, or an entry a step, which may differ by axis.
        kernel_sizes: One number, or an entry a level, which may differ by axis.
        convs_per_stage: One number, or an entry a level.
        decoder_convs_per_stage: Likewise, for all levels but the deepest; None: as in the encoder.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``leakyrelu``, ``relu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        dropout: Probability that a channel is dropped after an activation.
        bias: Of the convolutions; None: where no norm follows.
        residual: Whether a shortcut leads around each stage of the encoder.
        downsample: ``conv`` (the first convolution of a level is strided) or ``maxpool``.
        upsample: ``transposed`` or ``interpolate``.
        padding: ``same`` or ``valid``.
        deep_supervision: Whether training also scores the decoder's lower levels but the coarsest, each
            with half the weight of the one above.

    Reference:
        Ronneberger et al. 2015, arXiv:1505.04597; Çiçek et al. 2016, arXiv:1606.06650 (3D);
        Isensee et al. 2021, doi:10.1038/s41592-020-01008-z (nnU-Net).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (32, 64, 128, 256, 320),
        strides: int | Sequence[PerAxis] = 2,
        kernel_sizes: int | Sequence[PerAxis] = 3,
        convs_per_stage: int | Sequence[int] = 2,
        decoder_convs_per_stage: int | Sequence[int] | None = None,
        norm: str = "auto",
        activation: str = "leakyrelu",
        dropout: float = 0.0,
        bias: bool | None = None,
        residual: bool = False,
        downsample: Literal["conv", "maxpool"] = "conv",
        upsample: Literal["transposed", "interpolate"] = "transposed",
        padding: Padding = "same",
        deep_supervision: bool = False,
    ) -> None:
        depth = len(channels) - 1
        if depth < 1:
            raise ValueError(f"channels {tuple(channels)}; a U-Net has at least two levels")
        if padding == "valid" and (residual or deep_supervision or downsample != "maxpool"):
            raise ValueError("padding 'valid' goes with downsample 'maxpool', without residual and deep_supervision")
        _check_choice("downsample", downsample, ("conv", "maxpool"))
        _check_choice("upsample", upsample, ("transposed", "interpolate"))
        steps = [per_axis(s, spatial_dims) for s in per_level("strides", strides, depth)]
        kernels = [per_axis(k, spatial_dims) for k in per_level("kernel_sizes", kernel_sizes, depth + 1)]
        convs = per_level("convs_per_stage", convs_per_stage, depth + 1)
        up_convs = convs[:-1]
        if decoder_convs_per_stage is not None:
            up_convs = per_level("decoder_convs_per_stage", decoder_convs_per_stage, depth)

        layers = Layers(spatial_dims, norm=norm, activation=activation, dropout=dropout, bias=bias, padding=padding)
        encoder: list[nn.Module] = []
        for n, width in enumerate(channels):
            narrow = channels[n - 1] if n else in_channels
            step = steps[n - 1] if n else (1,) * spatial_dims
            pooled = n > 0 and downsample == "maxpool"
            stride = 1 if pooled else step
            shortcut = projection(layers, narrow, width, stride=stride) if residual else None
            stage = ConvStage(
                layers, narrow, width, num_convs=convs[n], kernel_size=kernels[n], stride=stride, shortcut=shortcut
            )
            encoder.append(nn.Sequential(layers.max_pool(step), stage) if pooled else stage)

        decoder = Decoder(
            layers,
            channels,
            strides=steps,
            kernel_sizes=kernels,
            convs_per_stage=up_convs,
            make_up=TransposedConv if upsample == "transposed" else Interpolation,
        )
        sizes = _input_sizes(steps, kernels, convs, up_convs, padding)
        super().__init__(
            sizes, layers, out_channels, encoder=encoder, decoder=decoder, deep_supervision=deep_supervision
        )


def _input_sizes(
    steps: Sequence[Sequence[int]],
    kernels: Sequence[Sequence[int]],
    convs: Sequence[int],
    up_convs: Sequence[int],
    padding: Padding,
) -> list[AxisSizes]:
    """For each axis the input sizes that every stride divides and that leave an output."""
    sizes = []
    for axis in range(len(steps[0])):
        lost = [kernel[axis] - 1 if padding == "valid" else 0 for kernel in kernels]
        sizes.append(
            _axis_sizes(
                [step[axis] for step in steps],
                [n * loss for n, loss in zip(convs, lost, strict=True)],
                [n * loss for n, loss in zip(up_convs, lost[:-1], strict=True)],
            )
        )
    return sizes


def _axis_sizes(strides: Sequence[int], down_loss: Sequence[int], up_loss: Sequence[int]) -> AxisSizes:
    """From the voxels that the convolutions of each stage take away.

    Both input and output size are linear in the size at the bottom; the smallest bottom counts that
    leaves a voxel at each level.
    """

    def grown(bottom: int) -> tuple[int, int]:
        size, smallest = bottom, bottom
        for stride, loss in zip(reversed(strides), reversed(up_loss), strict=True):
            size = size * stride - loss
            smallest = min(smallest, size)
        return size, smallest

    bottom = 1
    while grown(bottom)[1] < 1:
        bottom += 1
    size = bottom + down_loss[-1]
    for stride, loss in zip(reversed(strides), reversed(down_loss[:-1]), strict=True):
        size = size * stride + loss
    multiple = math.prod(strides)
    return AxisSizes(multiple, minimum=size, offset=size % multiple, margin=size - grown(bottom)[0])


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
