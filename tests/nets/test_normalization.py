"""Norms of images with channels last, against float64."""

import pytest
import torch
from torch import nn

from medseg.nets.normalization import GroupNorm

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def made(groups: int, channels: int, *, affine: bool = True) -> GroupNorm:
    norm = GroupNorm(groups, channels, affine=affine)
    for weight in norm.parameters():
        nn.init.normal_(weight)
    return norm


def exact(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    weights = [None if weight is None else weight.double() for weight in (norm.weight, norm.bias)]
    return nn.functional.group_norm(x.double(), norm.num_groups, *weights, norm.eps)


@torch.inference_mode()
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("size", [(50, 61), (1, 7), (40, 42, 44), (3, 1, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_channels_last_keep_their_digits_far_from_zero(groups, size, affine):
    torch.manual_seed(0)
    x = torch.randn(2, 8, *size) + torch.linspace(-30, 30, 8).view(-1, *[1] * len(size))
    norm = made(groups, 8, affine=affine)
    last = x.to(memory_format=CHANNELS_LAST[len(size)])
    found = norm(last)
    torch.testing.assert_close(found.double(), exact(norm, x), atol=1e-4, rtol=1e-5)
    assert found.is_contiguous(memory_format=CHANNELS_LAST[len(size)])


@torch.inference_mode()
def test_torch_alone_loses_them():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 64, 64, 64) + 30
    last, norm = x.to(memory_format=torch.channels_last_3d), made(8, 8)
    assert (nn.GroupNorm.forward(norm, last) - exact(norm, x)).abs().max() > 1e-3  # once not: ours can go
    assert (norm(last) - exact(norm, x)).abs().max() < 1e-4


def test_other_images_are_left_to_torch():
    torch.manual_seed(0)
    x, norm = torch.randn(2, 8, 5, 6, 7), made(4, 8)
    torch.testing.assert_close(norm(x), nn.GroupNorm.forward(norm, x), atol=0, rtol=0)
    last = x.to(memory_format=torch.channels_last_3d)
    assert norm(last).requires_grad  # its weights learn
    half = last.bfloat16()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(half), nn.GroupNorm.forward(norm, half), atol=0, rtol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_network_with_it_exports_for_any_batch(layout):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), made(4, 8)).eval().to(memory_format=layout)
    x = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=8)
        exported = torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(exported(torch.cat([x, x])), network(torch.cat([x, x])))
