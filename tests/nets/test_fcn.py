from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medseg.nets.fcn import FCN

PAPER: dict[str, Any] = {"fc_channels": 4096, "fc_kernel_size": 7, "norm": "none"}
SMALL: dict[str, Any] = {"channels": (4, 6, 8), "convs_per_stage": 1, "fc_channels": 8, "output_stride": 2}


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(*args: Any, **kwargs: Any) -> FCN:
    with torch.device("meta"):
        return FCN(*args, **kwargs)


@pytest.mark.parametrize(
    ("output_stride", "upsample", "count"),
    [
        (32, "interpolate", 134_346_581),
        (16, "interpolate", 134_357_354),
        (8, "interpolate", 134_362_751),
        (8, "transposed", 134_489_759),
    ],
)
def test_the_paper_s_networks_have_as_many_parameters_as_other_implementations(
    output_stride: int, upsample: str, count: int
) -> None:
    assert num_parameters(on_meta(2, 3, 21, output_stride=output_stride, upsample=upsample, **PAPER)) == count


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((FCN.__doc__ or "").split())


@pytest.mark.parametrize(("output_stride", "ups"), [(32, [32]), (16, [2, 16]), (8, [2, 2, 8])])
def test_each_skip_halves_the_last_step(output_stride: int, ups: list[int]) -> None:
    network = on_meta(2, 1, 2, output_stride=output_stride)
    assert [up.conv.stride[0] for up in network.ups] == ups
    assert [score.in_channels for score in network.scores] == [1024, 512, 256][: len(ups)]


@pytest.mark.parametrize("dims", [2, 3])
def test_upsampling_starts_as_the_interpolation_it_could_stay(dims: int) -> None:
    torch.manual_seed(0)
    learned = FCN(dims, 1, 2, **SMALL).double().eval()
    fixed = FCN(dims, 1, 2, upsample="interpolate", **SMALL).double().eval()
    fixed.load_state_dict({name: w for name, w in learned.state_dict().items() if not name.startswith("ups.")})
    x = torch.randn(1, 1, *[48] * dims, dtype=torch.float64)
    inside = (slice(None), slice(None), *[slice(16, 32)] * dims)  # away from borders, where it fades to 0
    torch.testing.assert_close(learned(x)[inside], fixed(x)[inside])
    assert not torch.allclose(learned(x), fixed(x))


def test_skips_are_summed() -> None:
    torch.manual_seed(0)
    network = FCN(2, 1, 2, upsample="interpolate", **SMALL).eval()
    x = torch.randn(1, 1, 32, 32)
    first, second, third, hidden = network.encoder(x)
    assert [f.shape[1] for f in (first, second, third, hidden)] == [4, 6, 8, 8]
    scores = network.scores[0](hidden)
    for score, stage in ((network.scores[1], second), (network.scores[2], first)):
        scores = F.interpolate(scores, scale_factor=2, mode="bilinear") + score(F.max_pool2d(stage, 2))
    torch.testing.assert_close(network(x), F.interpolate(scores, scale_factor=2, mode="bilinear"))


def test_dropout_is_in_the_classifier_alone() -> None:
    network = on_meta(2, 1, 2)
    places = {name: m.p for name, m in network.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)}
    assert places == {"encoder.classifier.2": 0.5, "encoder.classifier.5": 0.5}


def test_the_third_axis_of_thick_slices_keeps_its_resolution() -> None:
    network = FCN(3, 1, 2, in_plane=True, **SMALL).eval()
    assert network.min_size == (8, 8, 1)
    assert network.encoder(torch.zeros(1, 1, 16, 16, 3))[-1].shape[2:] == (2, 2, 3)
    assert network(torch.zeros(1, 1, 17, 16, 3)).shape == (1, 2, 17, 16, 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"output_stride": 64}, "output_stride is 64; it must be one of 32, 16, 8, 4, 2"),
        ({"upsample": "nearest"}, "upsample is 'nearest'"),
        ({"channels": ()}, "at least one stage"),
        ({"convs_per_stage": (1, 2)}, "convs_per_stage has 2 entries; give 5"),
        ({"convs_per_stage": 0}, "at least 1"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(2, 1, 2, **args)
