from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medseg.nets.blocks import Layers
from medseg.nets.unpooling import MaxPoolWithIndices, TransposedBilinear, max_unpool


@pytest.mark.parametrize("stride", [(2, 2), (3, 2), (2, 2, 2), (2, 2, 1)])
def test_unpooling_is_torch_s_own_in_values_and_gradient(stride: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *[6, 12, 4][: len(stride)])
    pooled, indices = MaxPoolWithIndices(Layers(len(stride)), stride)(x)
    pooled.requires_grad_()
    theirs = {2: F.max_unpool2d, 3: F.max_unpool3d}[len(stride)](pooled, indices, stride)
    ours = max_unpool(pooled, indices, stride=stride)
    assert torch.equal(ours, theirs)
    weights = torch.randn_like(ours)
    grads = [torch.autograd.grad((y * weights).sum(), pooled)[0] for y in (ours, theirs)]
    assert torch.equal(*grads)


def test_a_maximum_returns_to_its_corner() -> None:
    x = torch.tensor([[[[1.0, 2.0, 8.0, 7.0], [4.0, 3.0, 5.0, 6.0]]]])
    pooled, indices = MaxPoolWithIndices(Layers(2), 2)(x)
    assert pooled.tolist() == [[[[4, 8]]]]
    assert max_unpool(-pooled, indices, stride=2).tolist() == [[[[0, 0, -8, 0], [-4, 0, 0, 0]]]]


@pytest.mark.parametrize("stride", [(2, 2), (8, 8), (3, 4), (2, 2, 2), (4, 4, 1)])
def test_a_transposed_convolution_starts_as_interpolation_away_from_the_borders(stride: tuple[int, ...]) -> None:
    up = TransposedBilinear(Layers(len(stride)), 3, stride=stride).double()
    x = torch.randn(2, 3, *[5] * len(stride), dtype=torch.float64)
    mode = "bilinear" if len(stride) == 2 else "trilinear"
    expected = F.interpolate(x, scale_factor=tuple(map(float, stride)), mode=mode)
    inside = (slice(None), slice(None), *[slice(s, 4 * s) for s in stride])
    assert up(x).shape == expected.shape
    torch.testing.assert_close(up(x)[inside], expected[inside])
