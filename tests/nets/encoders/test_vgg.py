from __future__ import annotations

from typing import Any

import pytest
import torch

from medseg.nets.encoders.vgg import VGG


def on_meta(*args: Any, **kwargs: Any) -> VGG:
    with torch.device("meta"):
        return VGG(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "count"),
    [  # torchvision's vgg11, vgg16, vgg16_bn and vgg19
        ({"norm": "none", "convs_per_stage": (1, 1, 2, 2, 2)}, 132_863_336),
        ({"norm": "none"}, 138_357_544),
        ({"norm": "batch"}, 138_365_992),
        ({"norm": "none", "convs_per_stage": (2, 2, 4, 4, 4)}, 143_667_240),
    ],
)
def test_it_has_as_many_parameters_as_torchvision_s_but_for_the_last_layer(args: dict[str, Any], count: int) -> None:
    scores = 4096 * 1000 + 1000
    assert sum(p.numel() for p in on_meta(2, 3, fc_channels=4096, **args).parameters()) == count - scores


def test_the_docstring_states_the_number_of_parameters_without_the_classifier() -> None:
    counts = [sum(p.numel() for p in on_meta(2, 3, norm=norm).parameters()) for norm in ("none", "batch")]
    assert all(f"{count:,}" in (VGG.__doc__ or "") for count in counts)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("in_plane", [False, True])
def test_features_have_the_channels_and_resolutions_that_it_states(dims: int, in_plane: bool) -> None:
    encoder = VGG(dims, 2, channels=(2, 3, 4), convs_per_stage=(1, 2, 1), fc_channels=5, in_plane=in_plane).eval()
    size = (16, 24, 8)[:dims]
    features = encoder(torch.zeros(1, 2, *size))
    assert encoder.channels == (2, 3, 4, 5)
    for feature, channels, stride in zip(features, encoder.channels, encoder.strides, strict=True):
        assert feature.shape == (1, channels, *[n // s for n, s in zip(size, stride, strict=True)])
    assert encoder.strides[-1] == (8, 8, 1 if in_plane else 8)[:dims]


def test_a_stage_is_its_convolutions_without_the_pooling() -> None:
    encoder = VGG(2, 1, channels=(2, 3), convs_per_stage=2).eval()
    x = torch.randn(1, 1, 8, 8)
    first, second, pooled = encoder(x)
    assert torch.equal(encoder.stage(0, x), first)
    assert torch.equal(encoder.stage(1, torch.nn.functional.max_pool2d(first, 2)), second)
    assert torch.equal(torch.nn.functional.max_pool2d(second, 2), pooled)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("in_plane", [False, True])
def test_with_an_output_stride_later_poolings_keep_the_resolution_and_convolutions_are_dilated(
    dims: int, in_plane: bool
) -> None:
    encoder = VGG(
        dims, 1, channels=(2, 3, 4, 5), convs_per_stage=1, output_stride=4, pooled=True, in_plane=in_plane
    ).eval()
    third = 1 if in_plane else 4
    size = (16, 24, 8)[:dims]
    features = encoder(torch.zeros(1, 1, *size))
    assert encoder.channels == (2, 3, 4, 5)
    assert encoder.strides == ((2, 2, min(2, third))[:dims], *[(4, 4, third)[:dims]] * 3)
    for feature, channels, stride in zip(features, encoder.channels, encoder.strides, strict=True):
        assert feature.shape == (1, channels, *[n // s for n, s in zip(size, stride, strict=True)])
    convs = [module for module in encoder.features if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d)]
    assert [conv.dilation[0] for conv in convs] == [1, 1, 1, 2]
    assert [conv.dilation[-1] for conv in convs] == ([1] * 4 if in_plane and dims == 3 else [1, 1, 1, 2])


def test_the_output_stride_changes_no_weight() -> None:
    plain, dense = on_meta(2, 3), on_meta(2, 3, output_stride=8)
    assert {name: w.shape for name, w in plain.state_dict().items()} == {
        name: w.shape for name, w in dense.state_dict().items()
    }


def test_pooled_features_are_those_after_each_pooling() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 8, 8)
    before = VGG(2, 1, channels=(2, 3), convs_per_stage=1).eval()
    after = VGG(2, 1, channels=(2, 3), convs_per_stage=1, pooled=True).eval()
    after.load_state_dict(before.state_dict())
    expected = [torch.nn.functional.max_pool2d(feature, 2) for feature in before(x)[:-1]]
    assert all(torch.equal(a, b) for a, b in zip(after(x), expected, strict=True))


def test_an_output_stride_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="output_stride is 3; it must be one of 2, 4, 8, 16, 32"):
        on_meta(2, 1, output_stride=3)
