from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets.enet import Bottleneck, ENet
from medseg.nets.unpooling import max_unpool

SMALL: dict[str, Any] = {"channels": (4, 8, 16), "regular_blocks": 1, "context_stages": 1, "dilations": (2,)}


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(*args: Any, **kwargs: Any) -> ENet:
    with torch.device("meta"):
        return ENet(*args, **kwargs)


def test_the_paper_s_network_differs_from_another_implementation_by_what_is_named_here() -> None:
    network = on_meta(2, 3, 19, norm="batch")
    slopes = [m.weight.numel() for m in network.modules() if isinstance(m, nn.PReLU)]
    of_a_slope_a_channel = sum(slopes) - len(slopes)  # theirs: one for all channels
    # Theirs strides in the inner 2 × 2 convolution behind a 1 × 1 one, and convolves the shortcut, which we fill up.
    first = (4 * 16 * 16 + 9 * 16 * 16) - (16 * 16 + 4 * 16 * 16 + 16 * 64 + 2 * 64)
    second = (4 * 64 * 32 + 9 * 32 * 32) - (64 * 32 + 4 * 32 * 32 + 64 * 128 + 2 * 128)
    biases_of_logits = 19
    assert num_parameters(network) == 354_849 + of_a_slope_a_channel + first + second + biases_of_logits == 362_594


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((ENet.__doc__ or "").split())


def test_the_initial_block_makes_13_channels_and_passes_the_3_of_the_image_on() -> None:
    network = ENet(2, 3, 2)
    assert network.initial.conv.out_channels == 13
    joined: list[torch.Tensor] = []
    network.initial.norm.register_forward_pre_hook(lambda _, inputs: joined.append(inputs[0]))
    x = torch.randn(2, 3, 16, 24)
    network(x)
    torch.testing.assert_close(joined[0][:, 13:], nn.functional.max_pool2d(x, 2))
    with pytest.raises(ValueError, match="an image of 16 channels"):
        ENet(2, 16, 2)


def test_context_is_found_by_regular_dilated_and_asymmetric_convolutions_in_the_paper_s_order() -> None:
    found = []
    for block in on_meta(2, 3, 19).context:
        convs = [m for m in block.conv.modules() if isinstance(m, nn.Conv2d)]
        found.append([(m.kernel_size, m.dilation) for m in convs])
    regular, asymmetric = [((3, 3), (1, 1))], [((5, 1), (1, 1)), ((1, 5), (1, 1))]
    dilated = [[((3, 3), (n, n))] for n in (2, 4, 8, 16)]
    assert found == 2 * [regular, dilated[0], asymmetric, dilated[1], regular, dilated[2], asymmetric, dilated[3]]


def test_in_3d_three_convolutions_see_along_one_axis_each() -> None:
    block = on_meta(3, 1, 2).context[2]
    kernels = [m.kernel_size for m in block.conv.modules() if isinstance(m, nn.Conv3d)]
    assert kernels == [(5, 1, 1), (1, 5, 1), (1, 1, 5)]


@pytest.mark.parametrize("dims", [2, 3])
def test_values_come_back_where_the_encoder_s_maxima_were(dims: int) -> None:
    torch.manual_seed(0)
    network = ENet(dims, 1, 2, **SMALL).eval()
    encoded: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    decoded: list[torch.Tensor] = []
    for down in (network.down1, network.down2):
        down.pool.register_forward_hook(lambda _, inputs, outputs: encoded.append((inputs[0].clone(), *outputs)))
    for up in (network.up2, network.up1):
        up.residual, up.activation = nn.Sequential(up.residual, Nothing()), nn.Identity()  # the shortcut alone is left
        up.register_forward_hook(lambda _, __, output: decoded.append(output))
    network(torch.randn(1, 1, *[32] * dims))
    for (before, maxima, places), after in zip(encoded, reversed(decoded), strict=True):
        assert after.shape == before.shape
        is_maximum = max_unpool(maxima, places, stride=2) == before
        assert after.count_nonzero() > maxima.numel() // 2
        assert is_maximum[after != 0].all()


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("dims", [2, 3])
def test_dropout_takes_whole_channels_and_fewer_of_them_early(dims: int) -> None:
    network = ENet(dims, 1, 2, **SMALL, dropout=0.2)
    kind = nn.Dropout2d if dims == 2 else nn.Dropout3d
    assert isinstance(network.stage1[0], Bottleneck)
    assert isinstance(network.stage1[0].drop, kind) and isinstance(network.stage4[0].drop, kind)
    assert (network.stage1[0].drop.p, network.stage4[0].drop.p) == (pytest.approx(0.02), 0.2)
    assert not any(type(m) is nn.Dropout for m in network.modules())


def test_the_third_axis_of_thick_slices_keeps_its_resolution() -> None:
    network = ENet(3, 1, 2, **SMALL, in_plane=True).eval()
    assert network.min_size == (8, 8, 1)
    assert network(torch.zeros(1, 1, 17, 16, 3)).shape == (1, 2, 17, 16, 3)
    assert on_meta(3, 1, 2, in_plane=True).context[7].conv[0].conv.dilation == (16, 16, 1)
