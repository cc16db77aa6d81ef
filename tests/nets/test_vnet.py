from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.nets import VNet as MonaiVNet
from torch import nn

from medseg.nets.vnet import RepeatChannels, VNet


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(*args: Any, **kwargs: Any) -> VNet:
    with torch.device("meta"):
        return VNet(*args, **kwargs)


def test_the_paper_s_convolutions_are_counted_by_hand() -> None:
    def conv(width: int, num: int, fan: int | None = None) -> int:
        return num * ((fan or width) * 5**3 * width + width)

    encoder = conv(16, 1, fan=1) + conv(32, 2) + conv(64, 3) + conv(128, 3) + conv(256, 3)
    decoder = conv(256, 3) + conv(128, 3) + conv(64, 2) + conv(32, 1)
    down = sum(n * 2**3 * 2 * n + 2 * n for n in (16, 32, 64, 128))
    up = sum(a * 2**3 * b + b for a, b in ((256, 128), (256, 64), (128, 32), (64, 16)))
    head = 32 * 2 + 2
    network = on_meta(3, 1, 2, norm="none", activation="relu")
    assert num_parameters(network) == encoder + decoder + down + up + head


@pytest.mark.parametrize(
    ("out_channels", "activation", "count"),
    [(2, "elu", 45_597_898), (1, "elu", 45_593_892), (2, "prelu", 45_601_516)],
)
def test_monai_s_smaller_variant_is_equal_but_for_its_head(out_channels: int, activation: str, count: int) -> None:
    with torch.device("meta"):
        monai = MonaiVNet(3, 1, out_channels, act="prelu" if activation == "prelu" else ("elu", {"inplace": True}))
    ours = on_meta(
        3,
        1,
        out_channels,
        convs_per_stage=(1, 1, 2, 3, 2),
        decoder_convs_per_stage=(1, 1, 2, 2),
        norm="batch",
        activation=activation,
    )
    assert num_parameters(monai) == count
    # MONAI's activates each stage's last convolution before the sum, too: where that learns, a slope a channel.
    slopes = 2 * sum((32, 64, 128, 256)) if activation == "prelu" else 0
    rest = num_parameters(monai) - num_parameters(monai.out_tr) - slopes
    assert num_parameters(ours) - num_parameters(ours.head) == rest


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((VNet.__doc__ or "").split())


def test_each_stage_learns_a_residual() -> None:
    network = VNet(2, 1, 1, channels=(4, 4), convs_per_stage=2, norm="none", activation="relu").eval()
    for stage in (network.encoder[0], network.encoder[1][1], network.decoder[0]):
        for block in stage.blocks:
            nn.init.zeros_(block.conv.weight)
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(network.encoder[0](x), x.relu().expand(-1, 4, -1, -1))
    features = torch.rand(1, 8, 8, 8)
    torch.testing.assert_close(network.decoder[0](features), features)


def test_channels_of_the_image_are_repeated_until_the_stage_is_full() -> None:
    x = torch.arange(3.0).view(1, 3, 1, 1)
    assert RepeatChannels(8)(x).flatten().tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert RepeatChannels(2)(x).flatten().tolist() == [0, 1]
