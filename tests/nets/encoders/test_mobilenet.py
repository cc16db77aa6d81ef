from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.nets.encoders.mobilenet import MobileNetV2
from medseg.nets.weights import encoder_weights, load_encoder_weights

CLASSIFIER = 1_281_000
# Channels in, inside and out, and the stride of each inverted residual.
BLOCKS = [
    (32, 32, 16, 1),
    (16, 96, 24, 2),
    (24, 144, 24, 1),
    (24, 144, 32, 2),
    *[(32, 192, 32, 1)] * 2,
    (32, 192, 64, 2),
    *[(64, 384, 64, 1)] * 3,
    (64, 384, 96, 1),
    *[(96, 576, 96, 1)] * 2,
    (96, 576, 160, 2),
    *[(160, 960, 160, 1)] * 2,
    (160, 960, 320, 1),
]


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes in torchvision's checkpoint ``mobilenet_v2``."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_and_norm(conv: str, norm: str, out: int, fan: int, kernel: int) -> None:
        shapes[f"{conv}.weight"] = (out, fan, kernel, kernel)
        shapes.update({f"{norm}.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{norm}.num_batches_tracked"] = ()

    conv_and_norm("features.0.0", "features.0.1", 32, 3, 3)
    for n, (narrow, wide, out, _) in enumerate(BLOCKS, start=1):
        block = f"features.{n}.conv"
        at = 0
        if wide > narrow:
            conv_and_norm(f"{block}.0.0", f"{block}.0.1", wide, narrow, 1)
            at = 1
        conv_and_norm(f"{block}.{at}.0", f"{block}.{at}.1", wide, 1, 3)
        conv_and_norm(f"{block}.{at + 1}", f"{block}.{at + 2}", out, wide, 1)
    conv_and_norm("features.18.0", "features.18.1", 1280, 320, 1)
    return shapes | {"classifier.1.weight": (1000, 1280), "classifier.1.bias": (1000,)}


def published_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in published_shapes().items() if shape}
    for name, tensor in weights.items():
        if tensor.dim() == 4:
            tensor.mul_((2 / tensor[0].numel()) ** 0.5)
        else:
            nn.init.uniform_(tensor, 0.5 if name.endswith(("running_var", "weight")) else -0.2, 1.0)
    return weights


def published_features(weights: Mapping[str, Tensor], x: Tensor) -> Iterator[Tensor]:
    """What torchvision's network gives after each of its ``features``, in evaluation."""

    def unit(x: Tensor, conv: str, norm: str, *, stride: int = 1, active: bool = True) -> Tensor:
        kernel = weights[f"{conv}.weight"]
        groups = x.shape[1] // kernel.shape[1]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2, groups=groups)
        mean, var, weight, bias = (
            weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, var, weight, bias)
        return F.relu6(x) if active else x

    x = unit(x, "features.0.0", "features.0.1", stride=2)
    yield x
    for n, (narrow, wide, out, stride) in enumerate(BLOCKS, start=1):
        block, before, at = f"features.{n}.conv", x, 0
        if wide > narrow:
            x, at = unit(x, f"{block}.0.0", f"{block}.0.1"), 1
        x = unit(x, f"{block}.{at}.0", f"{block}.{at}.1", stride=stride)
        x = unit(x, f"{block}.{at + 1}", f"{block}.{at + 2}", active=False)
        x = before + x if narrow == out and stride == 1 else x
        yield x
    yield unit(x, "features.18.0", "features.18.1")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v2.pth"
    torch.save(published_weights(), path)
    return path


def test_it_has_as_many_parameters_as_torchvision_s_without_the_classifier() -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in MobileNetV2(2, 3, norm="batch").parameters())
    assert count == 2_223_872 == 3_504_872 - CLASSIFIER
    assert f"{count:,} parameters" in (MobileNetV2.__doc__ or "")


def test_its_weights_have_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        encoder = MobileNetV2(2, 3, norm="batch")
    shapes = {name: tuple(weight.shape) for name, weight in encoder.state_dict().items()}
    assert shapes == {name: s for name, s in published_shapes().items() if not name.startswith("classifier.")}


@pytest.mark.parametrize(("dims", "in_plane"), [(3, False), (3, True)])
def test_published_weights_fit_in_3d_with_other_channels(dims: int, in_plane: bool, file: Path) -> None:
    with torch.device("meta"):
        encoder = MobileNetV2(dims, 1, norm="batch", in_plane=in_plane)
    found = encoder_weights(encoder, file)
    assert all(found[name].shape == tensor.shape for name, tensor in encoder.state_dict().items() if tensor.dim())


def test_with_loaded_weights_it_sees_a_picture_as_the_published_one_does_and_in_3d_a_stack_of_it(file: Path) -> None:
    flat, deep = MobileNetV2(2, 3, norm="batch").eval(), MobileNetV2(3, 3, norm="batch", in_plane=True).eval()
    for encoder in (flat, deep):
        load_encoder_weights(encoder, file)
    picture = torch.randn(1, 3, 64, 96)
    as_volume = picture.transpose(2, 3)
    expected = list(published_features(published_weights(), picture))
    stack = deep(as_volume[..., None].expand(-1, -1, -1, -1, 2))
    for n, feature, slices in zip((1, 3, 6, 13, 18), flat(as_volume), stack, strict=True):
        torch.testing.assert_close(feature, expected[n].transpose(2, 3), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(slices, feature[..., None].expand_as(slices), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_smaller_output_stride_computes_the_same_more_densely(dims: int, output_stride: int) -> None:
    torch.manual_seed(0)
    args: dict[str, Any] = {"width": 4, "norm": "group"}
    strided = MobileNetV2(dims, 1, **{**args, "norm": "none"}).double()
    dilated = MobileNetV2(dims, 1, **{**args, "norm": "none"}, output_stride=output_stride).double()
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 1, *[64, 96, 32][:dims]).double()
    for coarse, dense, stride in zip(strided(x), dilated(x), dilated.strides, strict=True):
        step = dense.shape[2] // coarse.shape[2]
        assert dense.shape[2] == 64 // stride[0]
        torch.testing.assert_close(dense[(..., *[slice(None, None, step)] * dims)], coarse)


def test_strides_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="output_stride is 4; it must be 8, 16 or 32"):
        MobileNetV2(2, 1, output_stride=4)
