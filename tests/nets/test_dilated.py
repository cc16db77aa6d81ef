"""What PSPNet, the DeepLabs and RefineNet have in common: encoders of any output stride, and their use on thick slices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.errors import WorkflowError
from medseg.nets.deeplab_v2 import DeepLabV2
from medseg.nets.deeplab_v3 import DeepLabV3
from medseg.nets.deeplab_v3_plus import DeepLabV3Plus
from medseg.nets.dilated import DILATED_ENCODERS, scaled_rates
from medseg.nets.network import SegmentationNetwork
from medseg.nets.pspnet import PSPNet
from medseg.nets.refinenet import RefineNet
from medseg.nets.weights import inflate

NETWORKS = [PSPNet, DeepLabV3, DeepLabV3Plus]
SMALL: dict[str, Any] = {"width": 4}


def settle_norms(network: nn.Module, x: Tensor) -> None:
    """Let batch norms remember what they meet, so that activations keep their size in evaluation."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.momentum = None  # the plain average
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    network.train()(x)
    network.eval()


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize(("name", "dims"), [(name, 2) for name in DILATED_ENCODERS] + [("resnet18", 3), ("vgg16", 3)])
def test_features_have_the_channels_and_strides_that_the_encoder_states(
    name: str, dims: int, output_stride: int
) -> None:
    encoder = DILATED_ENCODERS[name](dims, 1, **SMALL, norm="batch", output_stride=output_stride).eval()
    features = encoder(torch.randn(1, 1, *[32] * dims))
    assert encoder.strides == tuple((min(n, output_stride),) * dims for n in (2, 4, 8, 16, 32))
    for feature, channels, strides in zip(features, encoder.channels, encoder.strides, strict=True):
        assert feature.shape == (1, channels, *[32 // stride for stride in strides])


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(
    ("name", "dims"), [("resnet18", 2), ("resnet18", 3), ("resnet50", 2), ("xception41", 2), ("xception41", 3)]
)
def test_a_smaller_output_stride_computes_the_same_features_from_the_same_weights_more_densely(
    name: str, dims: int, output_stride: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, *[64, 96, 32][:dims]).double()
    strided = DILATED_ENCODERS[name](dims, 1, **SMALL, norm="batch").double()
    settle_norms(strided, x)
    dilated = DILATED_ENCODERS[name](dims, 1, **SMALL, norm="batch", output_stride=output_stride).double().eval()
    dilated.load_state_dict(strided.state_dict())
    for coarse, dense in zip(strided(x), dilated(x), strict=True):
        step = dense.shape[2] // coarse.shape[2]
        torch.testing.assert_close(dense[(..., *[slice(None, None, step)] * dims)], coarse)


@pytest.mark.parametrize("name", ["resnet50", "xception65"])
def test_an_output_stride_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="output_stride is 4; it must be 8, 16 or 32"):
        DILATED_ENCODERS[name](2, 1, output_stride=4)


@pytest.mark.parametrize("make", [*NETWORKS, DeepLabV2, partial(RefineNet, channels=(4, 4, 4, 6))])
@pytest.mark.parametrize("encoder", ["vgg16", "resnet18", "resnet50", "xception41"])
def test_a_2d_network_inflated_to_3d_gives_each_slice_what_the_2d_one_gives_it(
    make: Callable[..., SegmentationNetwork], encoder: str
) -> None:
    torch.manual_seed(0)
    args = {**SMALL, "encoder": encoder, "norm": "batch"}
    x = torch.randn(1, 1, 40, 33, 3).double()
    flat = make(2, 1, 2, **args).double()
    settle_norms(flat, x[0].permute(3, 0, 1, 2))  # a batch of three slices
    deep = make(3, 1, 2, **args, in_plane=True).double().eval()
    assert deep.min_size[2] == 1
    depths = {name: tensor.shape[-1] for name, tensor in deep.state_dict().items() if tensor.dim() == 5}
    weights = flat.state_dict()
    deep.load_state_dict(weights | {name: inflate(weights[name], depth) for name, depth in depths.items()})
    logits = deep(x)
    for k in range(3):
        torch.testing.assert_close(logits[..., k], flat(x[..., k]))


@pytest.mark.parametrize("make", [DeepLabV3, DeepLabV3Plus])
def test_deeplab_sees_further_with_larger_rates(make: Callable[..., SegmentationNetwork]) -> None:
    reach = []
    for rates in ((1, 2), (2, 4), (4, 8)):
        torch.manual_seed(0)
        network = make(
            2, 1, 1, encoder="resnet18", width=2, aspp_channels=2, rates=rates, output_stride=16,
            norm="none", activation="elu",
        ).double().eval()  # fmt: skip
        network.aspp.project.conv.weight.data[:, -2:] = 0  # else the average would see everything
        x = torch.randn(1, 1, 16, 1024, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(network(x)[0, 0, 8, 512], x)
        seen = gradient[0, 0].abs().sum(dim=0).nonzero()
        reach.append(int(seen.max() - seen.min()))
    assert reach[1] - reach[0] == 2 * 2 * 16  # two voxels further on each side, each 16 voxels of the image
    assert reach[2] - reach[1] == 2 * 4 * 16


@pytest.mark.parametrize("make", NETWORKS)
def test_batch_norm_refuses_a_batch_of_one_in_training(make: Callable[..., SegmentationNetwork]) -> None:
    network = make(2, 1, 2, encoder="resnet18", **SMALL, norm="batch")
    with pytest.raises(WorkflowError, match="E-BATCH-SIZE"):
        network(torch.randn(1, 1, 32, 32))
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 2, 32, 32)


def test_the_default_rates_span_the_same_part_of_the_image_at_any_output_stride() -> None:
    assert scaled_rates(None, 2, output_stride=16) == [6, 12, 18]
    assert scaled_rates(None, 2, output_stride=8) == [12, 24, 36]
    assert scaled_rates(None, 3, output_stride=8) == [2, 4, 6]
    assert scaled_rates(None, 3, output_stride=8, in_plane=True) == [12, 24, 36]
    assert scaled_rates((1, 4), 3, output_stride=32) == [1, 2]
    assert scaled_rates((6, 12), 2, output_stride=16, of_stride=8) == [3, 6]
    assert scaled_rates(None, 3, output_stride=8, of_slices=(6, 12, 18, 24), of_stride=8) == [1, 2, 3, 4]


def test_an_unknown_encoder_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(WorkflowError, match="did you mean 'resnet50'"):
        PSPNet(2, 1, 2, encoder="resnet5")
