from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.nets.deconvnet import DeconvNet

SMALL: dict[str, Any] = {"channels": (4, 6), "convs_per_stage": 1, "fc_channels": 8}


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(*args: Any, **kwargs: Any) -> DeconvNet:
    with torch.device("meta"):
        return DeconvNet(*args, **kwargs)


def test_the_paper_s_network_has_as_many_parameters_as_other_implementations() -> None:
    assert num_parameters(on_meta(2, 3, 21, norm="batch", fc_channels=4096, fc_kernel_size=7)) == 251_805_653


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((DeconvNet.__doc__ or "").split())


def test_the_decoder_mirrors_all_15_convolutions_of_the_encoder() -> None:
    network = on_meta(2, 3, 21)
    down = [m for part in (network.encoder, network.fc[:2]) for m in part.modules() if isinstance(m, nn.Conv2d)]
    stages = reversed(network.decoder)
    up = [m for part in (network.fc[2:], *stages) for m in part.modules() if isinstance(m, nn.Conv2d)]
    assert len(down) == 15
    mirrored = [(m.out_channels, m.in_channels) for m in reversed(down)]
    # fc7 has no mirror image; the mirror image of the first convolution gives as many channels as it took
    assert [(m.in_channels, m.out_channels) for m in up] == [*mirrored[1:-1], (64, 64)]
    assert (network.head.in_channels, network.head.out_channels, network.head.kernel_size) == (64, 21, (1, 1))


@pytest.mark.parametrize("dims", [2, 3])
def test_values_come_back_where_the_encoder_s_maxima_were(dims: int) -> None:
    torch.manual_seed(0)
    network = DeconvNet(dims, 1, 4, **SMALL).eval()
    unpooled: list[Tensor] = []
    for stage in network.decoder:
        stage.register_forward_pre_hook(lambda _, inputs: unpooled.append(inputs[0]))
    x = torch.randn(1, 1, *[8] * dims)
    network(x)
    fine, coarse, bottom = network.encoder(x)
    pool, unpool = (F.max_pool2d, F.max_unpool2d) if dims == 2 else (F.max_pool3d, F.max_unpool3d)
    _, places = pool(coarse, 2, return_indices=True)
    assert torch.equal(unpooled[0], unpool(network.fc(bottom), places, 2))
    _, places = pool(fine, 2, return_indices=True)
    assert torch.equal(unpooled[1], unpool(network.decoder[1](unpooled[0]), places, 2))


def test_the_middle_of_a_padded_fc6_is_what_one_without_padding_gives() -> None:
    torch.manual_seed(0)
    network = DeconvNet(2, 1, 2, **SMALL, fc_kernel_size=7).double().eval()
    x = torch.randn(1, 6, 7, 7, dtype=torch.float64)
    fc6 = network.fc[0].conv
    assert torch.allclose(fc6(x)[..., 3, 3], F.conv2d(x, fc6.weight, fc6.bias)[..., 0, 0])


def test_a_deconvolution_of_stride_1_is_a_convolution_by_the_mirrored_kernel() -> None:
    torch.manual_seed(0)
    conv = DeconvNet(2, 1, 2, **SMALL, fc_kernel_size=7).double().fc[2].conv
    x = torch.randn(1, 8, 9, 8, dtype=torch.float64)
    kernel = conv.weight.flip(2, 3).transpose(0, 1)
    assert torch.allclose(conv(x), F.conv_transpose2d(x, kernel, conv.bias, padding=3))


def test_dropout_is_at_the_bottom_alone() -> None:
    network = on_meta(2, 1, 2, dropout=0.5)
    places = {name for name, m in network.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p}
    assert places == {"fc.0.dropout", "fc.1.dropout"}


def test_the_third_axis_of_thick_slices_keeps_its_resolution() -> None:
    network = DeconvNet(3, 1, 2, in_plane=True, **SMALL).eval()
    assert network.min_size == (4, 4, 1)
    assert network(torch.zeros(1, 1, 9, 8, 3)).shape == (1, 2, 9, 8, 3)
