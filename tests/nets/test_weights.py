from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import ResNet as MonaiResNet
from safetensors.torch import save_file
from torch import Tensor, nn

from medseg.errors import WorkflowError
from medseg.nets.encoders.encoder import Encoder
from medseg.nets.encoders.mit import MIT_SIZES, MiT
from medseg.nets.encoders.resnet import ResNet
from medseg.nets.encoders.vgg import VGG
from medseg.nets.encoders.vit import ViT
from medseg.nets.fcn import FCN
from medseg.nets.transunet import TransUNet
from medseg.nets.unet import UNet
from medseg.nets.weights import (
    adapt_channels,
    encoder_of,
    encoder_weights,
    inflate,
    load_encoder_weights,
)

Shapes = dict[str, tuple[int, ...]]


def conv(name: str, out: int, fan: int, kernel: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, fan, kernel, kernel), **({f"{name}.bias": (out,)} if bias else {})}


def linear(name: str, out: int, fan: int) -> Shapes:
    return {f"{name}.weight": (out, fan), f"{name}.bias": (out,)}


def layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def batch_norm(name: str, width: int) -> Shapes:
    running = {f"{name}.{part}": (width,) for part in ("running_mean", "running_var")}
    return {**layer_norm(name, width), **running, f"{name}.num_batches_tracked": ()}


def vgg16(*, norm: bool) -> Shapes:
    """As torchvision's ``vgg16`` and ``vgg16_bn``, each convolution followed by norm and activation."""
    shapes: Shapes = {}
    n, fan = 0, 3
    for width, num_convs in zip((64, 128, 256, 512, 512), (2, 2, 3, 3, 3), strict=True):
        for _ in range(num_convs):
            shapes |= conv(f"features.{n}", width, fan, 3)
            if norm:
                shapes |= batch_norm(f"features.{n + 1}", width)
            n, fan = n + 2 + norm, width
        n += 1  # the pooling
    return (
        shapes
        | linear("classifier.0", 4096, 512 * 7 * 7)
        | linear("classifier.3", 4096, 4096)
        | linear("classifier.6", 1000, 4096)
    )


def resnet(depths: tuple[int, ...], expansion: int) -> Shapes:
    """As torchvision's ``resnet18`` to ``resnet101``."""
    shapes = conv("conv1", 64, 3, 7, bias=False) | batch_norm("bn1", 64)
    fan = 64
    for stage, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512), strict=True), start=1):
        out = expansion * width
        for n in range(depth):
            block = f"layer{stage}.{n}"
            kernels = {1: ((width, 3), (out, 3)), 4: ((width, 1), (width, 3), (out, 1))}[expansion]
            inner = fan
            for i, (channels, kernel) in enumerate(kernels, start=1):
                shapes |= conv(f"{block}.conv{i}", channels, inner, kernel, bias=False)
                shapes |= batch_norm(f"{block}.bn{i}", channels)
                inner = channels
            if n == 0 and fan != out:
                shapes |= conv(f"{block}.downsample.0", out, fan, 1, bias=False)
                shapes |= batch_norm(f"{block}.downsample.1", out)
            fan = out
    return shapes | linear("fc", 1000, fan)


def mit(size: str) -> Shapes:
    """As the published ``mit_b0.pth`` to ``mit_b5.pth``."""
    shapes: Shapes = {}
    fan = 3
    channels, depths = MIT_SIZES[size].channels, MIT_SIZES[size].depths
    for stage, (width, depth, reduction) in enumerate(zip(channels, depths, (8, 4, 2, 1), strict=True), start=1):
        shapes |= conv(f"patch_embed{stage}.proj", width, fan, 7 if stage == 1 else 3)
        shapes |= layer_norm(f"patch_embed{stage}.norm", width)
        for n in range(depth):
            block = f"block{stage}.{n}"
            shapes |= layer_norm(f"{block}.norm1", width) | layer_norm(f"{block}.norm2", width)
            shapes |= linear(f"{block}.attn.q", width, width) | linear(f"{block}.attn.kv", 2 * width, width)
            shapes |= linear(f"{block}.attn.proj", width, width)
            if reduction > 1:
                shapes |= conv(f"{block}.attn.sr", width, width, reduction) | layer_norm(f"{block}.attn.norm", width)
            shapes |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
            shapes |= conv(f"{block}.mlp.dwconv.dwconv", 4 * width, 1, 3)
        shapes |= layer_norm(f"norm{stage}", width)
        fan = width
    return shapes | linear("head", 1000, fan)


def resnet_v2(prefix: str) -> Shapes:
    """The ResNet-50 of timm's hybrids, whose last stage is left out."""
    shapes = conv(f"{prefix}.stem.conv", 64, 3, 7, bias=False) | layer_norm(f"{prefix}.stem.norm", 64)
    fan = 64
    for stage, (depth, out) in enumerate(zip((3, 4, 9), (256, 512, 1024), strict=True)):
        for n in range(depth):
            block = f"{prefix}.stages.{stage}.blocks.{n}"
            if n == 0:
                shapes |= conv(f"{block}.downsample.conv", out, fan, 1, bias=False)
                shapes |= layer_norm(f"{block}.downsample.norm", out)
            for i, (channels, inner, kernel) in enumerate(
                ((out // 4, fan, 1), (out // 4, out // 4, 3), (out, out // 4, 1)), start=1
            ):
                shapes |= conv(f"{block}.conv{i}", channels, inner, kernel, bias=False)
                shapes |= layer_norm(f"{block}.norm{i}", channels)
            fan = out
    return shapes


def vit_base(*, hybrid: bool = False) -> Shapes:
    """As timm's ``vit_base_patch16_224`` and ``vit_base_r50_s16_224``."""
    shapes: Shapes = {"cls_token": (1, 1, 768), "pos_embed": (1, 1 + 14 * 14, 768)}
    shapes |= resnet_v2("patch_embed.backbone") if hybrid else {}
    shapes |= conv("patch_embed.proj", 768, 1024 if hybrid else 3, 1 if hybrid else 16)
    for n in range(12):
        shapes |= layer_norm(f"blocks.{n}.norm1", 768) | layer_norm(f"blocks.{n}.norm2", 768)
        shapes |= linear(f"blocks.{n}.attn.qkv", 3 * 768, 768) | linear(f"blocks.{n}.attn.proj", 768, 768)
        shapes |= linear(f"blocks.{n}.mlp.fc1", 3072, 768) | linear(f"blocks.{n}.mlp.fc2", 768, 3072)
    return shapes | layer_norm("norm", 768) | linear("head", 1000, 768)


def hybrid(dims: int, channels: int) -> Encoder:
    return encoder_of(TransUNet(dims, channels, 2))


PUBLISHED: dict[str, tuple[Shapes, Callable[..., Encoder], dict[str, Any]]] = {
    "vgg16": (vgg16(norm=False), VGG, {"norm": "none", "fc_channels": 4096}),
    "vgg16_bn": (vgg16(norm=True), VGG, {"norm": "batch"}),
    "resnet18": (resnet((2, 2, 2, 2), 1), ResNet, {"norm": "batch", "num_layers": 18}),
    "resnet34": (resnet((3, 4, 6, 3), 1), ResNet, {"norm": "batch", "num_layers": 34}),
    "resnet50": (resnet((3, 4, 6, 3), 4), ResNet, {"norm": "batch", "num_layers": 50, "output_stride": 16}),
    "resnet101": (resnet((3, 4, 23, 3), 4), ResNet, {"norm": "batch", "num_layers": 101}),
    "mit_b0": (mit("b0"), MiT, {}),
    "vit_base_patch16_224": (vit_base(), ViT, {"image_size": 224}),
    "vit_base_r50_s16_224": (vit_base(hybrid=True), hybrid, {}),
}


def on_meta(make: Callable[..., Encoder], *args: Any, **kwargs: Any) -> Encoder:
    with torch.device("meta"):
        return make(*args, **kwargs)


def published_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A file with these names and shapes that holds one number, repeated, and so is small."""
    state = {
        name: torch.tensor(0) if name.endswith("num_batches_tracked") else torch.tensor(0.5).expand(shape)
        for name, shape in shapes.items()
    }
    torch.save(state, path)
    return path


def features(shapes: Shapes) -> Shapes:
    """Without VGG's classifier, which is large."""
    return {name: shape for name, shape in shapes.items() if not name.startswith("classifier.")}


def picture(*size: int) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes_fit(name: str, tmp_path: Path) -> None:
    shapes, make, args = PUBLISHED[name]
    encoder = on_meta(make, 2, 3, **args)
    found = encoder_weights(encoder, published_file(tmp_path / "weights.pth", shapes))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in encoder.state_dict().items()}
    load_encoder_weights(encoder, tmp_path / "weights.pth")  # has no memory to fill, and sees that they fit


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "mit_b0"])
@pytest.mark.parametrize("in_plane", [False, True])
def test_published_names_and_shapes_fit_in_3d_with_other_channels(name: str, in_plane: bool, tmp_path: Path) -> None:
    shapes, make, args = PUBLISHED[name]
    encoder = on_meta(make, 3, 1, in_plane=in_plane, **args)
    found = encoder_weights(encoder, published_file(tmp_path / "weights.pth", features(shapes)))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in encoder.state_dict().items()}


class Published(nn.Module):
    """VGG as torchvision writes it, narrow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        fan = 3
        for width in (4, 6):
            layers += [nn.Conv2d(fan, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2, 2)]
            fan = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(6 * 3 * 3, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 5))
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5 if "running_var" in name else -0.5, 1.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))

    @property
    def args(self) -> dict[str, Any]:
        return {"channels": (4, 6), "convs_per_stage": 1, "norm": "batch"}

    def file(self, folder: Path) -> Path:
        torch.save(self.state_dict(), folder / "published.pth")
        return folder / "published.pth"


def as_volume(rows_columns: Tensor) -> Tensor:
    """A picture of rows and columns as medseg reads it: along x first, then along y."""
    return rows_columns.transpose(2, 3)


def test_a_loaded_vgg_sees_a_picture_as_the_published_one_does(tmp_path: Path) -> None:
    published = Published()
    encoder = VGG(2, 3, **published.args).eval()
    load_encoder_weights(encoder, published.file(tmp_path))
    x = picture(12, 20)
    torch.testing.assert_close(encoder(as_volume(x))[-1], as_volume(published.features(x)))


def test_a_loaded_classifier_scores_as_the_published_one_does(tmp_path: Path) -> None:
    published = Published()
    encoder = VGG(2, 3, fc_channels=5, fc_kernel_size=3, **published.args).eval()
    load_encoder_weights(encoder, published.file(tmp_path))
    x = picture(12, 12)
    middle = encoder(as_volume(x))[-1][:, :, 1, 1]  # where all of the 3 × 3 kernel lies on the features
    torch.testing.assert_close(middle, published(x).relu())


def test_a_loaded_resnet_sees_a_picture_as_the_published_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = MonaiResNet(
        "bottleneck",
        [3, 4, 6, 3],
        [4, 8, 16, 32],
        spatial_dims=2,
        n_input_channels=3,
        conv1_t_stride=2,
        num_classes=7,
        bias_downsample=False,
    ).eval()
    for name, tensor in published.state_dict().items():
        if "running" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
    torch.save(published.state_dict(), tmp_path / "resnet.pth")
    encoder = ResNet(2, 3, num_layers=50, width=4, norm="batch").eval()
    load_encoder_weights(encoder, tmp_path / "resnet.pth")
    x = picture(64, 96)
    seen: list[Tensor] = []
    published.layer4.register_forward_hook(lambda _, __, output: seen.append(output))
    published(x)
    torch.testing.assert_close(encoder(as_volume(x))[-1], as_volume(seen[0]))


@pytest.mark.parametrize("num_slices", [1, 3])
def test_an_inflated_encoder_gives_of_equal_slices_what_the_2d_one_gives_of_one(
    num_slices: int, tmp_path: Path
) -> None:
    published = Published()
    path = published.file(tmp_path)
    flat, deep = (VGG(dims, 1, in_plane=True, **published.args).eval() for dims in (2, 3))
    for encoder in (flat, deep):
        load_encoder_weights(encoder, path)
    x = picture(12, 20)[:, :1]
    for a, b in zip(flat(x), deep(x[..., None].expand(*x.shape, num_slices)), strict=True):
        torch.testing.assert_close(b, a[..., None].expand_as(b), rtol=0, atol=1e-5)


def test_a_whole_2d_network_inflated_equals_it_on_a_stack_of_equal_slices() -> None:
    torch.manual_seed(0)
    args: dict[str, Any] = {"channels": (4, 6), "convs_per_stage": 1, "fc_channels": 8, "output_stride": 2}
    flat = FCN(2, 2, 3, norm="batch", **args).eval()
    deep = FCN(3, 2, 3, norm="batch", in_plane=True, **args).eval()
    own = deep.state_dict()
    deep.load_state_dict(
        {name: inflate(w, own[name].shape[4]) if w.dim() == 4 else w for name, w in flat.state_dict().items()}
    )
    x = torch.randn(1, 2, 12, 16)
    logits = deep(x[..., None].expand(*x.shape, 3))
    torch.testing.assert_close(logits, flat(x)[..., None].expand_as(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("depth", "inflation"), [(3, "center"), (7, "center"), (3, "spread"), (4, "center")])
def test_an_inflated_kernel_computes_the_same_on_equal_slices(depth: int, inflation: Any) -> None:
    kernel = torch.randn(4, 2, 3, 3)
    x = torch.randn(1, 2, 8, 9)
    stacked = nn.functional.conv3d(
        x[..., None].expand(*x.shape, 2 * depth), inflate(kernel, depth, inflation=inflation)
    )
    torch.testing.assert_close(stacked, nn.functional.conv2d(x, kernel)[..., None].expand_as(stacked))


def test_the_center_alone_holds_the_kernel_unless_it_is_spread() -> None:
    kernel = torch.ones(1, 1, 1, 1)
    assert inflate(kernel, 3).flatten().tolist() == [0, 1, 0]
    assert inflate(kernel, 5, inflation="spread").flatten().tolist() == pytest.approx([0.2] * 5)
    assert inflate(kernel, 2).flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6])
def test_an_image_of_equal_channels_gives_the_same_response_whatever_their_number(channels: int) -> None:
    kernel = torch.randn(8, 3, 3, 3)
    gray = torch.randn(1, 1, 10, 10)
    expected = nn.functional.conv2d(gray.expand(-1, 3, -1, -1), kernel)
    adapted = adapt_channels(kernel, channels)
    torch.testing.assert_close(nn.functional.conv2d(gray.expand(-1, channels, -1, -1), adapted), expected)


def test_one_channel_gets_the_sum_and_twice_as_many_get_half_each() -> None:
    kernel = torch.tensor([[[[1.0]], [[2.0]], [[4.0]]]])
    assert adapt_channels(kernel, 1).flatten().tolist() == [7]
    assert adapt_channels(kernel, 3) is kernel
    assert adapt_channels(kernel, 6).flatten().tolist() == [0.5, 1, 2, 0.5, 1, 2]


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "half", "wrapped", "parallel", "without counts"])
def test_the_forms_in_which_weights_are_published_are_read(kind: str, tmp_path: Path) -> None:
    published = Published()
    state = published.state_dict()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    content: dict[str, Any] = {
        "half": {name: t.half() if t.is_floating_point() else t for name, t in state.items()},
        "wrapped": {"epoch": 3, "state_dict": state},
        "parallel": {f"module.{name}": t for name, t in state.items()},
        "without counts": {name: t for name, t in state.items() if "num_batches" not in name},
    }.get(kind, state)
    if kind == "safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    encoder = VGG(2, 3, **published.args).eval()
    load_encoder_weights(encoder, path)
    expected = as_volume(state["features.4.weight"])
    torch.testing.assert_close(encoder.state_dict()["features.4.weight"], expected, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_listed_in_one_error(tmp_path: Path) -> None:
    state = Published().state_dict()
    del state["features.4.bias"]
    state["stem.weight"] = torch.zeros(3)
    state["features.5.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(WorkflowError, match="E-ENCODER-WEIGHTS") as caught:
        load_encoder_weights(VGG(2, 3, **Published().args), tmp_path / "weights.pth")
    for part in (
        "missing: features.4.bias;",
        "unexpected: stem.weight;",
        "of another shape: features.5.weight (7,) → (6,);",
        "this VGG",
    ):
        assert part in caught.value.message
    assert caught.value.where == str(tmp_path / "weights.pth")


def test_an_encoder_that_the_file_does_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    encoder = VGG(2, 3, **{**Published().args, "channels": (4, 8)})
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(WorkflowError, match=r"features.4.weight \(6, 4, 3, 3\) → \(8, 4, 3, 3\)"):
        load_encoder_weights(encoder, Published().file(tmp_path))
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("norm", "file", "remedy"),
    [
        ("instance", "vgg16_bn", "set norm to batch"),
        ("none", "vgg16_bn", "set norm to batch"),
        ("batch", "vgg16", "set norm to none"),
        ("instance", "vgg16", "layers, channels, norm"),
    ],
)
def test_another_norm_than_the_file_s_is_named_as_the_cause(norm: str, file: str, remedy: str, tmp_path: Path) -> None:
    path = published_file(tmp_path / "weights.pth", features(PUBLISHED[file][0]))
    with pytest.raises(WorkflowError, match=remedy) as caught:
        encoder_weights(on_meta(VGG, 2, 3, norm=norm), path)
    assert "more" in caught.value.message and len(caught.value.message) < 2500  # long lists are cut


def test_a_classifier_of_another_size_starts_random_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Published().file(tmp_path)
    for encoder in (VGG(2, 3, **Published().args), VGG(2, 3, fc_channels=5, fc_kernel_size=3, **Published().args)):
        load_encoder_weights(encoder, path)
        assert not caplog.text
    encoder = VGG(2, 3, fc_channels=16, fc_kernel_size=3, **Published().args)
    before = encoder.classifier[0].weight.clone()
    load_encoder_weights(encoder, path)
    assert "W-ENCODER-WEIGHTS" in caplog.text and "classifier.0.weight" in caplog.text
    assert torch.equal(encoder.classifier[0].weight, before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file"),
        (b"", "cannot be read"),
        (b"<html>404: not found</html>", "cannot be read"),
        ("truncated", "cannot be read"),
        ("code", "cannot be read"),
        ("numbers", "no state dict"),
        ("nan", "NaN or infinite in features.0.bias"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_weights_is_refused(content: Any, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    state = Published().state_dict()
    if content == "code":
        torch.save({"features.0.weight": Path}, path)  # a pickle that imports
    elif content == "numbers":
        torch.save({"epoch": 3}, path) if suffix == ".pth" else save_file({}, path)
    elif content in ("nan", "truncated"):
        if content == "nan":
            state["features.0.bias"][1] = torch.nan
        torch.save(state, path) if suffix == ".pth" else save_file(state, path)
        if content == "truncated":
            path.write_bytes(path.read_bytes()[:-500])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(WorkflowError, match=message) as caught:
        encoder_weights(VGG(2, 3, **Published().args), path)
    assert caught.value.error_id == "E-ENCODER-WEIGHTS"
    assert "\n" not in str(caught.value)


def test_a_network_without_such_an_encoder_says_so() -> None:
    with pytest.raises(WorkflowError, match="UNet has no encoder"):
        encoder_of(UNet(2, 1, 2, channels=(2, 2)))
    network = FCN(2, 1, 2, channels=(2, 2), convs_per_stage=1, fc_channels=2, output_stride=2)
    assert encoder_of(network) is network.encoder
