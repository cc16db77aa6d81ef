"""The layers that networks are put together from, in 2D and 3D: convolution blocks, stages, upsampling, padding."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.nets.convolution import conv_class
from medseg.nets.normalization import GroupNorm
from medseg.registry import Registry

T = TypeVar("T")
Padding = Literal["same", "valid"]
PerAxis = int | Sequence[int]
"""One number for all axes, or one an axis."""

LEAKY_SLOPE = 0.01

NORMS: Registry[Callable[[int, int], nn.Module]] = Registry(
    "norm",
    {
        # Batch norm learns well from the many slices a 2D batch holds; a 3D batch holds two patches.
        "auto": lambda channels, dims: NORMS["instance" if dims == 3 else "batch"](channels, dims),
        # A group of one channel is instance norm, weights and all; on a CPU torch computes it at least twice as fast.
        "instance": lambda channels, _: GroupNorm(channels, channels),
        "batch": lambda channels, dims: (nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d)(channels),
        "group": lambda channels, _: GroupNorm(math.gcd(channels, 8), channels),
        "none": lambda *_: nn.Identity(),
    },
)
"""Makes a norm of (channels, spatial_dims)."""

# In place where autograd needs only the result: that halves what a block keeps for the backward pass.
ACTIVATIONS: Registry[Callable[[int], nn.Module]] = Registry(
    "activation",
    {
        "leakyrelu": lambda _: nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
        "relu": lambda _: nn.ReLU(inplace=True),
        "relu6": lambda _: nn.ReLU6(inplace=True),
        "elu": lambda _: nn.ELU(inplace=True),
        "prelu": nn.PReLU,
        "gelu": lambda _: nn.GELU(),
        "silu": lambda _: nn.SiLU(),
    },
)
"""Makes an activation for a number of channels."""


@dataclass(frozen=True)
class Layers:
    """What the layers of one network agree on.

    Args:
        spatial_dims: 2 or 3.
        norm: Name in NORMS.
        activation: Name in ACTIVATIONS.
        dropout: Probability that a channel is dropped after its activation.
        bias: Whether convolutions add one; None: only where no norm follows that would take it away again.
        padding: ``same`` or ``valid``.
    """

    spatial_dims: int
    norm: str = "auto"
    activation: str = "leakyrelu"
    dropout: float = 0.0
    bias: bool | None = None
    padding: Padding = "same"

    def __post_init__(self) -> None:
        if self.spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {self.spatial_dims}; it must be 2 or 3")
        if self.padding not in ("same", "valid"):
            raise ValueError(f"padding is {self.padding!r}; it must be 'same' or 'valid'")

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> nn.Module:
        """A convolution; with ``same`` padding, n voxels become n / stride where that divides."""
        if min(in_channels, out_channels) < 1:
            raise ValueError(f"a convolution from {in_channels} to {out_channels} channels; give at least 1 everywhere")
        kernel = per_axis(kernel_size, self.spatial_dims)
        strides = per_axis(stride, self.spatial_dims)
        dilations = per_axis(dilation, self.spatial_dims)
        padding = [0] * self.spatial_dims
        if self.padding == "same":
            spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
            padding = [max(0, (span - s + 1) // 2) for span, s in zip(spans, strides, strict=True)]
            if any(p and 2 * p >= span for p, span in zip(padding, spans, strict=True)):
                raise ValueError(f"kernel_size {kernel} cannot keep the size at stride {strides}; use odd kernels")
        return conv_class(self.spatial_dims)(
            in_channels, out_channels, kernel,
            stride=strides, padding=tuple(padding), dilation=dilations, groups=groups, bias=bias,
        )  # fmt: skip

    def make_norm(self, channels: int) -> nn.Module:
        return NORMS[self.norm](channels, self.spatial_dims)

    def make_activation(self, channels: int) -> nn.Module:
        return ACTIVATIONS[self.activation](channels)

    def make_dropout(self) -> nn.Module:
        return (nn.Dropout2d if self.spatial_dims == 2 else nn.Dropout3d)(self.dropout)

    def max_pool(self, stride: PerAxis) -> nn.Module:
        return (nn.MaxPool2d if self.spatial_dims == 2 else nn.MaxPool3d)(per_axis(stride, self.spatial_dims))

    def head(self, in_channels: int, out_channels: int) -> nn.Module:
        """The 1 × 1 convolution that gives the logits."""
        return self.conv(in_channels, out_channels, kernel_size=1)


class ConvBlock(nn.Sequential):
    """Convolution, norm, activation, dropout.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input.
        out_channels: Of the output.
        kernel_size: Of the convolution.
        stride: Of the convolution.
        dilation: Of the convolution.
        groups: Of the convolution; as many as channels make it depthwise.
        activate: Whether activation and dropout follow; not where a sum comes first.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: PerAxis = 3,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        groups: int = 1,
        activate: bool = True,
    ) -> None:
        bias = layers.norm == "none" if layers.bias is None else layers.bias
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["conv"] = layers.conv(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        parts["norm"] = layers.make_norm(out_channels)
        if activate:
            parts["activation"] = layers.make_activation(out_channels)
            if layers.dropout:
                parts["dropout"] = layers.make_dropout()
        super().__init__(parts)


class ConvStage(nn.Module):
    """Convolution blocks one after the other, with or without a shortcut around all of them.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input.
        out_channels: Of every block.
        num_convs: How many blocks.
        kernel_size: Of every convolution.
        stride: Of the first convolution.
        shortcut: What is summed with the last block before its activation, computed from the input.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        out_channels: int,
        *,
        num_convs: int = 2,
        kernel_size: PerAxis = 3,
        stride: PerAxis = 1,
        shortcut: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_convs < 1:
            raise ValueError(f"a stage of {num_convs} convolutions; it must have at least 1")
        blocks = []
        for n in range(num_convs):
            summed = shortcut is not None and n == num_convs - 1
            blocks.append(
                ConvBlock(
                    layers,
                    out_channels if n else in_channels,
                    out_channels,
                    kernel_size=kernel_size,
                    stride=1 if n else stride,
                    activate=not summed,
                )
            )
        self.blocks = nn.Sequential(*blocks)
        self.shortcut = shortcut
        self.activation = layers.make_activation(out_channels) if shortcut is not None else None

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None or self.activation is None:
            return self.blocks(x)
        return self.activation(self.blocks(x) + self.shortcut(x))


def projection(layers: Layers, in_channels: int, out_channels: int, *, stride: PerAxis = 1) -> nn.Module:
    """The shortcut of a residual stage: the input itself, or brought to the stage's channels and resolution."""
    if in_channels == out_channels and set(per_axis(stride, layers.spatial_dims)) == {1}:
        return nn.Identity()
    return ConvBlock(layers, in_channels, out_channels, kernel_size=1, stride=stride, activate=False)


class TransposedConv(nn.Sequential):
    """Upsampling learned: each voxel becomes a block of its own, without overlap."""

    def __init__(
        self, layers: Layers, in_channels: int, out_channels: int, *, stride: PerAxis, bias: bool = True
    ) -> None:
        conv: Any = nn.ConvTranspose2d if layers.spatial_dims == 2 else nn.ConvTranspose3d
        strides = per_axis(stride, layers.spatial_dims)
        super().__init__(conv(in_channels, out_channels, strides, stride=strides, bias=bias))


class Interpolation(nn.Module):
    """Upsampling by (bi-, tri-)linear interpolation, to other channels.

    The 1 × 1 convolution comes first: the two commute, and it then works on the smaller grid.
    """

    def __init__(self, layers: Layers, in_channels: int, out_channels: int, *, stride: PerAxis) -> None:
        super().__init__()
        self.conv = layers.conv(in_channels, out_channels, kernel_size=1)
        self.stride = tuple(float(s) for s in per_axis(stride, layers.spatial_dims))
        self.mode = "bilinear" if layers.spatial_dims == 2 else "trilinear"

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), scale_factor=self.stride, mode=self.mode)


def per_axis(value: PerAxis, spatial_dims: int) -> tuple[int, ...]:
    """One number for each axis.

    Raises:
        ValueError: If there are too many, too few, or one below 1.
    """
    values = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(values) != spatial_dims or min(values) < 1:
        raise ValueError(f"{value} for {spatial_dims} axes; give one positive number, or one an axis")
    return values


def per_level(name: str, value: int | Sequence[T], num_levels: int) -> tuple[int | T, ...]:
    """One entry for each level of a network; a single number holds for all.

    Raises:
        ValueError: If there are too many or too few.
    """
    if isinstance(value, int):
        return (value,) * num_levels
    if len(value) != num_levels:
        raise ValueError(f"{name} has {len(value)} entries; give {num_levels}, or one number for all")
    return tuple(value)


def pad_end(x: Tensor, size: Sequence[int]) -> Tensor:
    """Continue (B, C, I, J[, K]) to a size by repeating the last voxels.

    Repeating draws no edge that the anatomy does not have, and unlike mirroring works for any size.
    Only the far ends grow, so that coarse voxels keep covering whole blocks of the input.
    """
    missing = [wanted - n for wanted, n in zip(size, x.shape[2:], strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [amount for n in reversed(missing) for amount in (0, n)], mode="replicate")


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, I, J[, K]) (bi-, tri-)linearly interpolated to another size."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear" if x.dim() == 4 else "trilinear")


def crop_end(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first `size` voxels of (B, C, I, J[, K]): undoes `pad_end`."""
    return x[(slice(None), slice(None), *[slice(n) for n in size])]


def crop_center(x: Tensor, size: Sequence[int]) -> Tensor:
    """The middle `size` voxels of (B, C, I, J[, K])."""
    starts = [(n - wanted) // 2 for n, wanted in zip(x.shape[2:], size, strict=True)]
    middle = [slice(start, start + n) for start, n in zip(starts, size, strict=True)]
    return x[(slice(None), slice(None), *middle)]


def initialize(network: nn.Module) -> None:
    """Draw the weights of convolutions so that activations keep their variance; biases are 0.

    Transposed convolutions without overlap give each voxel one weight a channel, which torch's own
    rule miscounts.

    Reference:
        He et al. 2015, arXiv:1502.01852.
    """
    gain = nn.init.calculate_gain("leaky_relu", LEAKY_SLOPE)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            transposed = isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d)
            fan_in = module.in_channels if transposed else module.weight[0].numel()
            nn.init.normal_(module.weight, std=gain / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def shrink_residuals(last_convs: Sequence[nn.Module]) -> None:
    """Without norms each block would add as much to a sum as it holds; so all together do.

    Args:
        last_convs: The last convolution of each block that is added.
    """
    for conv in last_convs:
        with torch.no_grad():
            for tensor in conv.parameters():
                tensor.mul_(1 / math.sqrt(len(last_convs)))
