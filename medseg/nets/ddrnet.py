"""DDRNet, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medseg.nets.blocks import Layers, PerAxis, initialize, resize, shrink_residuals
from medseg.nets.encoders.encoder import Encoder, plane_stride
from medseg.nets.encoders.resnet import BasicBlock, Bottleneck
from medseg.nets.network import AxisSizes, SegmentationNetwork
from medseg.nets.pyramids import pooled_norm

AUXILIARY_WEIGHT = 0.4


class DDRNet(SegmentationNetwork):
    """DDRNet: a branch that keeps the resolution beside one that goes on down; they exchange features on the way.

    Takes any size from `min_size` (64 in 2D, 32 in 3D by default) up; multiples of it need no padding. By default,
    DDRNet-23-slim, 15,261,090 parameters in 3D and 5,694,306 in 2D (one channel in, two out). DDRNet-23 has
    ``width=64, head_channels=128``; DDRNet-39 ``width=64, blocks=(3, 4, 6, 3), exchanges=2,
    head_channels=256``.

    Departs from the paper: in 3D the stem halves the resolution once, so that a patch of 96 × 96 × 96 voxels keeps
    three at the bottom; what is pooled over the image is normalized over channels, unless ``norm="batch"``,
    which is the paper's, is asked for.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        width: Channels of the stem; the fine branch has 2 times as many, the coarse one up to 16 times.
        blocks: Residual blocks of the four stages, the branches' own from the third on.
        exchanges: How often the branches exchange features in the third stage, whose blocks are divided among
            these; once more after the fourth.
        context_channels: Of each scale of the pyramid at the end of the coarse branch.
        head_channels: Before the classification.
        stem_stride: 4 as in the paper, or 2: by how much the stem is coarser than the image; the fine branch is
            twice, the coarse one sixteen times as coarse. None: 4 in 2D and in plane, 2 in 3D.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        activation: ``relu``, ``leakyrelu``, ``elu``, ``prelu``, ``gelu`` or ``silu``.
        in_plane: Whether strides and poolings leave the third axis alone, for thick slices.
        deep_supervision: Whether training also scores the fine branch after the third stage.

    Reference:
        Pan et al. 2022, arXiv:2101.06085, doi:10.1109/TITS.2022.3228042.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        width: int = 32,
        blocks: Sequence[int] = (2, 2, 2, 2),
        exchanges: int = 1,
        context_channels: int = 128,
        head_channels: int = 64,
        stem_stride: int | None = None,
        norm: str = "auto",
        activation: str = "relu",
        in_plane: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        if stem_stride is None:
            stem_stride = 4 if spatial_dims == 2 or in_plane else 2
        encoder = DualResNet(
            spatial_dims, in_channels, width=width, blocks=blocks, exchanges=exchanges, stem_stride=stem_stride,
            norm=norm, activation=activation, in_plane=in_plane,
        )  # fmt: skip
        super().__init__(
            AxisSizes.of_strides([encoder.strides[-1]]),
            extra_weights=[AUXILIARY_WEIGHT] if deep_supervision else [],
        )
        layers = Layers(spatial_dims, norm=norm, activation=activation)
        self.encoder = encoder
        fine, _, coarse = encoder.channels
        joined = 2 * fine
        self.pyramid = DAPPM(layers, coarse, context_channels, joined, in_plane=in_plane)
        self.head = _head(layers, joined, head_channels, out_channels)
        self.extra_heads = nn.ModuleList()
        if deep_supervision:
            self.extra_heads.append(_head(layers, fine, head_channels, out_channels))
        for part in (self.pyramid, self.head, self.extra_heads):
            initialize(part)

    def outputs(self, x: Tensor) -> list[Tensor]:
        # (B, 2 × width, I/8, …), (B, 4 × width, I/8, …), (B, 16 × width, I/64, …)
        early, fine, coarse = self.encoder(x)
        logits = self.head(fine + resize(self.pyramid(coarse), fine.shape[2:]))
        extra = [head(early) for head in self.extra_heads] if self.training else []
        return [resize(logits, x.shape[2:]), *extra]


class DualResNet(Encoder):
    """DDRNet's two branches, as they are also trained to classify.

    Features, not yet activated: of the fine branch after the third stage, and of either branch at its end. Modules
    are named as in the authors' checkpoints, without what only classifies: 4,547,232 parameters with a width of
    32 (2D, three channels, batch norm).

    Args: as `DDRNet`.
    """

    unused = ("down5.", "last_layer.", "linear.")

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        width: int,
        blocks: Sequence[int],
        exchanges: int,
        stem_stride: int,
        norm: str,
        activation: str,
        in_plane: bool,
    ) -> None:
        if stem_stride not in (2, 4):
            raise ValueError(f"stem_stride is {stem_stride}; it must be 2 or 4")
        if len(blocks) != 4 or exchanges < 1 or blocks[2] % exchanges:
            raise ValueError(
                f"blocks {tuple(blocks)} with exchanges {exchanges}; give four, the third divisible by exchanges"
            )
        fine = 2 * width
        super().__init__(
            [fine, 2 * fine, 16 * width],
            [plane_stride(stem_stride * n, spatial_dims, in_plane=in_plane) for n in (2, 2, 16)],
            spatial_dims,
        )
        self.layers = Layers(spatial_dims, norm=norm, activation=activation)
        self.halved = plane_stride(2, spatial_dims, in_plane=in_plane)
        self.relu = nn.ModuleDict()  # before each of the parts that begin with an activation, by its name

        self.conv1 = nn.Sequential(
            *self._stem(in_channels, width, stride=self.halved),
            *self._stem(width, width, stride=self.halved if stem_stride == 4 else 1),
        )
        self.layer1 = self._stage(BasicBlock, width, width, blocks[0])
        self._add("layer2", width, self._stage(BasicBlock, width, fine, blocks[1], stride=self.halved))
        self.stages = [f"3_{n + 1}" for n in range(exchanges)] if exchanges > 1 else ["3"]
        channels = fine
        for n, name in enumerate(self.stages):
            number = blocks[2] // exchanges
            self._add_stage(name, channels, 4 * width, fine, number, halvings=0 if n else 1, below=1)
            channels = 4 * width
        self._add_stage("4", channels, 8 * width, fine, blocks[3], halvings=1, below=2)
        self.stages.append("4")
        self._add("layer5_", fine, self._stage(WideBottleneck, fine, fine, 1))
        self._add("layer5", 8 * width, self._stage(WideBottleneck, 8 * width, 8 * width, 1, stride=self.halved))
        initialize(self)
        if norm == "none":
            shrink_residuals([m.last_conv for m in self.modules() if isinstance(m, BasicBlock | Bottleneck)])

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = coarse = self._run("layer2", self.layer1(self.conv1(x)))  # (B, 2 × width, I/8, …)
        for name in self.stages:
            early = fine
            coarse = self._run(f"layer{name}", coarse)
            fine = self._run(f"layer{name}_", fine)
            raised = self._run(f"compression{name}", coarse)
            coarse = coarse + self._run(f"down{name}", fine)
            fine = fine + resize(raised, fine.shape[2:])
        return [early, self._run("layer5_", fine), self._run("layer5", coarse)]

    def _run(self, name: str, x: Tensor) -> Tensor:
        # Activations work in place; a sum still needs x.
        return self.get_submodule(name)(self.relu[name](x.clone()))

    def _add(self, name: str, channels: int, part: nn.Module) -> None:
        self.relu[name] = self.layers.make_activation(channels)
        self.add_module(name, part)

    def _add_stage(
        self, name: str, entering: int, coarse: int, fine: int, number: int, *, halvings: int, below: int
    ) -> None:
        """A stage of both branches, and the exchange of features that ends it.

        Args:
            name: What the names of its parts end with.
            entering: Channels of the coarse branch before it.
            coarse: Channels of the coarse branch.
            fine: Channels of the fine branch.
            number: Of residual blocks.
            halvings: Of the coarse branch in this stage.
            below: Halvings between the branches at its end.
        """
        stride = self.halved if halvings else 1
        self._add(f"layer{name}", entering, self._stage(BasicBlock, entering, coarse, number, stride=stride))
        self._add(f"layer{name}_", fine, self._stage(BasicBlock, fine, fine, number))
        self._add(f"compression{name}", coarse, nn.Sequential(*self._conv(coarse, fine, kernel_size=1)))
        widths = [fine, *(coarse // 2 ** (below - n - 1) for n in range(below))]
        parts: list[nn.Module] = []
        for n in range(below):
            if n:
                parts.append(self.layers.make_activation(widths[n]))
            parts.extend(self._conv(widths[n], widths[n + 1], kernel_size=3, stride=self.halved))
        self._add(f"down{name}", fine, nn.Sequential(*parts))

    def _stage(
        self, block: type[BasicBlock] | type[Bottleneck], entering: int, width: int, number: int, *, stride: PerAxis = 1
    ) -> nn.Sequential:
        """Residual blocks, the last one without the activation that would follow it."""
        wide = width * block.expansion
        stage = nn.Sequential(
            *[block(self.layers, wide if n else entering, width, stride=1 if n else stride) for n in range(number)]
        )
        setattr(stage[-1], "relu3" if issubclass(block, Bottleneck) else "relu2", nn.Identity())
        return stage

    def _stem(self, in_channels: int, out_channels: int, *, stride: PerAxis) -> list[nn.Module]:
        # The published convolutions have a bias, though a norm follows that takes it away.
        conv = self.layers.conv(in_channels, out_channels, kernel_size=3, stride=stride)
        return [conv, self.layers.make_norm(out_channels), self.layers.make_activation(out_channels)]

    def _conv(self, in_channels: int, out_channels: int, *, kernel_size: int, stride: PerAxis = 1) -> list[nn.Module]:
        bias = self.layers.norm == "none"
        conv = self.layers.conv(in_channels, out_channels, kernel_size=kernel_size, stride=stride, bias=bias)
        return [conv, self.layers.make_norm(out_channels)]


class WideBottleneck(Bottleneck):
    """The bottleneck that ends both branches: its output is twice, not four times, as wide as its 3 × 3 convolution."""

    expansion = 2


class DAPPM(nn.Module):
    """Deep aggregation pyramid pooling: averages over wider and wider windows, each refined together with the last.

    Args:
        layers: What the network's layers agree on.
        in_channels: Of the input, not yet activated.
        channels: Of each scale.
        out_channels: Of the output.
        windows: Length of the windows; each is half as many voxels from the next. The whole image is one more.
        in_plane: Whether the third axis is left alone.
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        channels: int,
        out_channels: int,
        *,
        windows: Sequence[int] = (5, 9, 17),
        in_plane: bool = False,
    ) -> None:
        super().__init__()
        dims = layers.spatial_dims
        average: Any = nn.AvgPool2d if dims == 2 else nn.AvgPool3d
        pad: Any = nn.ConstantPad2d if dims == 2 else nn.ConstantPad3d
        pools: list[nn.Module] = []
        for window in windows:
            kernel, stride = (plane_stride(n, dims, in_plane=in_plane) for n in (window, window // 2))
            # Torch's 3D pooling refuses windows longer than the image, however much it pads it.
            margins = [n // 2 for n in reversed(kernel) for _ in range(2)]
            pools.append(nn.Sequential(pad(margins, 0.0), average(kernel, stride=stride)))
        pools.append(nn.AdaptiveAvgPool2d(1) if dims == 2 else nn.AdaptiveAvgPool3d((1, 1, None if in_plane else 1)))
        self.scale0 = PreActivated(layers, in_channels, channels, kernel_size=1)
        self.scales = nn.ModuleList(
            nn.Sequential(
                pool,
                pooled_norm(layers, in_channels),
                layers.make_activation(in_channels),
                layers.conv(in_channels, channels, kernel_size=1, bias=layers.norm == "none"),
            )
            for pool in pools
        )
        self.refine = nn.ModuleList(PreActivated(layers, channels, channels, kernel_size=3) for _ in pools)
        joined = (1 + len(pools)) * channels
        self.compression = PreActivated(layers, joined, out_channels, kernel_size=1)
        self.shortcut = PreActivated(layers, in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.scale0(x)]
        for scale, refine in zip(self.scales, self.refine, strict=True):
            found.append(refine(found[-1] + resize(scale(x), x.shape[2:])))
        return self.compression(torch.cat(found, dim=1)) + self.shortcut(x)


class PreActivated(nn.Module):
    """Norm, activation, convolution, of features that others still read."""

    def __init__(self, layers: Layers, in_channels: int, out_channels: int, *, kernel_size: int) -> None:
        super().__init__()
        self.norm = layers.make_norm(in_channels)
        self.activation = layers.make_activation(in_channels)
        bias = layers.norm == "none"
        self.conv = layers.conv(in_channels, out_channels, kernel_size=kernel_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone() if isinstance(self.norm, nn.Identity) else self.norm(x)  # the activation works in place
        return self.conv(self.activation(x))


def _head(layers: Layers, in_channels: int, hidden: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        PreActivated(layers, in_channels, hidden, kernel_size=3),
        layers.make_norm(hidden),
        layers.make_activation(hidden),
        layers.head(hidden, out_channels),
    )
