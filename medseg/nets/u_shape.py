"""What U-Net, Attention U-Net and nnU-Net's residual-encoder U-Net have in common: the way down, up, and the skips."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from medseg.nets.blocks import ConvStage, Layers, PerAxis, TransposedConv, crop_center, initialize
from medseg.nets.network import AxisSizes, SegmentationNetwork


class UShaped(SegmentationNetwork):
    """An encoder whose features at each resolution reach the decoder's stage of that resolution.

    Args:
        sizes: What input sizes it computes on, for each axis.
        layers: What its layers agree on.
        out_channels: Classes or regions.
        encoder: A stage a level, finest first.
        decoder: What joins their features.
        deep_supervision: Whether training also scores the decoder's lower levels but the coarsest, each with
            half the weight of the one above, as nnU-Net does.
    """

    def __init__(
        self,
        sizes: Sequence[AxisSizes],
        layers: Layers,
        out_channels: int,
        *,
        encoder: Sequence[nn.Module],
        decoder: Decoder,
        deep_supervision: bool,
    ) -> None:
        extra = decoder.channels[1:-1] if deep_supervision else ()
        super().__init__(sizes, extra_weights=[0.5**n for n in range(1, len(extra) + 1)])
        self.encoder = nn.ModuleList(encoder)
        self.decoder = decoder
        self.head = layers.head(decoder.channels[0], out_channels)
        self.extra_heads = nn.ModuleList(layers.head(channels, out_channels) for channels in extra)
        initialize(self)

    def outputs(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.encoder:
            x = stage(x)  # (B, channels[n], I / 2^n, …) with strides of 2
            features.append(x)
        heads = [self.head, *self.extra_heads] if self.training else [self.head]
        levels = self.decoder(features, len(heads))
        return [head(level) for head, level in zip(heads, levels, strict=True)]


class Decoder(nn.Module):
    """From the deepest features up, level by level, each joined with what the encoder found at the same resolution.

    Args:
        layers: What the network's layers agree on.
        channels: Of each level of the encoder, finest first; the decoder's are the same.
        strides: Between one level and the next.
        kernel_sizes: Of each level's convolutions.
        convs_per_stage: Of each level but the deepest.
        make_up: Makes the upsampling of (layers, in_channels, out_channels, stride).
        gates: For each level but the deepest a module that takes the encoder's features and the decoder's of
            the level below, and gives what is joined; None: the encoder's features as they are.
    """

    def __init__(
        self,
        layers: Layers,
        channels: Sequence[int],
        *,
        strides: Sequence[PerAxis],
        kernel_sizes: Sequence[PerAxis],
        convs_per_stage: Sequence[int],
        make_up: Callable[..., nn.Module] = TransposedConv,
        gates: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels[:-1])
        self.gates = None if gates is None else nn.ModuleList(gates)
        self.ups = nn.ModuleList()  # like the others in the order of the levels, finest first
        self.stages = nn.ModuleList()
        for n, width in enumerate(self.channels):
            self.ups.append(make_up(layers, channels[n + 1], width, stride=strides[n]))
            self.stages.append(
                ConvStage(layers, 2 * width, width, num_convs=convs_per_stage[n], kernel_size=kernel_sizes[n])
            )

    def forward(self, features: list[Tensor], num_levels: int) -> list[Tensor]:
        """Decoded features of the finest levels.

        Args:
            features: The encoder's, (B, channels[n], I / 2^n, …) with strides of 2, finest first; they are taken
                off the list as they are used, so that nothing is kept longer than needed.
            num_levels: How many levels to give back.

        Returns:
            As `features`, finest first.
        """
        x = features.pop()
        levels = []
        for n in reversed(range(len(self.stages))):
            skip = features.pop() if self.gates is None else self.gates[n](features.pop(), x)
            x = self.ups[n](x)
            skip = crop_center(skip, x.shape[2:])  # larger than x only with valid convolutions
            x = self.stages[n](torch.cat([skip, x], dim=1))
            if n < num_levels:
                levels.append(x)
        return levels[::-1]
