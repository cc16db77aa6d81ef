from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets import NETS
from medseg.nets.setr import SETR
from medseg.nets.transformer import resize_positions

TINY = {**NETS["setr"].tiny, "num_layers": 4}
PAPER: dict[str, Any] = {"hidden_channels": 1024, "num_layers": 24, "image_size": 768, "norm": "batch"}
DECODERS = ["naive", "pup", "mla"]
for_each_decoder = pytest.mark.parametrize("decoder", DECODERS)
in_2d_and_3d = pytest.mark.parametrize("dims", [2, 3])


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(*args: Any, **kwargs: Any) -> SETR:
    with torch.device("meta"):
        return SETR(*args, **kwargs)


@pytest.mark.parametrize(("decoder", "own"), [("naive", 267_539), ("pup", 4_135_699), ("mla", 5_277_203)])
def test_the_paper_s_encoder_and_each_decoder_have_the_parameters_that_they_should(decoder: str, own: int) -> None:
    network = on_meta(2, 3, 19, decoder=decoder, **PAPER)
    assert count(network.encoder) == 305_460_224
    assert count(network) - count(network.encoder) == own  # with "pup" 309.6 million in all


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (count(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((SETR.__doc__ or "").split())


@for_each_decoder
@in_2d_and_3d
def test_it_takes_other_sizes_than_it_was_built_for_and_sees_all_of_them(dims: int, decoder: str) -> None:
    torch.manual_seed(0)
    network = SETR(dims, 1, 2, **{**TINY, "image_size": 16, "decoder": decoder}).eval()
    assert network.min_size == (4,) * dims
    for size in ([4, 5, 6], [16, 16, 16], [37, 18, 9]):
        x = torch.randn(1, 1, *size[:dims], requires_grad=True)
        logits = network(x)
        assert logits.shape == (1, 2, *size[:dims])
    logits[(0, 1, *[0] * dims)].backward()
    assert x.grad is not None and x.grad[(0, 0, *[slice(-4, None)] * dims)].abs().sum() > 0


def test_position_embeddings_are_interpolated_to_the_image_s_grid_and_the_class_token_s_is_not() -> None:
    encoder = SETR(2, 1, 2, **{**TINY, "image_size": 16}).encoder
    nn.init.zeros_(encoder.pos_embed)
    ramp = torch.arange(4.0).repeat_interleave(4)  # over the 4 × 4 grid, along its first axis
    encoder.pos_embed.data[0, 1:] = ramp[:, None]
    encoder.pos_embed.data[0, 0] = 7
    found = resize_positions(encoder.pos_embed[:, 1:], encoder.grid, (8, 4))[0, :, 0].reshape(8, 4)
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])  # half a token inwards from each end
    torch.testing.assert_close(found, expected[:, None].expand(8, 4))
    seen: list[torch.Tensor] = []
    encoder.dropout.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    for parameter in (encoder.patch_embed.proj.weight, encoder.cls_token):
        nn.init.zeros_(parameter)
    encoder(torch.zeros(1, 1, 32, 16))
    torch.testing.assert_close(seen[0][0, 1:, 0].reshape(8, 4), expected[:, None].expand(8, 4))
    assert seen[0][0, 0, 0] == 7


def test_mla_takes_features_after_each_quarter_of_the_layers_and_the_others_after_the_last() -> None:
    found = {decoder: on_meta(2, 1, 2, decoder=decoder, num_layers=24).encoder.features_after for decoder in DECODERS}
    assert found == {"naive": (24,), "pup": (24,), "mla": (6, 12, 18, 24)}
    assert on_meta(2, 1, 2, num_layers=24, deep_supervision=True).encoder.features_after == (10, 15, 20, 24)
    assert on_meta(3, 1, 2, decoder="mla").encoder.features_after == (2, 3, 4, 6)


@for_each_decoder
@in_2d_and_3d
def test_the_decoder_computes_at_its_own_resolution(dims: int, decoder: str) -> None:
    args = {**TINY, "patch_size": 8, "image_size": 32, "decoder": decoder}
    network = SETR(dims, 1, 2, **args).eval()
    seen: list[torch.Size] = []
    network.decoder.register_forward_hook(lambda _, __, output: seen.append(output.shape[2:]))
    network(torch.randn(1, 1, *[32] * dims))
    assert seen == [({"naive": 4, "pup": 16, "mla": 8}[decoder],) * dims]


def test_the_logits_of_mla_hear_of_every_level() -> None:
    torch.manual_seed(0)
    network = SETR(2, 1, 2, **{**TINY, "decoder": "mla"}).eval()
    features = [feature.detach().requires_grad_() for feature in network.encoder(torch.randn(1, 1, 32, 32))]
    network.decoder(features)[0, 1].sum().backward()
    assert len(features) == 4
    assert all(feature.grad is not None and feature.grad.abs().sum() > 0 for feature in features)


@for_each_decoder
@in_2d_and_3d
def test_every_weight_receives_a_gradient_with_every_decoder(dims: int, decoder: str) -> None:
    torch.manual_seed(0)
    network = SETR(dims, 1, 2, **{**TINY, "decoder": decoder}, deep_supervision=True)
    outputs = network(torch.randn(2, 1, *[16] * dims))
    assert len(outputs) == 1 + len(network.extra_weights) == len(network.encoder.features_after) > 2
    sum(output.square().mean() for output in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in network.parameters())


def test_in_plane_the_third_axis_keeps_its_resolution() -> None:
    network = SETR(3, 1, 2, **{**TINY, "image_size": (16, 16, 3)}, in_plane=True).eval()
    assert network.min_size == (4, 4, 1)
    assert network(torch.randn(1, 1, 18, 16, 5)).shape == (1, 2, 18, 16, 5)


@pytest.mark.parametrize(
    ("args", "message"),
    [({"patch_size": 12}, "power of 2"), ({"patch_size": 1}, "at least 2"), ({"num_heads": 5}, "heads must divide")],
)
def test_arguments_that_cannot_be_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(2, 1, 1, **args)
