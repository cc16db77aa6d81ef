from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medseg.nets.unet_plus_plus import UNetPlusPlus

PAPER: dict[str, Any] = {"norm": "none"}
BILINEAR: dict[str, Any] = {"norm": "batch", "bias": True, "upsample": "interpolate"}
SMALL: dict[str, Any] = {"channels": (4, 6, 8, 10, 12)}


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(*args: Any, **kwargs: Any) -> UNetPlusPlus:
    with torch.device("meta"):
        return UNetPlusPlus(*args, **kwargs)


def supervised(dims: int = 2, **args: Any) -> UNetPlusPlus:
    torch.manual_seed(0)
    return UNetPlusPlus(dims, 1, 2, **{**SMALL, "deep_supervision": True, **args})


@pytest.mark.parametrize(
    ("channels", "args", "count"),
    [
        ((1, 1), PAPER, 9_041_601),
        ((3, 1), PAPER, 9_042_177),
        ((3, 1), BILINEAR, 9_163_329),
        ((3, 1), {**BILINEAR, "deep_supervision": True}, 9_163_428),
    ],
)
def test_it_has_as_many_parameters_as_other_implementations(
    channels: tuple[int, int], args: dict[str, Any], count: int
) -> None:
    assert num_parameters(on_meta(2, *channels, **args)) == count


def test_the_wide_implementation_differs_by_its_encoder_s_norms_and_by_wider_transposed_convolutions() -> None:
    widths = (64, 128, 256, 512, 1024)
    norms = sum(2 * 2 * width for width in widths)  # two convolutions a level, two weights a channel
    ups = zip(widths, widths[1:], (4, 3, 2, 1), strict=False)  # how many lead to each level
    wider_kernels = sum(num * (4**2 - 2**2) * below * width for width, below, num in ups)
    network = on_meta(2, 3, 1, channels=widths, deep_supervision=True, **PAPER)
    assert num_parameters(network) + norms + wider_kernels == 47_176_132


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((UNetPlusPlus.__doc__ or "").split())


def test_each_node_merges_all_that_stand_before_it_on_its_level_and_the_one_below() -> None:
    network = UNetPlusPlus(2, 1, 1, channels=(2, 3, 5, 7))
    fan_in = {name: node.blocks[0].conv.in_channels for name, node in network.nodes.items()}
    assert fan_in == {"0_1": 2 + 2, "0_2": 4 + 2, "0_3": 6 + 2, "1_1": 3 + 3, "1_2": 6 + 3, "2_1": 5 + 5}


@pytest.mark.parametrize("dims", [2, 3])
def test_all_outputs_of_deep_supervision_have_the_size_of_the_input_and_the_same_weight(dims: int) -> None:
    network = supervised(dims, channels=(2, 4, 4, 4)).train()
    outputs = network(torch.randn(2, 1, *[19, 16, 9][:dims]))
    assert [output.shape[2:] for output in outputs] == [torch.Size([19, 16, 9][:dims])] * 3
    assert network.extra_weights == (1.0, 1.0)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("upsample", ["transposed", "interpolate"])
def test_pruned_at_a_level_it_equals_that_output_of_deep_supervision(level: int, upsample: str) -> None:
    network = supervised(norm="instance", upsample=upsample)  # computes the same in training and evaluation
    pruned = UNetPlusPlus(2, 1, 2, norm="instance", upsample=upsample, pruned_at=level, **SMALL)
    pruned.load_state_dict(network.state_dict())
    x = torch.randn(2, 1, 35, 32)
    finest_first = network.train()(x)
    torch.testing.assert_close(pruned.eval()(x), finest_first[4 - level])
    assert len(pruned.train()(x)) == 4  # it still learns as a whole


def test_pruned_it_uses_the_nodes_above_that_level_alone() -> None:
    pruned = supervised(pruned_at=2).eval()
    pruned(torch.randn(1, 1, 32, 32)).square().sum().backward()
    used = {name.rsplit(".", 4)[0] for name, p in pruned.named_parameters() if p.grad is not None}
    assert {name for name in used if name.startswith("encoder")} == {"encoder.0", "encoder.1.1", "encoder.2.1"}
    assert {name for name in used if name.startswith("nodes")} == {"nodes.0_1", "nodes.1_1", "nodes.0_2"}


def test_pruned_it_computes_less_at_each_level_and_is_faster() -> None:
    x = torch.randn(1, 1, 64, 64)
    flops, seconds = [], []
    for level in (1, 2, 3, 4):
        network = UNetPlusPlus(2, 1, 2, channels=(8, 16, 32, 64, 128), pruned_at=level).eval()
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                network(x)
            flops.append(counter.get_total_flops())
            seconds.append(min(_seconds(network, x) for _ in range(5)))
    assert flops == sorted(set(flops))
    assert flops[3] > 2 * flops[0]
    assert seconds[0] < seconds[3]


def _seconds(network: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    network(x)
    return time.perf_counter() - start


def test_weights_trained_without_deep_supervision_cannot_be_pruned() -> None:
    plain = UNetPlusPlus(2, 1, 2, **SMALL)
    with pytest.raises(RuntimeError, match="extra_heads"):
        UNetPlusPlus(2, 1, 2, pruned_at=2, **SMALL).load_state_dict(plain.state_dict())


def test_strides_may_differ_by_axis() -> None:
    for upsample in ("transposed", "interpolate"):
        network = UNetPlusPlus(
            3, 1, 2, channels=(4, 4, 4), strides=((2, 2, 1), 2), kernel_sizes=((3, 3, 1), 3, 3), upsample=upsample
        ).eval()
        assert network.min_size == (4, 4, 2)
        assert network(torch.zeros(1, 1, 9, 8, 3)).shape == (1, 2, 9, 8, 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"channels": (4,)}, "two levels"),
        ({"pruned_at": 5}, "pruned_at is 5; it must be from 1 to 4"),
        ({"pruned_at": 0}, "pruned_at is 0"),
        ({"upsample": "nearest"}, "upsample is 'nearest'"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(2, 1, 1, **args)
