"""Networks of MONAI behind our interface: any input size, outputs as lists, argument names as in our own.

Their weights keep MONAI's names, after ``network.``. MONAI itself is imported when one of them is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medseg.nets.blocks import Layers, PerAxis, per_axis, per_level
from medseg.nets.convolution import with_exact_convolutions
from medseg.nets.network import AxisSizes, SegmentationNetwork
from medseg.nets.transformer import resize_positions, to_grid, to_tokens
from medseg.registry import Registry

MONAI_NORMS: Registry[Callable[[int, bool], Any]] = Registry(
    "norm",
    {
        "auto": lambda dims, affine: MONAI_NORMS["instance" if dims == 3 else "batch"](dims, affine),
        "instance": lambda _, affine: ("INSTANCE", {"affine": affine}),
        "batch": lambda *_: "BATCH",
        "group": lambda *_: ("GROUP", {"num_groups": 8}),
        "none": lambda *_: "",
    },
)
"""What MONAI calls our norms, of (spatial_dims, whether an instance norm has weights)."""

MEDNEXT_SIZES: Registry[tuple[Sequence[int], Sequence[int]]] = Registry(
    "MedNeXt size",
    {
        "S": ((2, 2, 2, 2), (2, 2, 2, 2)),
        "B": ((2, 3, 4, 4), (2, 2, 2, 2)),
        "M": ((2, 3, 4, 4), (3, 4, 4, 4)),
        "L": ((3, 4, 8, 8), (3, 4, 8, 8)),
    },
)
"""Of the paper's networks: by how much each encoder stage expands, and its blocks; the decoder mirrors them."""


class DynUNet(SegmentationNetwork):
    """MONAI's DynUNet: nnU-Net's plain U-Net as MONAI built it, or with residual blocks in its encoder.

    Takes any size from `min_size` (the product of the strides, 16 by default) up; multiples of it need no
    padding. By default 16,543,650 parameters in 3D and 5,684,578 in 2D (one channel in, two out). Departs from
    MONAI's in that deep supervision gives each level at its own resolution.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        channels: Of each level, finest first; at least three.
        strides: Between one level and the next; one number, or an entry a step, which may differ by axis.
        kernel_sizes: One number, or an entry a level, which may differ by axis.
        norm: ``auto`` (instance in 3D, batch in 2D), ``instance``, ``batch``, ``group`` or ``none``.
        dropout: Probability that a value is dropped after a convolution.
        residual: Whether its blocks learn residuals.
        deep_supervision: Whether training also scores the decoder's lower levels but the coarsest, each
            with half the weight of the one above.

    Reference:
        Isensee et al. 2018, arXiv:1809.10486; Futrega et al. 2021, arXiv:2110.03352.
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
        norm: str = "auto",
        dropout: float = 0.0,
        residual: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        from monai.networks.nets.dynunet import DynUNet as MonaiDynUNet

        depth = len(channels) - 1
        if depth < 2:
            raise ValueError(f"channels {tuple(channels)}; a DynUNet has at least three levels")
        steps = [per_axis(s, spatial_dims) for s in per_level("strides", strides, depth)]
        kernels = [per_axis(k, spatial_dims) for k in per_level("kernel_sizes", kernel_sizes, depth + 1)]
        num_extra = depth - 2 if deep_supervision else 0
        super().__init__(
            AxisSizes.of_strides(steps),
            extra_weights=[0.5**n for n in range(1, num_extra + 1)],
        )
        self.network = MonaiDynUNet(
            spatial_dims,
            in_channels,
            out_channels,
            kernel_size=kernels,
            strides=[1, *steps],
            upsample_kernel_size=steps,
            filters=channels,
            dropout=dropout or None,
            norm_name=MONAI_NORMS[norm](spatial_dims, True),
            res_block=residual,
        )
        with_exact_convolutions(self.network)
        del self.network.skip_layers  # all modules a second time; a file of weights would hold each twice
        layers = Layers(spatial_dims)
        self.extra_heads = nn.ModuleList(layers.head(channels[n], out_channels) for n in range(1, num_extra + 1))

    def outputs(self, x: Tensor) -> list[Tensor]:
        net = self.network
        skips = []
        for stage in (net.input_block, *net.downsamples):
            x = stage(x)
            skips.append(x)
        x = net.bottleneck(x)
        heads = [net.output_block, *self.extra_heads] if self.training else [net.output_block]
        outputs = []
        for n, up in zip(reversed(range(len(skips))), net.upsamples, strict=True):
            x = up(x, skips[n])
            if n < len(heads):
                outputs.append(heads[n](x))
        return outputs[::-1]


class SegResNet(SegmentationNetwork):
    """MONAI's SegResNet: a deep encoder of residual blocks, skips that are summed, a light decoder.

    The winner of BraTS 2018, without its autoencoder branch. Takes any size from `min_size` (a power of 2, 8
    by default) up; multiples of it need no padding. By default 18,796,002 parameters in 3D and 6,298,530 in
    2D (one channel in, two out). MONAI's class has no deep supervision.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        init_filters: Channels of the finest level; each next one has twice as many.
        blocks_down: Residual blocks of each level, finest first.
        blocks_up: Residual blocks of each step up, coarsest first.
        norm: ``group`` (of 8), ``auto``, ``instance``, ``batch`` or ``none``.
        dropout: Probability that a value is dropped after the first convolution.

    Reference:
        Myronenko 2018, arXiv:1810.11654.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        init_filters: int = 32,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        blocks_up: Sequence[int] = (1, 1, 1),
        norm: str = "group",
        dropout: float = 0.0,
    ) -> None:
        from monai.networks.nets.segresnet import SegResNet as MonaiSegResNet

        depth = len(blocks_down) - 1
        super().__init__(AxisSizes.of_strides([(2**depth,) * spatial_dims]))
        self.network = MonaiSegResNet(
            spatial_dims,
            init_filters,
            in_channels,
            out_channels,
            dropout_prob=dropout or None,
            norm=MONAI_NORMS[norm](spatial_dims, True),
            blocks_down=tuple(blocks_down),
            blocks_up=per_level("blocks_up", blocks_up, depth),
        )
        with_exact_convolutions(self.network)

    def outputs(self, x: Tensor) -> list[Tensor]:
        return [self.network(x)]


class SwinUNETR(SegmentationNetwork):
    """MONAI's Swin UNETR: attention within windows that shift from layer to layer, and a convolutional decoder.

    Takes any size from 32 up; multiples of it need no padding. By default 62,186,708 parameters in 3D and
    25,147,292 in 2D (one channel in, two out).

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        feature_size: Channels of the finest level, divisible by 12.
        depths: Transformer layers of each of the four stages.
        num_heads: Attention heads of each stage.
        window_size: Side of a window, in tokens of 2 voxels at the first stage.
        norm: Of the convolutions: ``auto`` (instance in 3D, batch in 2D), ``instance`` (here without weights, as in
            MONAI's), ``batch``, ``group`` or ``none``.
        dropout: Probability that a value is dropped after a linear layer.
        drop_path: Probability that a layer is skipped, of the last; it rises from 0 at the first.
        use_v2: Whether a residual convolution block opens each stage, as in Swin UNETR V2.

    Reference:
        Hatamizadeh et al. 2022, arXiv:2201.01266.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        feature_size: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: PerAxis = 7,
        norm: str = "auto",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        use_v2: bool = False,
    ) -> None:
        from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR

        heads = per_level("num_heads", num_heads, 4)
        widths = [feature_size * 2**n for n in range(4)]
        if any(width % number for width, number in zip(widths, heads, strict=True)):
            raise ValueError(f"num_heads {heads}; they must divide the channels {widths} of their stages")
        super().__init__(AxisSizes.of_strides([(32,) * spatial_dims]))
        with torch.device("cpu"):  # it reads numbers off tensors while it is made, which the meta device has not
            network = MonaiSwinUNETR(
                in_channels,
                out_channels,
                depths=per_level("depths", depths, 4),
                num_heads=heads,
                window_size=per_axis(window_size, spatial_dims),
                feature_size=feature_size,
                norm_name=MONAI_NORMS[norm](spatial_dims, False),
                drop_rate=dropout,
                dropout_path_rate=drop_path,
                spatial_dims=spatial_dims,
                use_v2=use_v2,
            )
        self.network = with_exact_convolutions(network.to(torch.get_default_device()))

    def outputs(self, x: Tensor) -> list[Tensor]:
        return [self.network(x)]


class UNETR(SegmentationNetwork):
    """MONAI's UNETR: a vision transformer on patches of 16 voxels, whose layers a U-Net's decoder reads as skips.

    Takes any size from 16 up; multiples of it need no padding. By default 92,783,842 parameters in 3D and
    87,148,482 in 2D (one channel in, two out). Departs from MONAI's in that an input of another size than
    `image_size` is taken, too: the position embeddings are then interpolated; and the 18,432 weights that
    nothing in MONAI's uses are left out.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        image_size: What the position embeddings are made for; best the patch_size of training.
        feature_size: Channels of the decoder's finest level.
        hidden_size: Of a token.
        mlp_dim: Width of the layers' perceptrons.
        num_heads: Attention heads of each of the 12 layers.
        norm: Of the convolutions: ``auto`` (instance in 3D, batch in 2D), ``instance`` (here without weights, as in
            MONAI's), ``batch``, ``group`` or ``none``.
        dropout: Probability that a value is dropped in the transformer.

    Reference:
        Hatamizadeh et al. 2022, arXiv:2103.10504.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        image_size: PerAxis = 96,
        feature_size: int = 16,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_heads: int = 12,
        norm: str = "auto",
        dropout: float = 0.0,
    ) -> None:
        from monai.networks.nets.unetr import UNETR as MonaiUNETR  # noqa: N811

        super().__init__(AxisSizes.of_strides([(16,) * spatial_dims]))
        self.network = MonaiUNETR(
            in_channels,
            out_channels,
            per_axis(image_size, spatial_dims),
            feature_size=feature_size,
            hidden_size=hidden_size,
            mlp_dim=mlp_dim,
            num_heads=num_heads,
            norm_name=MONAI_NORMS[norm](spatial_dims, False),
            dropout_rate=dropout,
            spatial_dims=spatial_dims,
        )
        with_exact_convolutions(self.network)
        for layer in self.network.vit.blocks:
            layer.norm_cross_attn = nn.Identity()  # weights that nothing uses, and so nothing trains

    def outputs(self, x: Tensor) -> list[Tensor]:
        net = self.network
        skips = [net.encoder1(x)]
        tokens = self._embedded(x)
        grid = tuple(n // 16 for n in x.shape[2:])
        for n, layer in enumerate(net.vit.blocks):
            tokens = layer(tokens)
            if n in (3, 6, 9):
                encoder = (net.encoder2, net.encoder3, net.encoder4)[n // 3 - 1]
                skips.append(encoder(to_grid(tokens, grid)))
        y = to_grid(net.vit.norm(tokens), grid)
        for decoder in (net.decoder5, net.decoder4, net.decoder3, net.decoder2):
            y = decoder(y, skips.pop())
        return [net.out(y)]

    def _embedded(self, x: Tensor) -> Tensor:
        """The tokens of an image, with their places: (B, N, hidden_size)."""
        embedding = self.network.vit.patch_embedding
        patches = embedding.patch_embeddings(x)  # (B, hidden_size, I / 16, …)
        places = resize_positions(embedding.position_embeddings, self.network.feat_size, patches.shape[2:])
        return embedding.dropout(to_tokens(patches) + places)


class MedNeXt(SegmentationNetwork):
    """MONAI's MedNeXt: a U-Net of ConvNeXt blocks: depthwise, expanding and compressing convolutions.

    Takes any size from 16 up; multiples of it need no padding. By default 5,550,914 parameters in 3D and
    5,472,002 in 2D (one channel in, two out). Each block is normalized channel by channel.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        size: ``S``, ``B``, ``M`` or ``L``: by blocks and expansion.
        init_filters: Channels of the finest level; each next one has twice as many. 32 in the paper.
        kernel_size: Of the depthwise convolutions: 3, or with more memory 5.
        deep_supervision: Whether training also scores all lower levels, each with half the weight of the one
            above.

    Reference:
        Roy et al. 2023, arXiv:2303.09975.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        size: Literal["S", "B", "M", "L"] = "S",
        init_filters: int = 32,
        kernel_size: int = 3,
        deep_supervision: bool = False,
    ) -> None:
        from monai.networks.nets.mednext import MedNeXt as MonaiMedNeXt

        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; it must be odd")
        expansion, blocks = MEDNEXT_SIZES[size]
        num_extra = 4 if deep_supervision else 0
        super().__init__(
            AxisSizes.of_strides([(16,) * spatial_dims]), extra_weights=[0.5**n for n in range(1, num_extra + 1)]
        )
        self.network = MonaiMedNeXt(
            spatial_dims,
            init_filters,
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            encoder_expansion_ratio=expansion,
            decoder_expansion_ratio=expansion[::-1],
            bottleneck_expansion_ratio=expansion[-1],
            blocks_down=blocks,
            blocks_bottleneck=blocks[-1],
            blocks_up=blocks[::-1],
            use_residual_connection=True,
        )
        with_exact_convolutions(self.network)
        layers = Layers(spatial_dims)
        self.extra_heads = nn.ModuleList(
            layers.head(init_filters * 2**n, out_channels) for n in range(1, num_extra + 1)
        )

    def outputs(self, x: Tensor) -> list[Tensor]:
        net = self.network
        x = net.stem(x)
        skips = []
        for stage, down in zip(net.enc_stages, net.down_blocks, strict=True):
            x = stage(x)
            skips.append(x)
            x = down(x)
        x = net.bottleneck(x)
        levels = [x]
        for up, stage in zip(net.up_blocks, net.dec_stages, strict=True):
            x = stage(up(x) + skips.pop())
            levels.append(x)
        heads = [net.out_0, *self.extra_heads] if self.training else [net.out_0]
        return [head(level) for head, level in zip(heads, reversed(levels), strict=False)]
