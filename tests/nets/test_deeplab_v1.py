from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets.deeplab_v1 import DeepLabV1


def on_meta(*args: Any, **kwargs: Any) -> DeepLabV1:
    with torch.device("meta"):
        return DeepLabV1(*args, **kwargs)


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_paper_s_network_has_as_many_parameters_as_other_implementations() -> None:
    assert num_parameters(on_meta(2, 3, 21, norm="none")) == 20_505_429


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((DeepLabV1.__doc__ or "").split())


def test_the_fifth_stage_is_dilated_and_fc6_looks_12_voxels_of_an_eighth_around() -> None:
    network = on_meta(2, 3, 21)
    dilations = [m.dilation[0] for m in network.encoder.modules() if isinstance(m, nn.Conv2d)]
    assert dilations == [1] * 10 + [2] * 3
    strides = [m.stride for m in network.encoder.modules() if isinstance(m, nn.MaxPool2d)]
    assert strides == [(2, 2)] * 3 + [1] * 2
    fc6 = network.classifier.branches[0][0]
    assert (fc6.kernel_size, fc6.dilation) == ((3, 3), (12, 12))
    assert network.encoder(torch.zeros(1, 3, 64, 32, device="meta"))[-1].shape[2:] == (8, 4)


@pytest.mark.parametrize(
    ("dims", "args", "dilation"),
    [
        (2, {"output_stride": 16}, (6, 6)),
        (2, {"rate": 4}, (4, 4)),
        (3, {}, (2, 2, 2)),
        (3, {"in_plane": True}, (12, 12, 1)),
    ],
)
def test_the_rate_suits_what_is_seen(dims: int, args: dict[str, Any], dilation: tuple[int, ...]) -> None:
    assert on_meta(dims, 1, 2, **args).classifier.branches[0][0].dilation == dilation


def test_the_field_of_view_grows_with_the_rate() -> None:
    reach = []
    for rate in (1, 3, 6):
        torch.manual_seed(0)
        network = DeepLabV1(2, 1, 1, width=2, fc_channels=2, rate=rate, norm="none", activation="elu").double().eval()
        x = torch.randn(1, 1, 16, 512, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(network(x)[0, 0, 8, 256], x)
        seen = gradient[0, 0].abs().sum(dim=0).nonzero()
        reach.append(int(seen.max() - seen.min()))
    assert reach[1] - reach[0] == pytest.approx(2 * 2 * 8, abs=8)  # maxima may lie anywhere in their blocks
    assert reach[2] - reach[1] == pytest.approx(2 * 3 * 8, abs=8)


def test_dropout_is_in_the_classifier_alone() -> None:
    network = on_meta(2, 1, 2)
    places = {name: m.p for name, m in network.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)}
    assert places == {"classifier.branches.0.2": 0.5, "classifier.branches.0.5": 0.5}


def test_a_classifier_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="fc_channels is 0"):
        on_meta(2, 1, 2, fc_channels=0)
