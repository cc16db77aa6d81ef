from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets.unet_3_plus import UNet3Plus

AUTHORS: dict[str, Any] = {"norm": "batch", "bias": True}
SMALL: dict[str, Any] = {"channels": (4, 6, 8, 10), "skip_channels": 3}


def on_meta(*args: Any, **kwargs: Any) -> UNet3Plus:
    with torch.device("meta"):
        return UNet3Plus(*args, **kwargs)


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("deep_supervision", "count"), [(False, 26_971_777), (True, 26_989_637)])
def test_it_has_as_many_parameters_as_the_authors_network(deep_supervision: bool, count: int) -> None:
    assert num_parameters(on_meta(2, 3, 1, deep_supervision=deep_supervision, **AUTHORS)) == count


def test_the_class_guided_module_has_one_score_for_each_output() -> None:
    yes_and_no = 2 * (1024 + 1)  # the authors' answer of two numbers for the single organ
    ours = 1024 + 1
    assert num_parameters(on_meta(2, 3, 1, class_guided=True, **AUTHORS)) - ours + yes_and_no == 26_991_687


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((UNet3Plus.__doc__ or "").split())


def test_every_level_of_the_decoder_sees_all_scales_finer_from_the_encoder_and_coarser_decoded() -> None:
    network = UNet3Plus(2, 1, 1, **SMALL)
    fan_in = [
        [next(m for m in scale.modules() if isinstance(m, nn.Conv2d)).in_channels for scale in level.scales]
        for level in network.levels
    ]
    wide = 4 * 3
    assert fan_in == [[4, wide, wide, 10], [4, 6, wide, 10], [4, 6, 8, 10]]
    assert [level.merge.conv.out_channels for level in network.levels] == [wide] * 3


@pytest.mark.parametrize("dims", [2, 3])
def test_deep_supervision_scores_every_scale_with_the_same_weight(dims: int) -> None:
    network = UNet3Plus(dims, 1, 2, deep_supervision=True, **SMALL).train()
    outputs = network(torch.randn(2, 1, *[16, 24, 8][:dims]))
    assert [tuple(o.shape[2:]) for o in outputs] == [
        tuple(n // stride for n in (16, 24, 8)[:dims]) for stride in (1, 2, 4, 8)
    ]
    assert network.extra_weights == (1.0,) * 3


@pytest.mark.parametrize("dims", [2, 3])
def test_the_class_guided_module_multiplies_the_odds_of_a_class_by_its_probability_to_be_there(dims: int) -> None:
    torch.manual_seed(0)
    guided = UNet3Plus(dims, 1, 2, class_guided=True, norm="instance", **SMALL).eval().double()
    plain = UNet3Plus(dims, 1, 2, deep_supervision=True, norm="instance", **SMALL).eval().double()
    plain.load_state_dict({k: v for k, v in guided.state_dict().items() if not k.startswith("classifier")})
    x = torch.randn(2, 1, *[16, 24, 8][:dims], dtype=torch.float64)
    guided.classifier[0].p = 0.0
    *outputs, scores = guided.train()(x)
    present = scores.flatten(2).amax(dim=2).sigmoid().view(2, 2, *[1] * dims)
    for with_gate, without in zip(outputs, plain.train()(x), strict=True):
        torch.testing.assert_close(with_gate.exp(), without.exp() * present)
    torch.testing.assert_close(guided.eval()(x), outputs[0])


def test_a_class_that_is_nowhere_in_the_image_is_held_back_everywhere() -> None:
    torch.manual_seed(0)
    network = UNet3Plus(2, 1, 3, class_guided=True, **SMALL).eval()
    with torch.no_grad():
        network.classifier[1].weight.zero_()
        network.classifier[1].bias.copy_(torch.tensor([50.0, -50.0, 50.0]))
    found = network(torch.randn(2, 1, 32, 32)).argmax(dim=1)
    assert set(found.unique().tolist()) == {0, 2}


def test_the_class_guided_module_learns_from_its_own_loss_and_from_the_segmentation() -> None:
    torch.manual_seed(0)
    network = UNet3Plus(2, 1, 2, class_guided=True, **SMALL).train()
    assert network.extra_weights == (1.0,) * 4  # three scales and the scores of the classes
    for used in (slice(0, 1), slice(-1, None)):
        network.zero_grad()
        sum(output.square().mean() for output in network(torch.randn(2, 1, 32, 32))[used]).backward()
        assert network.classifier[1].weight.grad.abs().sum() > 0


def test_strides_may_differ_by_axis() -> None:
    network = UNet3Plus(3, 1, 2, channels=(4, 4, 4), skip_channels=2, strides=((2, 2, 1), 2)).eval()
    assert network.min_size == (4, 4, 2)
    assert network(torch.zeros(1, 1, 9, 8, 3)).shape == (1, 2, 9, 8, 3)


def test_a_single_level_is_refused() -> None:
    with pytest.raises(ValueError, match="two levels"):
        on_meta(2, 1, 1, channels=(4,))
