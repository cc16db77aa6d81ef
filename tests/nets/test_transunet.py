from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets.encoders.resnet_v2 import ResNetV2
from medseg.nets.encoders.vit import ViT
from medseg.nets.transunet import TransUNet
from medseg.nets.weights import load_encoder_weights

SMALL: dict[str, Any] = {
    "width": 4,
    "blocks": (1, 1, 1),
    "hidden_channels": 8,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_channels": (8, 8, 4, 4),
}


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(network: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return network(*args, **kwargs)


def test_the_paper_s_network_has_as_many_parameters_as_the_authors_code() -> None:
    assert num_parameters(on_meta(TransUNet, 2, 3, 9)) == 105_277_081


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(TransUNet, dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((TransUNet.__doc__ or "").split())


def test_the_hybrid_gives_196_tokens_of_768_channels_and_skips_of_512_256_and_64() -> None:
    network = on_meta(TransUNet, 2, 3, 9)
    features = network.encoder(torch.empty(1, 3, 224, 224, device="meta"))
    assert [tuple(f.shape[1:]) for f in features] == [(64, 112, 112), (256, 56, 56), (512, 28, 28), (768, 14, 14)]
    assert network.encoder.pos_embed.shape == (1, 196, 768)
    assert network.encoder.channels == (64, 256, 512, 768)
    assert network.encoder.strides == ((2, 2), (4, 4), (8, 8), (16, 16))


def test_in_3d_a_token_is_a_patch_of_16_cubed() -> None:
    network = on_meta(TransUNet, 3, 1, 2)
    assert network.encoder.grid == (6, 6, 6)
    assert network.encoder(torch.empty(1, 1, 96, 64, 80, device="meta"))[-1].shape == (1, 384, 6, 4, 5)


@pytest.mark.parametrize("dims", [2, 3])
def test_it_takes_other_sizes_than_it_was_built_for(dims: int) -> None:
    torch.manual_seed(0)
    network = TransUNet(dims, 1, 2, image_size=[40, 32, 48][:dims], **SMALL).eval()
    assert network.encoder.grid == (3, 2, 3)[:dims]
    for size in ((16, 16, 16), (40, 32, 48), (49, 33, 20)):
        assert network(torch.zeros(1, 1, *size[:dims])).shape == (1, 2, *size[:dims])


def test_every_voxel_sees_the_farthest_one_only_by_the_transformer() -> None:
    def gradient(network: TransUNet) -> float:
        x = torch.randn(1, 1, 256, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
        network(x)[0, 1, 0, 0].backward()
        assert x.grad is not None
        return float(x.grad[0, 0, -16:].abs().sum())

    torch.manual_seed(0)
    network = TransUNet(2, 1, 2, image_size=32, norm="none", **SMALL).eval()
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):  # its means, too, tell of every voxel
            module.forward = lambda x: x / 8  # type: ignore[method-assign]
    assert gradient(network) > 0
    for block in network.encoder.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    assert gradient(network) == 0


def test_an_encoder_without_backbone_is_timm_s_vit_by_name_and_shape() -> None:
    shapes = {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "norm.weight": (768,), "norm.bias": (768,)}
    shapes |= {"patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,)}
    widths = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    for n in range(12):
        for name, shape in {**widths, "norm1": (768,), "norm2": (768,)}.items():
            shapes[f"blocks.{n}.{name}.weight"], shapes[f"blocks.{n}.{name}.bias"] = shape, shape[:1]
    encoder = on_meta(ViT, 2, 3, image_size=224)
    assert {name: tuple(weight.shape) for name, weight in encoder.state_dict().items()} == shapes
    assert num_parameters(encoder) == 85_798_656


def test_the_hybrid_s_backbone_is_named_as_timm_s() -> None:
    names = on_meta(TransUNet, 2, 3, 9).encoder.state_dict()
    backbone = "patch_embed.backbone."
    block = {f"conv{n}.weight" for n in (1, 2, 3)} | {
        f"norm{n}.{kind}" for n in (1, 2, 3) for kind in ("weight", "bias")
    }
    expected = {f"{backbone}stem.{name}" for name in ("conv.weight", "norm.weight", "norm.bias")}
    for stage, depth in enumerate((3, 4, 9)):
        for n in range(depth):
            expected |= {f"{backbone}stages.{stage}.blocks.{n}.{name}" for name in block}
        expected |= {
            f"{backbone}stages.{stage}.blocks.0.downsample.{name}"
            for name in ("conv.weight", "norm.weight", "norm.bias")
        }
    assert {name for name in names if name.startswith(backbone)} == expected
    assert names[f"{backbone}stages.1.blocks.0.conv2.weight"].shape == (128, 128, 3, 3)
    assert names[f"{backbone}stages.2.blocks.8.conv3.weight"].shape == (1024, 256, 1, 1)
    assert names["patch_embed.proj.weight"].shape == (768, 1024, 1, 1)


def test_published_positions_are_brought_to_the_grid_and_the_class_token_left_out() -> None:
    published = {"cls_token": torch.zeros(1, 1, 8), "pos_embed": torch.randn(1, 1 + 4 * 4, 8)}
    rows = published["pos_embed"][:, 1:].unflatten(1, (4, 4))
    columns = rows.transpose(1, 2).flatten(1, 2)  # our first axis runs along a row
    args: dict[str, Any] = {"channels": 8, "num_layers": 1, "num_heads": 1}
    same = ViT(2, 1, image_size=64, **args).fitted(published)["pos_embed"]
    assert torch.equal(same, torch.cat([published["pos_embed"][:, :1], columns], dim=1))
    plain = ViT(2, 1, image_size=64, class_token=False, **args).fitted(published)
    assert torch.equal(plain["pos_embed"], columns)
    assert "cls_token" not in plain
    deep = ViT(3, 1, image_size=(64, 64, 48), **args)
    positions = deep.fitted(published)["pos_embed"]
    assert positions.shape == deep.pos_embed.shape
    for k in range(3):
        assert torch.equal(positions[:, 1 + k :: 3], columns)
    assert ViT(2, 1, image_size=96, **args).fitted(published)["pos_embed"].shape == (1, 37, 8)


@pytest.mark.parametrize("hybrid", [False, True])
def test_an_encoder_with_loaded_weights_sees_a_picture_as_the_published_one_does(hybrid: bool, tmp_path: Path) -> None:
    def encoder(dims: int, size: Any, in_channels: int = 3, *, class_token: bool = True) -> ViT:
        resnet = ResNetV2(dims, in_channels, width=4, blocks=(1, 1), in_plane=True) if hybrid else None
        return ViT(
            dims,
            in_channels,
            image_size=size,
            patch_size=1 if hybrid else 8,
            channels=8,
            num_layers=2,
            num_heads=2,
            backbone=resnet,
            class_token=class_token,
            in_plane=True,
        ).eval()

    picture = torch.randn(1, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    as_volume = picture.transpose(2, 3)
    for class_token in (True, False):
        torch.manual_seed(0)
        published = encoder(2, 32, class_token=class_token)  # run on rows and columns
        if hybrid:
            published.patch_embed.backbone.stem.conv.standardize = True  # as timm's does at each call
        torch.save(published.state_dict(), tmp_path / "vit.pth")
        expected = [feature.transpose(2, 3) for feature in published(picture)]
        flat, deep = encoder(2, 32, class_token=class_token), encoder(3, (32, 32, 2), class_token=class_token)
        for loaded in (flat, deep, encoder(3, 48, 1, class_token=class_token), encoder(2, 48, 2, class_token=False)):
            load_encoder_weights(loaded, tmp_path / "vit.pth")
        torch.testing.assert_close(flat(as_volume), expected, rtol=1e-4, atol=1e-4)
    stack = deep(as_volume[..., None].expand(-1, -1, -1, -1, 3))  # a class token would weigh less among more patches
    for feature, found in zip(expected, stack, strict=True):
        torch.testing.assert_close(found, feature[..., None].expand_as(found), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_channels", [1, 2, 4, 6])
def test_a_gray_image_gives_what_it_gave_in_color_whatever_its_channels(in_channels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = ResNetV2(2, 3, blocks=(1,)).eval()
    published.stem.conv.standardize = True
    with torch.no_grad():  # filters that see color alone, or nearly: standardized again they would become loud
        published.stem.conv.weight[::2, 1] = -published.stem.conv.weight[::2, 0]
        published.stem.conv.weight[::2, 2] = 0.01 * torch.randn(32, 7, 7)
    torch.save({f"patch_embed.backbone.{name}": w for name, w in published.state_dict().items()}, tmp_path / "r50.pth")
    loaded = ResNetV2(2, in_channels, blocks=(1,)).eval()
    load_encoder_weights(loaded, tmp_path / "r50.pth")
    gray = torch.randn(1, 1, 32, 40)
    wanted = [feature.transpose(2, 3) for feature in published(gray.transpose(2, 3).expand(-1, 3, -1, -1))]
    for found, feature in zip(loaded(gray.expand(-1, in_channels, -1, -1)), wanted, strict=True):
        torch.testing.assert_close(found, feature, rtol=1e-3, atol=2e-3)


def test_features_are_taken_after_the_layers_that_were_asked_for() -> None:
    torch.manual_seed(0)
    encoder = ViT(
        3, 2, image_size=16, patch_size=8, channels=8, num_layers=3, num_heads=2, features_after=(1, 3)
    ).eval()
    assert encoder.channels == (8, 8) and encoder.strides == ((8, 8, 8), (8, 8, 8))
    first, last = encoder(torch.randn(1, 2, 16, 16, 24))
    assert first.shape == last.shape == (1, 8, 2, 2, 3)
    torch.testing.assert_close(last.mean(dim=1), torch.zeros(1, 2, 2, 3), atol=1e-5, rtol=0)  # layer norm
    assert first.mean(dim=1).abs().max() > 1e-3


def test_the_resnet_halves_four_times_and_keeps_the_third_axis_where_asked() -> None:
    x = torch.zeros(1, 1, 32, 32, 5)
    features = ResNetV2(3, 1, width=4, blocks=(1, 1, 1), in_plane=True)(x)
    assert [tuple(f.shape[1:]) for f in features] == [(4, 16, 16, 5), (16, 8, 8, 5), (32, 4, 4, 5), (64, 2, 2, 5)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"decoder_channels": (8, 8)}, "decoder_channels has 2 entries; give 4"),
        ({"blocks": (1, 0, 1)}, "at least 1 block"),
        ({"num_heads": 7}, "heads must divide"),
        ({"num_layers": 0}, "features_after"),
        ({"image_size": (64, 64, 64)}, "one an axis"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(TransUNet, 2, 1, 1, **args)
