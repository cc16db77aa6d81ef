from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets import NETS
from medseg.nets.fast_scnn import FastSCNN

TINY = NETS["fast_scnn"].tiny


def count_on_meta(*args: Any, **kwargs: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in FastSCNN(*args, **kwargs).parameters())


def test_it_has_as_many_parameters_as_another_implementation_but_biases_that_a_norm_takes_away() -> None:
    count = count_on_meta(2, 3, 19, norm="batch")
    assert count + 2 * 128 == 1_138_051  # of the two convolutions that are summed
    assert count_on_meta(2, 3, 19, norm="batch", deep_supervision=True) - count == 1_157_174 - 1_138_051


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (count_on_meta(dims, 1, 2) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((FastSCNN.__doc__ or "").split())


@pytest.mark.parametrize(("dims", "stride"), [(2, 8), (3, 4)])
def test_both_branches_begin_with_the_same_features_and_end_on_their_grid(dims: int, stride: int) -> None:
    small = {name: value for name, value in TINY.items() if name != "output_stride"}
    network = FastSCNN(dims, 1, 2, **small).eval()
    assert network.min_size == (4 * stride,) * dims
    seen: dict[str, torch.Size] = {}
    for name in ("learning_to_downsample", "global_features", "fusion"):
        part = network.get_submodule(name)
        part.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.shape[2:]}))
    network(torch.randn(1, 1, *[64] * dims))
    assert seen == {
        "learning_to_downsample": (64 // stride,) * dims,
        "global_features": (16 // stride,) * dims,
        "fusion": (64 // stride,) * dims,
    }


def test_context_is_of_the_whole_image_and_detail_goes_past_it() -> None:
    torch.manual_seed(0)
    network = FastSCNN(2, 1, 2, **TINY).eval()
    x = torch.randn(1, 1, 128, 128, requires_grad=True)
    network(x)[0, 1, 0, 0].backward()
    assert x.grad is not None and x.grad[0, 0, -16:, -16:].abs().sum() > 0
    nn.init.zeros_(network.fusion.coarse.norm.weight)
    assert network(x).std() > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"output_stride": 16}, "must be 2, 4 or 8"),
        ({"channels": (8, 8)}, "give three of each"),
        ({"blocks": (1, 2)}, "blocks has 2 entries"),
        ({"expansion": 0}, "at least 1"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastSCNN(2, 1, 2, **args)
