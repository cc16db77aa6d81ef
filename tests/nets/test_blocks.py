from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medseg.nets.blocks import ACTIVATIONS, NORMS, Interpolation, Layers, crop_center, crop_end, pad_end


@pytest.mark.parametrize("dims", [2, 3])
def test_instance_norm_is_torch_s_own(dims: int) -> None:
    x = torch.randn(2, 6, *[5] * dims, requires_grad=True)
    ours = NORMS["instance"](6, dims)
    theirs = (nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d)(6, affine=True)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    (a,) = torch.autograd.grad(ours(x).square().sum(), x)
    (b,) = torch.autograd.grad(theirs(x).square().sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_the_automatic_norm_is_instance_in_3d_and_batch_in_2d() -> None:
    assert isinstance(NORMS["auto"](8, 2), nn.BatchNorm2d)
    assert isinstance(NORMS["auto"](8, 3), nn.GroupNorm) and NORMS["auto"](8, 3).num_groups == 8


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations_in_place_give_the_gradient_of_those_that_are_not(name: str) -> None:
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ACTIVATIONS[name](4).double()(t * 1), (x,))


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (5, 1), (2, 2), (3, 2), (1, 2), (5, 2), (4, 2), (3, 3)])
def test_same_padding_divides_the_size_by_the_stride(kernel: int, stride: int) -> None:
    conv = Layers(2).conv(1, 1, kernel_size=kernel, stride=stride)
    assert conv(torch.zeros(1, 1, 12, 18)).shape[2:] == (12 // stride, 18 // stride)


def test_interpolating_after_the_1x1_convolution_equals_interpolating_before_it() -> None:
    up = Interpolation(Layers(3), 4, 2, stride=(2, 2, 1)).double()
    x = torch.randn(1, 4, 3, 4, 5, dtype=torch.float64)
    before = up.conv(F.interpolate(x, scale_factor=(2.0, 2.0, 1.0), mode="trilinear"))
    torch.testing.assert_close(up(x), before)


def test_padding_repeats_the_last_voxels_and_cropping_undoes_it() -> None:
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    padded = pad_end(x, (3, 5))
    assert padded[0, 0].tolist() == [[1, 2, 2, 2, 2], [3, 4, 4, 4, 4], [3, 4, 4, 4, 4]]
    assert torch.equal(crop_end(padded, (2, 2)), x)
    assert pad_end(x, (2, 2)) is x


def test_the_center_is_cropped_evenly() -> None:
    x = torch.arange(36.0).view(1, 1, 6, 6)
    assert crop_center(x, (2, 4))[0, 0].tolist() == [[13, 14, 15, 16], [19, 20, 21, 22]]
