from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.nets.upernet import UPerNet

SMALL: dict[str, Any] = {"encoder": "resnet18", "width": 4, "channels": 4}


def count_on_meta(*args: Any, **kwargs: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UPerNet(*args, **kwargs).parameters())


@pytest.mark.parametrize(("deep_supervision", "count"), [(False, 64_031_315), (True, 64_031_315 + 2_364_691)])
def test_it_has_as_many_parameters_as_other_implementations(deep_supervision: bool, count: int) -> None:
    assert count_on_meta(2, 3, 19, norm="batch", deep_supervision=deep_supervision) == count


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (count_on_meta(dims, 1, 2) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((UPerNet.__doc__ or "").split())


def shape_given_by(network: UPerNet, part: nn.Module, x: Tensor) -> tuple[int, ...]:
    seen: list[tuple[int, ...]] = []
    hook = part.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape[1:])))
    network.eval()(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_pyramid_leads_from_1_32_to_1_4_where_all_levels_are_fused(dims: int) -> None:
    network = UPerNet(dims, 1, 2, **SMALL)
    size = (64, 96, 64)[:dims]
    x = torch.randn(1, 1, *size)

    def at(stride: int, channels: int = 4) -> tuple[int, ...]:
        return (channels, *[n // stride for n in size])

    assert shape_given_by(network, network.bottom, x) == at(32)
    for part, stride in zip([*network.laterals, *network.smooth], (4, 8, 16) * 2, strict=True):
        assert shape_given_by(network, part, x) == at(stride)
    assert network.fuse.conv.in_channels == 4 * 4
    assert shape_given_by(network, network.head, x) == at(4, channels=2)


def test_each_level_is_told_what_the_coarser_ones_have_found() -> None:
    torch.manual_seed(0)
    network = UPerNet(2, 1, 1, norm="none", activation="elu", **SMALL).double().eval()
    features = [torch.randn(1, n, 32 // s, 32 // s).double().requires_grad_() for n, s in
                zip(network.encoder.channels, (1, 2, 4, 8, 16), strict=True)]  # fmt: skip
    smoothed: list[Tensor] = []
    for smooth in network.smooth:
        smooth.register_forward_hook(lambda _, __, output: smoothed.append(output))
    network.classified(features)
    for smooth, own in zip(smoothed, (3, 2, 1), strict=True):  # from the coarsest level up
        gradients = torch.autograd.grad(smooth.sum(), features[1:], retain_graph=True, allow_unused=True)
        assert [g is not None for g in gradients] == [n >= own for n in range(1, 5)]


def test_every_voxel_knows_the_whole_image() -> None:
    torch.manual_seed(0)
    network = UPerNet(2, 1, 1, norm="none", activation="elu", **SMALL).eval()
    x = torch.randn(1, 1, 32, 1024, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[0, 0, 16, 0], x)
    assert gradient[..., -8:].abs().sum() > 0
