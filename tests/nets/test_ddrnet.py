from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medseg.errors import WorkflowError
from medseg.nets.blocks import Layers
from medseg.nets.ddrnet import DAPPM, DDRNet
from medseg.nets.weights import load_encoder_weights

SMALL: dict[str, Any] = {"width": 4, "context_channels": 8, "head_channels": 8}
SLIM: dict[str, Any] = {}
NET_23: dict[str, Any] = {"width": 64, "head_channels": 128}
NET_39: dict[str, Any] = {"width": 64, "blocks": (3, 4, 6, 3), "exchanges": 2, "head_channels": 256}


def count_on_meta(*args: Any, **kwargs: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DDRNet(*args, **kwargs).parameters())


@pytest.mark.parametrize(
    ("args", "count"),
    [
        pytest.param(SLIM, 5_695_987, id="23-slim"),
        pytest.param({"deep_supervision": True}, 5_734_342, id="23-slim with its auxiliary head"),
        pytest.param(NET_23, 20_148_947, id="23"),
        pytest.param(NET_39, 32_360_275, id="39"),
    ],
)
def test_the_paper_s_networks_have_as_many_parameters_as_the_authors_code(args: dict[str, Any], count: int) -> None:
    assert count_on_meta(2, 3, 19, norm="batch", **args) == count


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (count_on_meta(dims, 1, 2) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((DDRNet.__doc__ or "").split())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("exchanges", [1, 2])
def test_the_fine_branch_keeps_its_resolution_while_the_coarse_one_goes_on_down(dims: int, exchanges: int) -> None:
    network = DDRNet(dims, 1, 2, **SMALL, exchanges=exchanges, stem_stride=4 if dims == 2 else 2)
    fine, coarse, strides = [], [], [(4 if dims == 2 else 2) * n for n in (2, 4, 8, 16)]
    for name in [*network.encoder.stages, "5"]:
        for suffix, sizes in (("", coarse), ("_", fine)):
            part = network.encoder.get_submodule(f"layer{name}{suffix}")
            part.register_forward_hook(lambda _, __, y, sizes=sizes: sizes.append(tuple(y.shape[2:])))
    side = 2 * strides[-1]
    network(torch.randn(2, 1, *[side] * dims))
    assert set(fine) == {(side // strides[0],) * dims}
    third = [strides[1]] * exchanges
    assert coarse == [(side // n,) * dims for n in (*third, *strides[2:])]


def test_each_branch_learns_from_the_other() -> None:
    torch.manual_seed(0)
    encoder = DDRNet(2, 1, 2, **SMALL).encoder
    early, fine, coarse = encoder(torch.randn(2, 1, 128, 128))
    assert [tuple(y.shape) for y in (early, fine, coarse)] == [(2, 8, 16, 16), (2, 16, 16, 16), (2, 64, 2, 2)]
    for output, other in ((early, "layer3"), (fine, "layer4"), (coarse, "layer3_"), (coarse, "layer4_")):
        weights = list(encoder.get_submodule(other).parameters())
        gradients = torch.autograd.grad(output.square().sum(), weights, retain_graph=True, allow_unused=True)
        assert all(g is not None and g.abs().sum() > 0 for g in gradients), other


def test_the_pyramid_averages_windows_of_5_9_and_17_voxels_and_the_image_each_refined_with_the_last() -> None:
    torch.manual_seed(0)
    pyramid = DAPPM(Layers(2, norm="none", activation="relu"), 6, 4, 5).double()
    x = torch.randn(2, 6, 20, 24, dtype=torch.float64)

    def activated(part: nn.Module, y: Tensor) -> Tensor:
        return nn.functional.conv2d(y.relu(), part.weight, part.bias, padding=part.weight.shape[-1] // 2)

    found = [activated(pyramid.scale0.conv, x)]
    for scale, refine, window in zip(pyramid.scales, pyramid.refine, (5, 9, 17, None), strict=True):
        pooled = x.mean((2, 3), keepdim=True) if window is None else averaged(x, window, window // 2)
        wide = nn.functional.interpolate(activated(scale[-1], pooled), size=(20, 24), mode="bilinear")
        found.append(activated(refine.conv, wide + found[-1]))
    expected = activated(pyramid.compression.conv, torch.cat(found, 1)) + activated(pyramid.shortcut.conv, x)
    torch.testing.assert_close(pyramid(x), expected)


def averaged(x: Tensor, window: int, stride: int) -> Tensor:
    """Averages around every `stride`-th voxel, with zeros beyond the image."""
    half = window // 2
    rows, columns = (range(0, n, stride) for n in x.shape[2:])
    padded = nn.functional.pad(x, [half] * 4)
    return torch.stack(
        [torch.stack([padded[..., i : i + window, j : j + window].mean((2, 3)) for j in columns], -1) for i in rows], -2
    )


def test_activations_do_not_change_what_the_sums_still_need() -> None:
    torch.manual_seed(0)
    for norm in ("none", "batch"):
        pyramid = DAPPM(Layers(2, norm=norm, activation="relu"), 6, 4, 5).eval()
        x = torch.randn(2, 6, 8, 8)
        before = x.clone()
        pyramid(x)
        assert torch.equal(x, before)


def test_training_scores_the_fine_branch_early_with_the_authors_weight() -> None:
    network = DDRNet(2, 1, 3, **SMALL, deep_supervision=True).train()
    logits, auxiliary = network(torch.randn(2, 1, 128, 192))
    assert (logits.shape, auxiliary.shape) == ((2, 3, 128, 192), (2, 3, 16, 24))
    assert network.extra_weights == (0.4,)


def test_the_authors_weights_fit_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = DDRNet(2, 3, 2, norm="batch").encoder
    published = {name: torch.rand(shape) for name, shape in ddrnet_23_slim().items()}
    save_file(published, tmp_path / "DDRNet23s_imagenet.safetensors")
    load_encoder_weights(encoder, tmp_path / "DDRNet23s_imagenet.safetensors")
    torch.testing.assert_close(encoder.down4[3].weight, published["down4.3.weight"].transpose(2, 3))
    torch.testing.assert_close(encoder.layer5[0].downsample[1].bias, published["layer5.0.downsample.1.bias"])


def ddrnet_23_slim() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' DDRNet-23-slim that classifies."""
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (1000, 1024), "linear.bias": (1000,)}

    def conv(name: str, norm: str, out: int, fan: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, fan, kernel, kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = (out,)

    def stage(name: str, fan: int, kernels: list[tuple[int, int]], number: int) -> None:
        out = kernels[-1][0]
        if fan != out:
            conv(f"{name}.0.downsample.0", f"{name}.0.downsample.1", out, fan, 1)
        for block in range(number):
            for n, (width, kernel) in enumerate(kernels, start=1):
                conv(f"{name}.{block}.conv{n}", f"{name}.{block}.bn{n}", width, fan, kernel)
                fan = width

    for n, fan in ((0, 3), (3, 32)):
        conv(f"conv1.{n}", f"conv1.{n + 1}", 32, fan, 3)
        shapes[f"conv1.{n}.bias"] = (32,)
    for name, fan, width in (("1", 32, 32), ("2", 32, 64), ("3", 64, 128), ("4", 128, 256), ("3_", 64, 64)):
        stage(f"layer{name}", fan, [(width, 3)] * 2, 2)
    stage("layer4_", 64, [(64, 3)] * 2, 2)
    stage("layer5_", 64, [(64, 1), (64, 3), (128, 1)], 1)
    stage("layer5", 256, [(256, 1), (256, 3), (512, 1)], 1)
    for name, *widths in (("down3", 64, 128), ("down4", 64, 128, 256), ("down5", 128, 256, 512)):
        for n, (fan, out) in enumerate(itertools.pairwise(widths)):
            conv(f"{name}.{3 * n}", f"{name}.{3 * n + 1}", out, fan, 3)
    for name, fan, out in (("compression3", 128, 64), ("compression4", 256, 64), ("last_layer", 512, 1024)):
        conv(f"{name}.0", f"{name}.1", out, fan, 1)
    return shapes


def test_a_single_image_is_refused_where_the_asked_norm_cannot_learn_from_it() -> None:
    x = torch.randn(1, 1, 128, 64)
    assert DDRNet(2, 1, 2, **SMALL).train()(x).shape == (1, 2, 128, 64)
    with pytest.raises(WorkflowError, match="E-BATCH-SIZE"):
        DDRNet(2, 1, 2, **SMALL, norm="batch").train()(x)


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="the third divisible by exchanges"):
        DDRNet(2, 1, 2, blocks=(2, 2, 3, 2), exchanges=2)
    with pytest.raises(ValueError, match="stem_stride is 3"):
        DDRNet(2, 1, 2, stem_stride=3)


def test_the_third_axis_of_thick_slices_keeps_its_resolution() -> None:
    network = DDRNet(3, 1, 2, **SMALL, in_plane=True).eval()
    assert network.min_size == (64, 64, 1)
    assert network(torch.zeros(1, 1, 65, 64, 3)).shape == (1, 2, 65, 64, 3)
