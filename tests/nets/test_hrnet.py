from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.nets.blocks import Layers
from medseg.nets.encoders.hrnet import ExchangeModule, HRNetEncoder
from medseg.nets.hrnet import HRNet
from medseg.nets.weights import inflate

SMALL: dict[str, Any] = {"width": 4, "stem_channels": 4, "modules_per_stage": (1, 2), "blocks_per_module": 1}


def on_meta(network: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return network(*args, **kwargs)


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("width", "count"), [(18, 9_641_119), (32, 29_546_515), (48, 65_859_379)])
def test_each_width_has_the_official_number_of_parameters(width: int, count: int) -> None:
    assert num_parameters(on_meta(HRNet, 2, 3, 19, width=width, norm="batch")) == count


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(HRNet, dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((HRNet.__doc__ or "").split())


def published_names() -> set[str]:
    """Of the weights of convolutions and norms in ``hrnetv2_w18_imagenet_pretrained.pth``, but the classifier's."""
    convs = ["conv1", "conv2"]
    norms = ["bn1", "bn2"]

    def pair(name: str) -> None:  # what the authors write as a Sequential of convolution and norm
        convs.append(f"{name}.0")
        norms.append(f"{name}.1")

    def block(name: str, num_convs: int) -> None:
        convs.extend(f"{name}.conv{n}" for n in range(1, num_convs + 1))
        norms.extend(f"{name}.bn{n}" for n in range(1, num_convs + 1))

    for n in range(4):
        block(f"layer1.{n}", 3)
    pair("layer1.0.downsample")
    pair("transition1.0")
    for n in (1, 2, 3):
        pair(f"transition{n}.{n}.0")
    for stage, modules in ((2, 1), (3, 4), (4, 3)):
        for m in range(modules):
            for i in range(stage):
                for k in range(4):
                    block(f"stage{stage}.{m}.branches.{i}.{k}", 2)
                for j in range(stage):
                    path = f"stage{stage}.{m}.fuse_layers.{i}.{j}"
                    if j > i:
                        pair(path)
                    for k in range(i - j):
                        pair(f"{path}.{k}")
    running = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{name}.weight" for name in convs} | {f"{name}.{part}" for name in norms for part in running}


def test_the_encoder_s_weights_have_the_published_names() -> None:
    encoder = on_meta(HRNetEncoder, 2, 3, norm="batch")
    assert set(encoder.state_dict()) == published_names()


@pytest.mark.parametrize("dims", [2, 3])
def test_the_high_resolution_stream_is_kept_from_the_stem_to_the_last_module(dims: int) -> None:
    encoder = HRNetEncoder(dims, 1, **SMALL).eval()
    finest: list[tuple[int, ...]] = []
    for module in encoder.modules():
        if isinstance(module, ExchangeModule):
            module.register_forward_hook(lambda _, __, streams: finest.append(tuple(streams[0].shape[1:])))
    size = (32, 48, 16)[:dims]
    features = encoder(torch.randn(1, 1, *size))
    assert finest == [(4, *[n // 4 for n in size])] * 3
    assert [tuple(f.shape[1:]) for f in features] == [(4 * 2**n, *[m // (4 * 2**n) for m in size]) for n in range(3)]


def test_no_path_from_the_image_to_the_finest_stream_has_to_pass_a_coarser_one() -> None:
    torch.manual_seed(0)
    network = HRNet(2, 1, 1, norm="none", activation="elu", **SMALL).eval()
    with torch.no_grad():  # what coarser streams send is cut
        for module in network.encoder.modules():
            if isinstance(module, ExchangeModule):
                for paths in module.fuse_layers:
                    for source, path in enumerate(paths):
                        for weight in path.parameters() if source else ():
                            weight.zero_()
        network.merge.conv.weight[:, 4:] = 0
    x = torch.randn(1, 1, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[0, 0, 32, 32], x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("dims", [2, 3])
def test_every_stream_gets_the_sum_of_all(dims: int) -> None:
    torch.manual_seed(0)
    exchange = ExchangeModule(Layers(dims, norm="none", activation="relu"), (2, 4, 8), 1, stride=[2] * dims).double()
    streams = [torch.randn(1, 2 * 2**n, *[8 // 2**n] * dims).double() for n in range(3)]
    found = [branch(x) for branch, x in zip(exchange.branches, streams, strict=True)]

    def sent(source: int, target: int) -> Tensor:
        if source == target:
            return found[source]
        path = exchange.fuse_layers[target][source](found[source])
        mode = "bilinear" if dims == 2 else "trilinear"
        return path if source < target else F.interpolate(path, scale_factor=2.0 ** (source - target), mode=mode)

    for target, stream in enumerate(exchange(streams)):
        torch.testing.assert_close(stream, F.relu(sum(sent(source, target) for source in range(3))))


def test_a_finer_stem_gives_finer_logits() -> None:
    network = HRNet(3, 1, 2, stem_strides=(2, 1), **SMALL).eval()
    assert network.encoder.strides[0] == (2, 2, 2) and network.min_size == (8, 8, 8)


def test_a_2d_network_inflated_to_3d_gives_each_slice_what_the_2d_one_gives_it() -> None:
    torch.manual_seed(0)
    flat = HRNet(2, 1, 2, norm="batch", **SMALL).double()
    flat.train()(torch.randn(4, 1, 32, 32).double())
    deep = HRNet(3, 1, 2, norm="batch", in_plane=True, **SMALL).double().eval()
    depths = {name: tensor.shape[-1] for name, tensor in deep.state_dict().items() if tensor.dim() == 5}
    weights = flat.state_dict()
    deep.load_state_dict(weights | {name: inflate(weights[name], depth) for name, depth in depths.items()})
    x = torch.randn(1, 1, 40, 33, 3).double()
    logits = deep(x)
    for k in range(3):
        torch.testing.assert_close(logits[..., k], flat.eval()(x[..., k]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"stem_strides": (2,)}, "two convolutions"),
        ({"modules_per_stage": ()}, "at least 1 module"),
        ({"modules_per_stage": (1, 0)}, "at least 1 module"),
        ({"blocks_per_module": 0}, "at least 1 block"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(HRNet, 2, 1, 1, **args)
