from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets.segnet import SegNet


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(*args: Any, **kwargs: Any) -> SegNet:
    with torch.device("meta"):
        return SegNet(*args, **kwargs)


def test_the_paper_s_network_has_as_many_parameters_as_others_but_for_a_norm_of_the_logits() -> None:
    norm_of_logits = 2 * 21  # others put a batch norm after the last convolution, or declare one without using it
    assert num_parameters(on_meta(2, 3, 21, norm="batch")) == 29_455_167 - norm_of_logits


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((SegNet.__doc__ or "").split())


def test_the_decoder_mirrors_the_13_convolutions_of_the_encoder() -> None:
    network = on_meta(2, 3, 21)
    encoder = [m for m in network.encoder.modules() if isinstance(m, nn.Conv2d)]
    decoder = [m for stage in reversed(network.decoder) for m in stage if isinstance(m, nn.Conv2d)] + [network.head]
    assert len(encoder) == 13
    mirrored = [(m.out_channels, m.in_channels) for m in reversed(encoder)]
    assert [(m.in_channels, m.out_channels) for m in decoder] == [*mirrored[:-1], (64, 21)]


@pytest.mark.parametrize("dims", [2, 3])
def test_values_come_back_where_the_encoder_s_maxima_were(dims: int) -> None:
    torch.manual_seed(0)
    network = SegNet(dims, 1, 4, channels=(4, 6), convs_per_stage=1).eval()
    unpooled: list[torch.Tensor] = []
    for stage in network.decoder:
        stage.register_forward_pre_hook(lambda _, inputs: unpooled.append(inputs[0]))
    x = torch.randn(1, 1, *[8] * dims)
    network(x)
    fine, coarse, bottom = network.encoder(x)
    for encoded, decoded in ((coarse, unpooled[0]), (fine, unpooled[1])):
        before, after = in_blocks(encoded), in_blocks(decoded)
        assert after.count_nonzero(-1).max() == 1
        assert after.count_nonzero() > after[..., 0].numel() // 4
        assert (before == before.amax(-1, keepdim=True))[after != 0].all()
    torch.testing.assert_close(in_blocks(unpooled[0]).sum(-1), bottom)


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    """The voxels of each block of a pooling, along the last axis."""
    dims = x.dim() - 2
    for axis in range(dims):
        x = x.unfold(2 + axis, 2, 2)
    return x.flatten(2 + dims)


def test_dropout_makes_it_bayesian_segnet() -> None:
    torch.manual_seed(0)
    network = SegNet(2, 1, 2, channels=(4, 8), convs_per_stage=1, dropout=0.5)
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(network.train()(x), network(x))
    assert torch.equal(network.eval()(x), network(x))


def test_the_third_axis_of_thick_slices_keeps_its_resolution() -> None:
    network = SegNet(3, 1, 2, channels=(4, 8), convs_per_stage=1, in_plane=True).eval()
    assert network.min_size == (4, 4, 1)
    assert network(torch.zeros(1, 1, 9, 8, 3)).shape == (1, 2, 9, 8, 3)
