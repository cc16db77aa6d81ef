from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medseg.nets.deeplab_v2 import DeepLabV2

SMALL: dict[str, Any] = {"encoder": "resnet18", "width": 4, "rates": (1, 2)}
PAPER_SCALES = (1.0, 0.75, 0.5)


def on_meta(*args: Any, **kwargs: Any) -> DeepLabV2:
    with torch.device("meta"):
        return DeepLabV2(*args, **kwargs)


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("args", "count"),
    [
        ({"encoder": "vgg16", "norm": "none"}, 37_877_652),
        ({"encoder": "resnet101", "norm": "batch"}, 44_048_532),
        ({"encoder": "resnet101", "norm": "batch", "scales": PAPER_SCALES}, 44_048_532),  # all scales share them
    ],
)
def test_the_paper_s_networks_have_as_many_parameters_as_other_implementations(
    args: dict[str, Any], count: int
) -> None:
    assert num_parameters(on_meta(2, 3, 21, **args)) == count


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((DeepLabV2.__doc__ or "").split())


@pytest.mark.parametrize(
    ("dims", "args", "dilations"),
    [
        (2, {}, [6, 12, 18, 24]),
        (2, {"output_stride": 16}, [3, 6, 9, 12]),
        (3, {}, [1, 2, 3, 4]),
        (3, {"in_plane": True}, [6, 12, 18, 24]),
    ],
)
def test_the_rates_suit_what_is_seen(dims: int, args: dict[str, Any], dilations: list[int]) -> None:
    network = on_meta(dims, 1, 2, **args)
    assert [branch.dilation[0] for branch in network.aspp.branches] == dilations
    assert {branch.dilation[-1] for branch in network.aspp.branches} == ({1} if "in_plane" in args else {*dilations})


@pytest.mark.parametrize("encoder", ["vgg16", "resnet18"])
def test_the_logits_of_all_rates_are_summed(encoder: str) -> None:
    torch.manual_seed(0)
    network = DeepLabV2(2, 1, 2, **{**SMALL, "encoder": encoder}).eval()
    x = torch.randn(1, 1, 32, 48)
    features = network.encoder(x)[-1]
    first, second = network.aspp.branches
    summed = first(features) + second(features)
    torch.testing.assert_close(network(x), F.interpolate(summed, size=(32, 48), mode="bilinear"))


def test_with_vgg_each_branch_is_a_classifier_of_two_hidden_layers() -> None:
    with_vgg, with_resnet = (on_meta(2, 3, 21, encoder=encoder) for encoder in ("vgg16", "resnet50"))
    for branch in with_vgg.aspp.branches:
        assert [m.out_channels for m in branch if isinstance(m, nn.Conv2d)] == [1024, 1024, 21]
    assert [branch.out_channels for branch in with_resnet.aspp.branches] == [21] * 4


def test_over_several_scales_each_voxel_takes_the_highest_logit() -> None:
    torch.manual_seed(0)
    single = DeepLabV2(2, 1, 3, **SMALL).eval()
    several = DeepLabV2(2, 1, 3, **SMALL, scales=PAPER_SCALES).eval()
    several.load_state_dict(single.state_dict())
    x = torch.randn(1, 1, 64, 96)
    at_scales = [
        single.classified(single.encoder(F.interpolate(x, size=size, mode="bilinear")))
        for size in ((64, 96), (48, 72), (32, 48))
    ]
    seen = torch.stack([F.interpolate(logits, size=(8, 12), mode="bilinear") for logits in at_scales])
    torch.testing.assert_close(several(x), F.interpolate(seen.amax(dim=0), size=(64, 96), mode="bilinear"))


def test_in_training_each_scale_is_supervised_at_its_own_resolution() -> None:
    network = DeepLabV2(3, 1, 3, **SMALL, scales=PAPER_SCALES).train()
    outputs = network(torch.randn(2, 1, 64, 61, 64))
    assert network.extra_weights == (1.0, 1.0, 1.0)
    assert [tuple(output.shape[2:]) for output in outputs] == [(64, 61, 64), (8, 8, 8), (6, 6, 6), (4, 4, 4)]
    assert isinstance(network.eval()(torch.randn(1, 1, 16, 16, 16)), torch.Tensor)


def test_the_smallest_image_can_be_trained_on_at_several_scales() -> None:
    network = DeepLabV2(2, 1, 3, **SMALL, scales=PAPER_SCALES, norm="batch").train()
    assert all(output.isfinite().all() for output in network(torch.randn(1, 1, *network.min_size)))


def test_scales_leave_the_third_axis_of_thick_slices_alone() -> None:
    network = DeepLabV2(3, 1, 3, **SMALL, scales=(1.0, 0.5), in_plane=True).train()
    assert [tuple(output.shape[2:]) for output in network(torch.randn(1, 1, 32, 32, 5))] == [
        (32, 32, 5), (4, 4, 5), (2, 2, 5),
    ]  # fmt: skip


@pytest.mark.parametrize("scales", [(), (0.5, 1.0), (1.0, 0.0)])
def test_scales_that_cannot_be_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="the largest first"):
        on_meta(2, 1, 2, scales=scales)


def test_no_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="rates is empty"):
        on_meta(2, 1, 2, rates=())
