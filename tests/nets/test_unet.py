from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets.unet import UNet

PAPER: dict[str, Any] = {
    "channels": (64, 128, 256, 512, 1024),
    "norm": "none",
    "activation": "relu",
    "downsample": "maxpool",
}


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(*args: Any, **kwargs: Any) -> UNet:
    with torch.device("meta"):  # counts need no memory
        return UNet(*args, **kwargs)


@pytest.mark.parametrize(
    ("channels", "norm", "bias", "count"),
    [
        ((1, 1), "none", None, 31_030_593),
        ((1, 2), "none", None, 31_030_658),
        ((3, 1), "none", None, 31_031_745),
        ((3, 1), "batch", None, 31_037_633),
        ((3, 1), "batch", True, 31_043_521),
    ],
)
def test_the_paper_s_network_has_as_many_parameters_as_other_implementations(
    channels: tuple[int, int], norm: str, bias: bool | None, count: int
) -> None:
    assert num_parameters(on_meta(2, *channels, **{**PAPER, "norm": norm, "bias": bias})) == count


def test_the_paper_s_network_has_23_convolutions() -> None:
    network = on_meta(2, 1, 2, **PAPER)
    assert sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in network.modules()) == 23


@pytest.mark.parametrize(
    ("channels", "count"), [((32, 64, 128, 256), 5_603_177), ((32, 64, 128, 256, 320, 320), 31_196_399)]
)
def test_nnunet_s_plain_network_is_reached_but_for_the_coarsest_head(channels: tuple[int, ...], count: int) -> None:
    network = on_meta(3, 1, 3, channels=channels, bias=True, deep_supervision=True)
    unweighted_head = channels[-2] * 3 + 3  # nnU-Net's loss gives the coarsest decoder level the weight 0
    assert num_parameters(network) == count - unweighted_head
    assert network.extra_weights == tuple(0.5**n for n in range(1, len(channels) - 2))


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((UNet.__doc__ or "").split())


def test_valid_convolutions_give_388_voxels_of_572_as_in_the_paper() -> None:
    network = UNet(2, 1, 2, padding="valid", **{**PAPER, "channels": (1, 1, 1, 1, 1)}).eval()
    assert network(torch.zeros(1, 1, 572, 188)).shape == (1, 2, 388, 4)
    assert network.min_size == (188, 188)
    assert network.efficient_size((570, 563)) == (572, 556)


def test_valid_convolutions_never_see_beyond_the_input() -> None:
    torch.manual_seed(0)
    network = UNet(2, 1, 1, padding="valid", **{**PAPER, "channels": (2, 3)}).double().eval()
    x = torch.randn(1, 1, 44, 44, dtype=torch.float64)
    shifted = network(x[..., 2:, 2:])  # the same voxels, two further on: one step of the pooling
    torch.testing.assert_close(network(x)[..., 2:, 2:], shifted)


def test_valid_convolutions_refuse_what_they_do_not_go_with() -> None:
    with pytest.raises(ValueError, match="maxpool"):
        UNet(2, 1, 1, padding="valid")


def test_anisotropic_strides_and_kernels_leave_thick_slices_alone() -> None:
    network = UNet(3, 1, 2, channels=(4, 4, 4), strides=((2, 2, 1), (2, 2, 2)), kernel_sizes=((3, 3, 1), 3, 3)).eval()
    assert network.min_size == (4, 4, 2)
    assert network(torch.zeros(1, 1, 9, 8, 3)).shape == (1, 2, 9, 8, 3)
    assert network.encoder[0].blocks[0].conv.weight.shape[2:] == (3, 3, 1)


@pytest.mark.parametrize("dims", [2, 3])
def test_each_choice_of_layers_works(dims: int) -> None:
    x = torch.randn(2, 1, *[18] * dims)
    for args in (
        {"residual": True},
        {"residual": True, "downsample": "maxpool"},
        {"upsample": "interpolate", "norm": "group", "activation": "silu"},
        {"convs_per_stage": (1, 2, 3), "decoder_convs_per_stage": 1, "dropout": 0.2, "activation": "gelu"},
        {"strides": 3, "norm": "instance", "activation": "prelu"},
    ):
        network = UNet(dims, 1, 2, **{"channels": (4, 4, 8), **args})
        logits = network(x)
        logits.sum().backward()
        assert logits.shape == (2, 2, *[18] * dims)
        assert all(p.grad is not None for p in network.parameters())


def test_a_residual_stage_sums_its_input_before_the_activation() -> None:
    network = UNet(2, 4, 1, channels=(4, 4), residual=True, norm="none", activation="relu").eval()
    stage = network.encoder[0]
    for block in stage.blocks:
        nn.init.zeros_(block.conv.weight)
    x = torch.randn(1, 4, 4, 4)
    assert torch.equal(stage(x), x.relu())


def test_an_input_that_does_not_fit_is_continued_by_its_last_voxels() -> None:
    torch.manual_seed(0)
    network = UNet(2, 1, 1, channels=(4, 4, 4)).eval()
    x = torch.randn(1, 1, 10, 12)
    continued = torch.cat([x, x[..., -1:, :].expand(-1, -1, 2, -1)], dim=2)
    torch.testing.assert_close(network(x), network(continued)[..., :10, :])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"channels": (4,)}, "two levels"),
        ({"strides": (2, 2, 2)}, "strides has 3 entries; give 4"),
        ({"kernel_sizes": 4}, "odd kernels"),
        ({"kernel_sizes": ((3, 3, 3), 3, 3, 3, 3)}, "one an axis"),
        ({"convs_per_stage": 0}, "at least 1"),
        ({"downsample": "avgpool"}, "downsample is 'avgpool'"),
        ({"upsample": "nearest"}, "upsample is 'nearest'"),
        ({"padding": "reflect"}, "padding is 'reflect'"),
        ({"norm": "layr"}, "norm"),
        ({"activation": "reul"}, "did you mean 'relu'"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        on_meta(2, 1, 1, **args)
    assert isinstance(caught.value, ValueError) or caught.value.error_id == "E-UNKNOWN-NAME"
