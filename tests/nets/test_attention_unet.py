from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets.attention_unet import AttentionUNet
from medseg.nets.unet import UNet


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(network: type, *args: Any, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return network(*args, **kwargs)


@pytest.mark.parametrize("dims", [2, 3])
def test_it_is_a_u_net_and_a_gate_for_each_skip_but_the_finest(dims: int) -> None:
    channels = (16, 32, 64, 128, 256)
    gates = sum(
        width * width * 2**dims  # of the skip, strided
        + below * width  # of the coarser features
        + width  # their bias
        + width  # to one number
        + 1
        for width, below in itertools.pairwise(channels[1:])
    )
    plain = on_meta(UNet, dims, 1, 2, channels=channels, downsample="maxpool")
    assert num_parameters(on_meta(AttentionUNet, dims, 1, 2, channels=channels)) == num_parameters(plain) + gates


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(AttentionUNet, dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((AttentionUNet.__doc__ or "").split())


def test_with_open_gates_it_computes_what_a_u_net_does() -> None:
    torch.manual_seed(0)
    network = AttentionUNet(2, 1, 2, channels=(4, 8, 8)).eval()
    plain = UNet(2, 1, 2, channels=(4, 8, 8), downsample="maxpool").eval()
    plain.load_state_dict(
        {name: w for name, w in network.state_dict().items() if not name.startswith("decoder.gates.")}
    )
    x = torch.randn(1, 1, 16, 12)
    assert not torch.allclose(network(x), plain(x))
    nn.init.constant_(network.decoder.gates[1].weigh.bias, 1000.0)
    torch.testing.assert_close(network(x), plain(x))


def test_closed_gates_leave_only_the_finest_skip() -> None:
    network = AttentionUNet(2, 1, 1, channels=(2, 4, 4, 4), norm="none").eval()
    for gate in list(network.decoder.gates)[1:]:
        nn.init.constant_(gate.weigh.bias, -1000.0)
    skips: dict[int, torch.Tensor] = {}
    for n, stage in enumerate(network.encoder):
        stage.register_forward_hook(lambda _m, _i, out, n=n: out.retain_grad() or skips.__setitem__(n, out))
    for up in network.decoder.ups:  # cuts the way through the coarser levels, so that only skips carry a gradient
        nn.init.zeros_(up[0].weight)
    network(torch.randn(1, 1, 16, 16)).sum().backward()
    assert skips[0].grad.abs().sum() > 0
    assert not any(skips[n].grad.any() for n in (1, 2))


def test_strides_may_differ_by_axis() -> None:
    network = AttentionUNet(3, 1, 2, channels=(4, 4, 4), strides=((2, 2, 1), 2), kernel_sizes=((3, 3, 1), 3, 3)).eval()
    assert network.min_size == (4, 4, 2)
    assert network(torch.zeros(1, 1, 9, 8, 3)).shape == (1, 2, 9, 8, 3)


def test_two_levels_have_no_skip_to_gate() -> None:
    with pytest.raises(ValueError, match="three levels"):
        AttentionUNet(2, 1, 1, channels=(4, 4))
