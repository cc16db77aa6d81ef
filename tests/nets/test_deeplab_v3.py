from __future__ import annotations

from typing import Any

import pytest
import torch

from medseg.nets.deeplab_v3 import DeepLabV3


def count_on_meta(*args: Any, **kwargs: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DeepLabV3(*args, **kwargs).parameters())


@pytest.mark.parametrize(
    ("args", "count"),
    [
        ({"encoder": "resnet50"}, 39_638_869),
        ({"encoder": "resnet101"}, 58_630_997),
        ({"encoder": "resnet50", "output_stride": 16}, 39_638_869),
        ({"encoder": "resnet50", "deep_supervision": True}, 42_004_074),
    ],
)
def test_it_has_as_many_parameters_as_torchvision_s(args: dict[str, Any], count: int) -> None:
    assert count_on_meta(2, 3, 21, norm="batch", **args) == count


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (count_on_meta(dims, 1, 2) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((DeepLabV3.__doc__ or "").split())


def test_its_rates_are_doubled_at_an_output_stride_of_8_as_in_the_paper() -> None:
    with torch.device("meta"):
        dilations = {
            stride: [branch.conv.dilation for branch in DeepLabV3(2, 1, 2, output_stride=stride).aspp.branches[1:-1]]
            for stride in (8, 16)
        }
    assert dilations == {8: [(12, 12), (24, 24), (36, 36)], 16: [(6, 6), (12, 12), (18, 18)]}


@pytest.mark.parametrize("output_stride", [8, 16])
def test_it_computes_at_its_output_stride(output_stride: int) -> None:
    network = DeepLabV3(2, 1, 2, encoder="resnet18", width=4, output_stride=output_stride).eval()
    assert network.min_size == (output_stride, output_stride)
    assert network.aspp(network.encoder(torch.randn(1, 1, 64, 32))[-1]).shape[2:] == (
        64 // output_stride,
        32 // output_stride,
    )
