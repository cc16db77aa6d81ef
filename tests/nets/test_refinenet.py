from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medseg.nets.blocks import Layers
from medseg.nets.refinenet import ChainedResidualPooling, RefineBlock, RefineNet, ResidualConvUnit

PLAIN = {dims: Layers(dims, norm="none", activation="relu") for dims in (2, 3)}
SMALL: dict[str, Any] = {"encoder": "resnet18", "width": 4, "channels": (4, 4, 6, 8)}


def on_meta(*args: Any, **kwargs: Any) -> RefineNet:
    with torch.device("meta"):
        return RefineNet(*args, **kwargs)


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def conv(inputs: int, outputs: int) -> int:
    return 9 * inputs * outputs + outputs


def test_the_parameters_are_those_of_the_paper_s_parts() -> None:
    blocks = 0
    for own, width, coarser, units in ((256, 256, 256, 3), (512, 256, 256, 1), (1024, 256, 512, 1), (2048, 512, 0, 1)):
        blocks += conv(own, width) + 2 * 2 * conv(width, width)  # to the block's channels, two units
        if coarser:
            blocks += 2 * 2 * conv(coarser, coarser) + conv(coarser, width) + conv(width, width)  # two units; fusion
        blocks += 4 * conv(width, width) + units * 2 * conv(width, width)  # chained pooling, units at the end
    count = num_parameters(on_meta(2, 3, 21, encoder="resnet101", norm="batch", num_pools=4))
    assert count == 42_500_160 + blocks + conv(256, 21)  # ResNet-101's convolutions as torchvision's
    assert f"{count:,} parameters for 21 classes" in " ".join((RefineNet.__doc__ or "").split())


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((RefineNet.__doc__ or "").split())


def test_a_residual_unit_adds_two_convolutions_behind_activations_to_its_input() -> None:
    torch.manual_seed(0)
    unit = ResidualConvUnit(PLAIN[2], 3)
    x = torch.randn(1, 3, 6, 5)
    given = x.clone()
    expected = x + unit.last.conv(F.relu(unit.first.conv(F.relu(x))))
    torch.testing.assert_close(unit(x), expected)
    assert torch.equal(x, given)  # an activation in place must not reach the identity path


@pytest.mark.parametrize("dims", [2, 3])
def test_chained_pooling_sums_the_maxima_of_wider_and_wider_neighborhoods(dims: int) -> None:
    chain = ChainedResidualPooling(PLAIN[dims], 1, num_pools=2, in_plane=False)
    for block in chain.convs:
        nn.init.dirac_(block.conv.weight)
        nn.init.zeros_(block.conv.bias)
    x = torch.zeros(1, 1, *[13] * dims)
    x[(0, 0, *[6] * dims)] = 1
    distance = (torch.arange(13) - 6).abs()
    expected = (distance == 0).float() + (distance <= 2) + (distance <= 4)
    assert torch.equal(chain(x)[(0, 0, *[6] * (dims - 1))], expected)
    assert torch.equal(chain(x)[(0, 0, *[8] * (dims - 1))], expected - (distance == 0).float())


def test_a_block_sums_its_inputs_at_the_finest_resolution() -> None:
    torch.manual_seed(0)
    block = RefineBlock(PLAIN[2], [5, 4], 3, num_pools=2, num_output_units=1, in_plane=False).double()
    fine, coarse = torch.randn(1, 5, 8, 12).double(), torch.randn(1, 4, 4, 6).double()
    summed = block.fuse[0](block.adapt[0](block.reduce(fine))) + F.interpolate(
        block.fuse[1](block.adapt[1](coarse)), scale_factor=2, mode="bilinear"
    )
    torch.testing.assert_close(block([fine, coarse]), block.refine(block.pool(summed)))


def test_four_blocks_go_from_a_32nd_to_a_quarter_of_the_resolution() -> None:
    network = RefineNet(2, 1, 2, **SMALL).eval()
    shapes = []
    for block in reversed(network.blocks):
        block.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    network(torch.zeros(1, 1, 64, 96))
    assert shapes == [(8, 2, 3), (6, 4, 6), (4, 8, 12), (4, 16, 24)]


def test_identity_paths_carry_the_gradient_from_the_logits_to_the_coarsest_features() -> None:
    torch.manual_seed(0)
    network = RefineNet(2, 1, 2, **SMALL).train()
    for module in network.blocks.modules():
        if isinstance(module, ResidualConvUnit):
            for tensor in module.parameters():
                nn.init.zeros_(tensor)  # all units: what is left are sums, fusions and pooling
    network(torch.randn(2, 1, 64, 64)).square().mean().backward()
    assert network.encoder.layer4[-1].conv2.weight.grad.abs().sum() > 0


def test_there_is_no_norm_behind_the_encoder() -> None:
    norms = (nn.BatchNorm2d, nn.GroupNorm)
    network = on_meta(2, 1, 2)
    assert any(isinstance(module, norms) for module in network.encoder.modules())
    assert not any(isinstance(module, norms) for module in network.blocks.modules())


def test_channels_need_an_entry_a_block() -> None:
    with pytest.raises(ValueError, match="channels has 3 entries; give 4"):
        on_meta(2, 1, 2, channels=(4, 4, 4))
