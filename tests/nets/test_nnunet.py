from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medseg.nets.blocks import Layers
from medseg.nets.nnunet import ResidualEncoderUNet, residual_block


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(*args: Any, **kwargs: Any) -> ResidualEncoderUNet:
    with torch.device("meta"):
        return ResidualEncoderUNet(*args, **kwargs)


def test_nnunet_s_residual_encoder_l_is_reached_but_for_the_coarsest_head() -> None:
    network = on_meta(3, 1, 3, bias=True, deep_supervision=True)
    unweighted_head = 320 * 3 + 3  # nnU-Net's loss gives the coarsest decoder level the weight 0
    assert num_parameters(network) == 102_350_575 - unweighted_head
    assert network.extra_weights == (0.5, 0.25, 0.125)


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((ResidualEncoderUNet.__doc__ or "").split())


@pytest.mark.parametrize(("dims", "stride"), [(2, 2), (3, (2, 2, 1))])
def test_a_block_adds_a_residual_to_its_averaged_and_projected_input(dims: int, stride: int | tuple[int, ...]) -> None:
    layers = Layers(dims, norm="none", activation="relu", bias=True)
    block = residual_block(layers, 3, 5, stride=stride)
    x = torch.randn(2, 3, *[8, 6, 4][:dims])
    pool, conv = (F.avg_pool2d, F.conv2d) if dims == 2 else (F.avg_pool3d, F.conv3d)
    projection = block.shortcut.projection.conv
    assert projection.bias is None
    shortcut = conv(pool(x, stride), projection.weight)
    torch.testing.assert_close(block(x), (block.blocks(x) + shortcut).relu())
    for part in block.blocks:
        nn.init.zeros_(part.conv.weight)
        nn.init.zeros_(part.conv.bias)
    torch.testing.assert_close(block(x), shortcut.relu())


def test_a_block_that_changes_nothing_but_values_passes_its_input_on_as_it_is() -> None:
    block = residual_block(Layers(2, norm="none", activation="relu"), 4, 4)
    for part in block.blocks:
        nn.init.zeros_(part.conv.weight)
    nn.init.zeros_(block.blocks[1].conv.bias)
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(block(x), x.relu())


def test_squeeze_and_excitation_weighs_each_residual_before_it_is_added() -> None:
    args: dict[str, Any] = {"channels": (4, 8), "blocks_per_stage": (1, 2), "norm": "none"}
    network = ResidualEncoderUNet(2, 1, 1, squeeze_excitation=True, **args)
    block = network.encoder[1][1]
    gate = block.blocks[-1]
    nn.init.constant_(gate.weigh[2].bias, -1000.0)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x), F.leaky_relu(x, 0.01))
    gates = (4 * 1 + 1 + 1 * 4 + 4) + 2 * (8 * 1 + 1 + 1 * 8 + 8)
    assert num_parameters(network) == num_parameters(ResidualEncoderUNet(2, 1, 1, **args)) + gates


def test_strides_may_differ_by_axis() -> None:
    network = ResidualEncoderUNet(
        3, 1, 2, channels=(4, 4, 4), strides=((2, 2, 1), 2), kernel_sizes=((3, 3, 1), 3, 3), blocks_per_stage=1
    ).eval()
    assert network.min_size == (4, 4, 2)
    assert network(torch.zeros(1, 1, 9, 8, 3)).shape == (1, 2, 9, 8, 3)
    assert network.encoder[0][0].conv.weight.shape[2:] == (3, 3, 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [({"channels": (4,)}, "two levels"), ({"blocks_per_stage": 0}, "at least 1"), ({"strides": (2, 2)}, "give 5")],
)
def test_arguments_that_cannot_be_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(2, 1, 1, **args)
