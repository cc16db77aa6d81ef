from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medseg.errors import WorkflowError
from medseg.nets.blocks import Layers
from medseg.nets.pyramids import ASPP, BinPooling, PyramidPooling


def by_hand(x: torch.Tensor, bins: int, *, in_plane: bool) -> torch.Tensor:
    """Averages over blocks of equal size, one by one."""
    steps = [n // bins for n in x.shape[2:]]
    if in_plane:
        steps[2] = 1
    grid = torch.empty(*x.shape[:2], *[n // step for n, step in zip(x.shape[2:], steps, strict=True)], dtype=x.dtype)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in grid.shape[2:]]):
        block = tuple(slice(int(i) * s, (int(i) + 1) * s) for i, s in zip(index, steps, strict=True))
        grid[(..., *index)] = x[(..., *block)].flatten(2).mean(dim=2)
    return grid


@pytest.mark.parametrize(("dims", "in_plane"), [(2, False), (3, False), (3, True)])
def test_pyramid_pooling_is_the_average_over_each_bin_beside_the_features(dims: int, in_plane: bool) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, *[12, 6, 6][:dims]).double()
    pyramid = PyramidPooling(Layers(dims, norm="none", activation="relu"), 3, 3, in_plane=in_plane).double()
    for scale in pyramid.scales:
        nn.init.zeros_(scale.block.conv.bias)
        scale.block.conv.weight.data.copy_(torch.eye(3).view(3, 3, *[1] * dims))  # leaves the averages as they are
    features, *averages = pyramid(x).split(3, dim=1)
    assert torch.equal(features, x)
    for bins, average in zip((1, 2, 3, 6), averages, strict=True):
        expected = F.interpolate(
            by_hand(x, bins, in_plane=in_plane), size=x.shape[2:], mode="bilinear" if dims == 2 else "trilinear"
        )
        torch.testing.assert_close(average, expected)


@pytest.mark.parametrize("norm", ["auto", "instance", "group"])
def test_the_average_over_a_single_image_is_trained_on(norm: str) -> None:
    torch.manual_seed(0)
    pooling = BinPooling(Layers(3, norm=norm), 8, 8)
    pooling(torch.randn(1, 8, 2, 2, 2)).square().sum().backward()
    assert pooling.block.conv.weight.grad.abs().sum() > 0  # a norm of this single value would have left nothing


def test_batch_norm_refuses_a_single_pooled_value_in_training_alone() -> None:
    pooling = BinPooling(Layers(2, norm="batch"), 8, 8)
    x = torch.randn(1, 8, 4, 4)
    with pytest.raises(WorkflowError, match=r"E-BATCH-SIZE .*norm 'batch'.*batch_size of at least 2.*'auto'"):
        pooling(x)
    assert pooling(torch.cat([x, x])).shape == (2, 8, 4, 4)
    assert pooling.eval()(x).shape == (1, 8, 4, 4)


def aspp_that_ignores_the_average(dims: int, *, separable: bool = False, in_plane: bool = False) -> ASPP:
    torch.manual_seed(0)
    layers = Layers(dims, norm="none", activation="elu")
    aspp = ASPP(layers, 2, 2, rates=(1, 3), separable=separable, in_plane=in_plane)
    aspp.project.conv.weight.data[:, -2:] = 0
    return aspp


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_aspp_looks_around_at_its_rates(dims: int, separable: bool) -> None:
    x = torch.randn(1, 2, *[11] * dims, requires_grad=True)
    logits = aspp_that_ignores_the_average(dims, separable=separable)(x)
    (gradient,) = torch.autograd.grad(logits[(0, slice(None), *[5] * dims)].sum(), x)
    seen = {tuple(index) for index in (gradient[0].abs().sum(dim=0).nonzero() - 5).tolist()}
    offsets = [torch.cartesian_prod(*[torch.tensor([-rate, 0, rate])] * dims).tolist() for rate in (1, 3)]
    assert seen == {tuple(offset) for rate in offsets for offset in rate}


def test_aspp_in_plane_looks_no_further_than_the_next_slice() -> None:
    x = torch.randn(1, 2, 11, 11, 11, requires_grad=True)
    logits = aspp_that_ignores_the_average(3, in_plane=True)(x)
    (gradient,) = torch.autograd.grad(logits[0, :, 5, 5, 5].sum(), x)
    seen = gradient[0].abs().sum(dim=0).nonzero() - 5
    assert seen.abs().amax(dim=0).tolist() == [3, 3, 1]


def test_aspp_knows_the_average_of_the_image() -> None:
    torch.manual_seed(0)
    aspp = ASPP(Layers(2, norm="none", activation="elu"), 2, 2, rates=(1,))
    x = torch.randn(1, 2, 11, 11, requires_grad=True)
    (gradient,) = torch.autograd.grad(aspp(x)[0, :, 5, 5].sum(), x)
    far = gradient[0, :, 0, 0]
    assert far.abs().sum() > 0
    torch.testing.assert_close(far, gradient[0, :, 10, 3])
