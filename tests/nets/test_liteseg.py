from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets.liteseg import LiteSeg

MOBILE: dict[str, Any] = {"width": 8, "rates": (1, 2), "output_stride": 8, "pyramid_channels": 16}


def count_on_meta(*args: Any, **kwargs: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LiteSeg(*args, **kwargs).parameters())


def test_it_has_as_many_parameters_as_the_authors_code_but_those_that_do_nothing() -> None:
    # Theirs, of which the paper tells 4.38 million, keeps MobileNetV2's classifier, which nothing calls, and puts a
    # depthwise 1 × 1 convolution, which scales each channel, before two that are 1 × 1 themselves.
    classifier, of_branch, of_merge = 1_281_000, 1280, 1280 + 5 * 96
    count = count_on_meta(2, 3, 19, norm="batch")
    assert count == 3_098_667
    assert count + classifier + of_branch + of_merge == 4_382_707


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (count_on_meta(dims, 1, 2) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((LiteSeg.__doc__ or "").split())


def test_each_dilated_convolution_is_followed_by_one_that_is_not() -> None:
    with torch.device("meta"):
        found = {dims: LiteSeg(dims, 1, 2).pyramid.branches[1:-1] for dims in (2, 3)}
    dilations = {dims: [[half.conv_dw.dilation[0] for half in b] for b in branches] for dims, branches in found.items()}
    assert dilations == {2: [[3, 1], [6, 1], [9, 1]], 3: [[1, 1], [2, 1], [3, 1]]}


def test_early_features_reach_the_logits_past_the_pyramid_at_a_quarter_of_the_resolution() -> None:
    torch.manual_seed(0)
    network = LiteSeg(2, 1, 2, **MOBILE).eval()
    seen: list[torch.Size] = []
    network.decoder.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].shape, output.shape]))
    nn.init.zeros_(network.pyramid.merge.norm.weight)  # nothing comes from the last features
    assert network(torch.randn(1, 1, 64, 32)).std() > 0
    assert seen == [(1, 16 + 6, 16, 8), (1, 16, 16, 8)]


@pytest.mark.parametrize("dims", [2, 3])
def test_with_its_own_encoder_every_weight_receives_a_gradient_at_an_odd_size(dims: int) -> None:
    torch.manual_seed(0)
    network = LiteSeg(dims, 1, 2, **MOBILE)
    size = [21, 18, 17][:dims]
    logits = network(torch.randn(2, 1, *size))
    assert logits.shape == (2, 2, *size)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in network.parameters())
