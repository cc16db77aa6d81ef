from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.nets.blocks import resize
from medseg.nets.pixelnet import PixelNet, hypercolumns

PAPER: dict[str, Any] = {"fc_channels": 4096, "fc_kernel_size": 7, "mlp_channels": (4096, 4096), "norm": "none"}
SMALL: dict[str, Any] = {
    "channels": (4, 6), "convs_per_stage": 1, "fc_channels": 5, "mlp_channels": (7, 8), "dropout": 0.0,
}  # fmt: skip


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(*args: Any, **kwargs: Any) -> PixelNet:
    with torch.device("meta"):
        return PixelNet(*args, **kwargs)


def made(dims: int, **args: Any) -> PixelNet:
    torch.manual_seed(0)
    return PixelNet(dims, 1, 3, **{**SMALL, "norm": "group", **args}).double()


def image(dims: int) -> Tensor:
    return torch.randn(2, 1, *[8, 12, 8][:dims], dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_paper_s_network_is_vgg_16_and_an_mlp_on_its_hypercolumn() -> None:
    vgg16 = 138_357_544 - (4096 * 1000 + 1000)  # torchvision's, without the scores of its 1000 classes
    hypercolumn = 64 + 128 + 256 + 512 + 512 + 4096
    mlp = (hypercolumn + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * 21
    count = num_parameters(on_meta(2, 3, 21, **PAPER))
    assert count == vgg16 + mlp
    assert f"{count:,} parameters for 21 classes" in " ".join((PixelNet.__doc__ or "").split())


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((PixelNet.__doc__ or "").split())


@pytest.mark.parametrize("dims", [2, 3])
def test_hypercolumns_are_what_interpolated_features_hold_at_these_voxels(dims: int) -> None:
    torch.manual_seed(0)
    size = [8, 12, 4][:dims]
    features = [torch.randn(2, 3, *[n // stride for n in size], dtype=torch.float64) for stride in (1, 2, 4)]
    index = torch.randint(8 * 12, (2, 20))
    index[:, :2] = torch.tensor([0, 8 * 12 - 1])  # corners, where interpolation continues the last voxel
    found = hypercolumns(features, index, size)
    stacked = torch.cat([resize(feature, size) for feature in features], dim=1).flatten(2)
    assert found.shape == (2, 9, 20, *[1] * (dims - 1))
    torch.testing.assert_close(found.flatten(2), stacked.gather(2, index[:, None].expand(-1, 9, -1)))


@pytest.mark.parametrize("dims", [2, 3])
def test_logits_are_an_mlp_on_the_features_of_every_depth_interpolated_to_the_image(dims: int) -> None:
    network = made(dims).eval()
    x = image(dims)
    columns = torch.cat([resize(feature, x.shape[2:]) for feature in network.encoder(x)], dim=1)
    assert columns.shape[1] == 4 + 6 + 5
    torch.testing.assert_close(network(x), network.mlp(network.column(columns)))


@pytest.mark.parametrize("dims", [2, 3])
def test_sampling_changes_no_logit(dims: int) -> None:
    sampled, dense = (made(dims, num_sampled_pixels=number).train() for number in (30, 0))
    torch.testing.assert_close(sampled(image(dims)), dense(image(dims)))


def test_only_the_sampled_voxels_pass_a_gradient_on() -> None:
    network = made(2, num_sampled_pixels=5).train()
    logits = network(image(2))
    alive = [
        (position, torch.autograd.grad(logits[position].sum(), network.column.weight, retain_graph=True)[0])
        for position in [(n, slice(None), i, j) for n in range(2) for i in range(8) for j in range(12)]
    ]
    for n in range(2):
        passing = sum(bool(gradient.abs().sum()) for (sample, *_), gradient in alive if sample == n)
        assert 1 <= passing <= 5  # a voxel may be drawn twice


def test_the_gradient_of_the_sampled_voxels_is_on_average_that_of_all() -> None:
    gradients = {}
    for number in (0, 40):
        network = made(2, num_sampled_pixels=number).train()
        repeats = 400 if number else 1
        for _ in range(repeats):
            network(image(2)).square().mean().backward()
        gradients[number] = network.column.weight.grad / repeats
    error = (gradients[40] - gradients[0]).norm() / gradients[0].norm()
    assert error < 0.1  # each alone is off by about the whole gradient's size


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"mlp_channels": ()}, "one hidden layer or more"),
        ({"num_sampled_pixels": -1}, "num_sampled_pixels is -1"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(2, 1, 2, **args)


def test_the_third_axis_of_thick_slices_keeps_its_resolution() -> None:
    network = PixelNet(3, 1, 2, in_plane=True, **SMALL).eval()
    assert network.min_size == (4, 4, 1)
    assert network.encoder(torch.zeros(1, 1, 8, 8, 3))[-1].shape[2:] == (2, 2, 3)
    assert network(torch.zeros(1, 1, 9, 8, 3)).shape == (1, 2, 9, 8, 3)
