from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medseg.nets.blocks import Layers
from medseg.nets.espnet import ESP, ESPNet
from medseg.nets.weights import load_encoder_weights

SMALL: dict[str, Any] = {"channels": (4, 10, 20), "blocks": (1, 2)}


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(*args: Any, **kwargs: Any) -> ESPNet:
    with torch.device("meta"):
        return ESPNet(*args, **kwargs)


def test_the_paper_s_network_has_as_many_parameters_as_the_authors_code() -> None:
    network = on_meta(2, 3, 20, norm="batch")
    assert num_parameters(network) == 365_109
    classifier = 256 * 20  # of ESPNet-C, which becomes the decoder's first projection
    assert num_parameters(network.encoder) + classifier == 349_449
    assert network.project[1].weight.numel() == classifier


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((ESPNet.__doc__ or "").split())


@pytest.mark.parametrize("dims", [2, 3])
def test_a_module_s_branches_are_summed_up_before_they_are_joined(dims: int) -> None:
    torch.manual_seed(0)
    module = ESP(Layers(dims, norm="none"), 7, 12, dilations=(1, 2, 4, 8, 16), residual=False).double()
    module.bn = nn.Identity()
    x = torch.randn(1, 7, *[9] * dims, dtype=torch.float64)
    convolve = nn.functional.conv2d if dims == 2 else nn.functional.conv3d
    reduced = convolve(x, module.c1.weight, module.c1.bias)
    branches = [
        convolve(reduced, conv.weight, conv.bias, padding=rate, dilation=rate)
        for rate, conv in zip((1, 2, 4, 8, 16), module.branches.values(), strict=True)
    ]
    assert [b.shape[1] for b in branches] == [4, 2, 2, 2, 2]  # the first one takes what 12 leaves over
    expected = [branches[0], *[sum(branches[1 : n + 1]) for n in range(1, 5)]]
    torch.testing.assert_close(module(x), torch.cat(expected, dim=1))


def test_a_residual_module_adds_its_input() -> None:
    torch.manual_seed(0)
    module = ESP(Layers(2, norm="none"), 10, 10, dilations=(1, 2), residual=True)
    module.bn = nn.Identity()
    x = torch.randn(1, 10, 8, 8)
    with_input = module(x)
    module.residual = False
    torch.testing.assert_close(with_input, module(x) + x)


def test_the_averaged_image_joins_the_features_again_at_each_resolution() -> None:
    network = ESPNet(2, 3, 2, **SMALL)
    joined: list[Tensor] = []
    for part in (network.encoder.b1, network.encoder.b2):
        part.register_forward_pre_hook(lambda _, inputs: joined.append(inputs[0]))
    x = torch.randn(2, 3, 16, 32)
    network(x)
    for features in joined:
        x = nn.functional.avg_pool2d(x, 3, stride=2, padding=1)
        torch.testing.assert_close(features[:, -3:], x)


def test_the_authors_weights_fit_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = ESPNet(2, 3, 2, norm="batch").encoder
    published = {name: torch.rand(shape) for name, shape in espnet_c().items()}
    save_file(published, tmp_path / "espnet_p_2_q_8.safetensors")
    load_encoder_weights(encoder, tmp_path / "espnet_p_2_q_8.safetensors")
    loaded = encoder.level3[7].branches["d16"].weight
    torch.testing.assert_close(loaded, published["level3.7.d16.conv.weight"].transpose(2, 3))
    torch.testing.assert_close(encoder.level2_0.bn.act.weight, published["level2_0.act.weight"])


def espnet_c() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' ESPNet-C, with two and eight modules."""
    shapes: dict[str, tuple[int, ...]] = {"classifier.conv.weight": (20, 256, 1, 1)}

    def norm_act(norm: str, act: str, width: int) -> None:
        shapes[f"{act}.weight"] = (width,)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = (width,)

    def module(name: str, fan: int, width: int, kernel: int) -> None:
        narrow = width // 5
        shapes[f"{name}.c1.conv.weight"] = (narrow, fan, kernel, kernel)
        for rate in (1, 2, 4, 8, 16):
            shapes[f"{name}.d{rate}.conv.weight"] = (width - 4 * narrow if rate == 1 else narrow, narrow, 3, 3)

    shapes["level1.conv.weight"] = (16, 3, 3, 3)
    norm_act("level1.bn", "level1.act", 16)
    for level, joined, width, number in ((2, 19, 64, 2), (3, 131, 128, 8)):
        norm_act(f"b{level - 1}.bn", f"b{level - 1}.act", joined)
        module(f"level{level}_0", joined, width, 3)
        norm_act(f"level{level}_0.bn", f"level{level}_0.act", width)
        for n in range(number):
            module(f"level{level}.{n}", width, width, 1)
            norm_act(f"level{level}.{n}.bn.bn", f"level{level}.{n}.bn.act", width)
    norm_act("b3.bn", "b3.act", 256)
    return shapes


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="4 channels for 5 dilations"):
        ESPNet(2, 1, 2, channels=(4, 4, 8))
    with pytest.raises(ValueError, match="each must be there once"):
        ESPNet(2, 1, 2, dilations=(1, 2, 2))


def test_the_third_axis_of_thick_slices_keeps_its_resolution() -> None:
    network = ESPNet(3, 1, 2, **SMALL, in_plane=True).eval()
    assert network.min_size == (8, 8, 1)
    assert network(torch.zeros(1, 1, 17, 16, 3)).shape == (1, 2, 17, 16, 3)
    assert network.encoder.level2[0].branches["d16"].dilation == (16, 16, 1)
