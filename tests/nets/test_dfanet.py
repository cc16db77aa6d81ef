from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets.blocks import Layers
from medseg.nets.dfanet import DFANet, FCAttention

SMALL: dict[str, Any] = {"channels": (8, 8, 16), "blocks": (1, 1, 1), "attention_channels": 8, "decoder_channels": 8}


def count_on_meta(*args: Any, **kwargs: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DFANet(*args, **kwargs).parameters())


def block(fan: int, out: int, *, first: bool) -> int:
    """Three separable convolutions, a norm after each half; a norm and a projection in the first one's shortcut."""
    narrow = out // 4
    convs = [(fan, narrow), (narrow, narrow), (narrow, out)]
    return sum(9 * a + 2 * a + a * b + 2 * b for a, b in convs) + (fan * out + 2 * out if first else 0)


def test_its_parameters_are_those_of_the_paper_s_table() -> None:
    # Neither the paper's 7.8 million nor the 3,046,952 of a public repository follow from that table; see the class.
    stages = [(48, 4), (96, 6), (192, 4)]
    count = 3 * 8 * 9 + 2 * 8
    for fans in ((8, 48, 96), (192 + 48, 48 + 96, 96 + 192), (192 + 48, 48 + 96, 96 + 192)):
        for fan, (out, number) in zip(fans, stages, strict=True):
            count += block(fan, out, first=True) + (number - 1) * block(out, out, first=False)
        count += 2 * 192 * 1000 + (48 + 2) * 32 + (192 + 2) * 32  # attention, and what the decoder takes
    count += (32 + 2) * 32 + 32 * 19 + 19
    assert count_on_meta(2, 3, 19, norm="batch") == count == 1_826_899


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (count_on_meta(dims, 1, 2) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((DFANet.__doc__ or "").split())


@pytest.mark.parametrize(("dims", "least"), [(2, 64), (3, 32)])
def test_each_run_works_at_half_the_resolution_of_the_last_and_sees_its_stages(dims: int, least: int) -> None:
    network = DFANet(dims, 1, 2, **SMALL).eval()
    assert network.min_size == (least,) * dims
    shapes = {}
    for n, run in enumerate(network.runs):
        for k, stage in enumerate(run):
            stage.register_forward_pre_hook(lambda _, x, at=(n, k): shapes.update({at: tuple(x[0].shape[1:3])}))
    finest = 64
    network(torch.randn(1, 1, *[finest if dims == 3 else 2 * finest] * dims))  # where the stem is strided
    expected = {}
    for n in range(3):
        channels = ((16 if n else 8) + 8 * bool(n), 8 + 8 * bool(n), 8 + 16 * bool(n))
        expected |= {(n, k): (channels[k], finest // 2 ** (n + k)) for k in range(3)}
    assert shapes == expected


def test_the_logits_hear_of_every_run_s_first_stage_and_end() -> None:
    torch.manual_seed(0)
    network = DFANet(2, 1, 2, **SMALL, norm="batch").eval()
    x = torch.randn(1, 1, 64, 64)
    logits = network(x)
    for reduce in (*network.of_fine, *network.of_coarse):
        kept = reduce.norm.weight.clone()
        nn.init.zeros_(reduce.norm.weight)
        assert not torch.allclose(network(x), logits)
        reduce.norm.weight.data.copy_(kept)
    assert torch.equal(network(x), logits)


@pytest.mark.parametrize("in_plane", [False, True])
def test_attention_weighs_channels_by_the_image_s_average(in_plane: bool) -> None:
    torch.manual_seed(0)
    attention = FCAttention(Layers(3, activation="relu"), 4, 16, in_plane=in_plane)
    x = torch.rand(2, 4, 6, 5, 3)
    first, second = attention.weigh[0].weight[..., 0, 0, 0], attention.weigh[2].weight[..., 0, 0, 0]
    average = x.mean(dim=(2, 3) if in_plane else (2, 3, 4), keepdim=True)
    hidden = torch.einsum("hc,bcijk->bhijk", first, average).relu()
    torch.testing.assert_close(attention(x), x * torch.einsum("ch,bhijk->bcijk", second, hidden).sigmoid())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"blocks": (1, 1)}, "give each stage one"),
        ({"num_runs": 0}, "at least 1"),
        ({"stem_stride": 4}, "must be 1 or 2"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DFANet(2, 1, 2, **args)
