from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets.encoders.swin import Swin
from medseg.nets.swin_unet import SwinUNet
from medseg.nets.weights import encoder_of, encoder_weights, load_encoder_weights

SMALL: dict[str, Any] = {"channels": 4, "depths": (2, 2), "num_heads": (1, 2), "window_size": 3, "patch_size": 2}


def on_meta(network: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return network(*args, **kwargs)


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_paper_s_network_has_the_official_number_of_parameters() -> None:
    assert num_parameters(on_meta(SwinUNet, 2, 3, 9)) == 27_168_900


def test_the_docstrings_state_the_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(SwinUNet, dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((SwinUNet.__doc__ or "").split())
    assert f"{num_parameters(on_meta(Swin, 2, 3)):,} parameters in 2D" in (Swin.__doc__ or "")


def published_shapes(depths: tuple[int, ...] = (2, 2, 6, 2)) -> dict[str, tuple[int, ...]]:
    """Names and shapes in ``swin_tiny_patch4_window7_224.pth``."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (96, 3, 4, 4), "patch_embed.proj.bias": (96,)}

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def linear(name: str, out: int, fan: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, fan), (out,)

    norm("patch_embed.norm", 96)
    for n, (depth, heads) in enumerate(zip(depths, (3, 6, 12, 24), strict=True)):
        width = 96 * 2**n
        for b in range(depth):
            block = f"layers.{n}.blocks.{b}"
            norm(f"{block}.norm1", width)
            norm(f"{block}.norm2", width)
            shapes[f"{block}.attn.relative_position_bias_table"] = (13 * 13, heads)
            shapes[f"{block}.attn.relative_position_index"] = (49, 49)
            if b % 2 and n < 3:
                shapes[f"{block}.attn_mask"] = ((8 // 2**n) ** 2, 49, 49)
            linear(f"{block}.attn.qkv", 3 * width, width)
            linear(f"{block}.attn.proj", width, width)
            linear(f"{block}.mlp.fc1", 4 * width, width)
            linear(f"{block}.mlp.fc2", width, 4 * width)
        if n < 3:
            norm(f"layers.{n}.downsample.norm", 4 * width)
            shapes[f"layers.{n}.downsample.reduction.weight"] = (2 * width, 4 * width)
    norm("norm", 768)
    linear("head", 1000, 768)
    return shapes


@pytest.mark.parametrize(
    ("dims", "args"),
    [(2, {}), (3, {"in_plane": True}), (3, {"window_size": (6, 6, 3)}), (2, {"window_size": 8})],
    ids=["2d", "in plane", "3d", "other windows"],
)
def test_the_encoder_takes_published_weights(dims: int, args: dict[str, Any], tmp_path: Path) -> None:
    state = {name: torch.tensor(0.5).expand(shape) for name, shape in published_shapes().items()}
    torch.save({"model": state}, tmp_path / "swin.pth")
    network = on_meta(SwinUNet, dims, 1, 2, channels=96, depths=(2, 2, 6, 2), **args)
    encoder = encoder_of(network)
    found = encoder_weights(encoder, tmp_path / "swin.pth")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in encoder.state_dict().items()}


@pytest.mark.parametrize("in_plane", [False, True])
def test_an_encoder_with_loaded_weights_sees_a_picture_as_the_published_one_does(
    in_plane: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    published = Swin(2, 3, **SMALL).eval()  # run on rows and columns
    for weight in published.parameters():
        nn.init.normal_(weight, std=0.3)
    state = dict(published.state_dict())
    # The published order of merged tokens: rows change first; here it is the second axis that does.
    order = [0, 2, 1, 3]
    for kind in ("norm.weight", "norm.bias", "reduction.weight"):
        name = f"layers.0.downsample.{kind}"
        state[name] = state[name].unflatten(-1, (4, -1))[..., order, :].flatten(-2)
    torch.save(state, tmp_path / "swin.pth")
    picture = torch.randn(1, 3, 16, 20)
    as_volume = picture.transpose(2, 3)
    flat = Swin(2, 3, **SMALL).eval()
    deep = Swin(3, 3, in_plane=in_plane, **SMALL).eval()
    load_encoder_weights(flat, tmp_path / "swin.pth")
    # A patch is two slices deep where the third axis is cut, too: its kernel is the mean of both.
    load_encoder_weights(deep, tmp_path / "swin.pth", inflation="center" if in_plane else "spread")
    stack = deep(as_volume[..., None].expand(-1, -1, -1, -1, 8))
    for feature, found, slices in zip(published(picture), flat(as_volume), stack, strict=True):
        expected = feature.transpose(2, 3)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(slices, expected[..., None].expand_as(slices), rtol=1e-4, atol=1e-4)


def test_features_have_the_channels_and_strides_that_the_encoder_states() -> None:
    encoder = Swin(3, 1, channels=4, depths=(2, 1, 1), num_heads=(1, 2, 2), window_size=2, patch_size=2)
    features = encoder(torch.randn(1, 1, 16, 24, 8))
    assert [tuple(f.shape[1:]) for f in features] == [
        (channels, *[n // s for n, s in zip((16, 24, 8), strides, strict=True)])
        for channels, strides in zip((4, 8, 16), encoder.strides, strict=True)
    ]


def test_deeper_stages_see_further_and_none_sees_the_whole_of_a_large_image() -> None:
    x = torch.randn(1, 1, 256, 256, requires_grad=True)
    reach = []
    for depths, heads in (((2,), (1,)), ((2, 2), (1, 1))):
        torch.manual_seed(0)
        network = SwinUNet(2, 1, 1, **{**SMALL, "depths": depths, "num_heads": heads}).eval()
        (gradient,) = torch.autograd.grad(network(x)[0, 0, 128, 128], x)
        seen = gradient[0, 0].abs().sum(dim=0).nonzero()
        reach.append(int(seen.max() - seen.min()) + 1)
    windows = 3 * 2  # voxels
    assert windows < reach[0] <= 2 * windows  # the shifted window, and the windows that it lies in
    assert 2 * reach[0] < reach[1] < 256


def test_it_takes_other_sizes_without_anything_that_depends_on_the_size() -> None:
    network = SwinUNet(3, 1, 2, **SMALL).eval()
    for size in ((4, 4, 4), (9, 17, 30)):
        assert network(torch.randn(1, 1, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depths": (2, 2)}, "one entry a stage"),
        ({"depths": (2, 0, 2, 2)}, "one entry a stage"),
        ({"num_heads": (5, 6, 12, 24)}, "heads must divide"),
        ({"window_size": (7, 7, 7)}, "for 2 axes"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(SwinUNet, 2, 1, 1, **args)
