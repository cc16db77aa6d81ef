from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medseg.nets.blocks import Layers, initialize
from medseg.nets.separable import InvertedResidual, SeparableConv, ShuffledConv, calm_inverted_residuals


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 3)])
def test_a_separable_convolution_is_an_ordinary_one_whose_weights_are_a_product(
    dims: int, stride: int, dilation: int
) -> None:
    torch.manual_seed(0)
    separable = SeparableConv(Layers(dims, norm="none"), 4, 6, stride=stride, dilation=dilation, activate=False)
    depthwise, pointwise = separable.conv_dw.weight, separable.conv_pw.weight  # (4, 1, 3, 3[, 3]), (6, 4, 1, 1[, 1])
    x = torch.randn(2, 4, *[12] * dims)
    conv = F.conv2d if dims == 2 else F.conv3d
    expected = conv(
        x, pointwise * depthwise[None, :, 0], separable.conv_pw.bias, stride=stride, dilation=dilation, padding=dilation
    )
    torch.testing.assert_close(separable(x), expected, atol=1e-5, rtol=1e-5)


def test_a_norm_and_an_activation_follow_each_half_where_wanted() -> None:
    layers = Layers(2, norm="batch", activation="relu")
    assert list(dict(SeparableConv(layers, 4, 6).named_children())) == ["conv_dw", "conv_pw", "bn_pw", "act_pw"]
    twice = SeparableConv(layers, 4, 6, norm_between=True)
    assert list(dict(twice.named_children())) == ["conv_dw", "bn_dw", "act_dw", "conv_pw", "bn_pw", "act_pw"]
    linear = SeparableConv(layers, 4, 6, norm_between=True, activate=False)
    assert list(dict(linear.named_children())) == ["conv_dw", "bn_dw", "conv_pw", "bn_pw"]


@pytest.mark.parametrize("dims", [2, 3])
def test_shuffled_channels_take_turns_between_the_groups(dims: int) -> None:
    torch.manual_seed(0)
    shuffled = ShuffledConv(Layers(dims, norm="none", activation="relu"), 4, 6, groups=2)
    conv = shuffled[0].conv
    nn.init.zeros_(conv.bias)
    x = torch.randn(2, 4, *[5] * dims)
    halves = [
        torch.einsum("bi...,oi->bo...", part, weight.flatten(1)).relu()
        for part, weight in zip(x.chunk(2, dim=1), conv.weight.chunk(2), strict=True)
    ]
    expected = torch.stack(halves, dim=2).flatten(1, 2)  # the first of each half, the second of each half, …
    torch.testing.assert_close(shuffled(x), expected)


def test_two_shuffled_convolutions_see_every_channel_from_every_channel() -> None:
    layers = Layers(3, norm="none", activation="elu")
    x = torch.randn(1, 4, 2, 2, 2, requires_grad=True)
    y = ShuffledConv(layers, 4, 4, groups=2)(x)
    (one,) = torch.autograd.grad(y[:, 0].sum(), x, retain_graph=True)
    assert one.abs().sum(dim=(0, 2, 3, 4)).count_nonzero() == 2
    (two,) = torch.autograd.grad(ShuffledConv(layers, 4, 4, groups=2)(y)[:, 0].sum(), x)
    assert two.abs().sum(dim=(0, 2, 3, 4)).count_nonzero() == 4


@pytest.mark.parametrize("dims", [2, 3])
def test_an_inverted_residual_is_wide_inside_and_linear_at_its_end(dims: int) -> None:
    block = InvertedResidual(Layers(dims, norm="none", activation="relu6"), 4, 4, expansion=3)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    assert [(m.in_channels, m.out_channels, m.groups) for m in convs] == [(4, 12, 1), (12, 12, 12), (12, 4, 1)]
    x = torch.randn(2, 4, *[8] * dims)
    inside = x
    for conv in convs[:2]:
        inside = F.relu6(conv(inside))
    torch.testing.assert_close(block(x), x + convs[2](inside))


@pytest.mark.parametrize(("out_channels", "stride", "summed"), [(4, 1, True), (4, 2, False), (6, 1, False)])
def test_an_inverted_residual_sums_only_what_has_the_same_shape(out_channels: int, stride: int, summed: bool) -> None:
    block = InvertedResidual(Layers(2, norm="none"), 4, out_channels, stride=stride)
    for tensor in block.parameters():
        nn.init.zeros_(tensor)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(block(x), x if summed else torch.zeros(1, out_channels, 8 // stride, 8 // stride))


def test_without_norms_many_inverted_residuals_keep_the_size_of_activations() -> None:
    torch.manual_seed(0)
    layers = Layers(2, norm="none", activation="relu")
    network = nn.Sequential(InvertedResidual(layers, 16, 24), *[InvertedResidual(layers, 24, 24) for _ in range(12)])
    initialize(network)
    calm_inverted_residuals(network)
    assert 0.3 < network(torch.randn(2, 16, 32, 32)).std() < 3
