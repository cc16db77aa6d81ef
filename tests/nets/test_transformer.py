from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.nets.encoders.mit import ReducedAttention
from medseg.nets.encoders.resnet_v2 import StandardizedConv
from medseg.nets.segformer import SegFormer
from medseg.nets.transformer import (
    Attention,
    Mlp,
    TransformerBlock,
    attend,
    falling_paths,
    initialize_tokens,
    resize_positions,
    to_grid,
    to_tokens,
)
from medseg.nets.transunet import TransUNet

SMALL_SEGFORMER: dict[str, Any] = {"channels": (4, 8), "depths": (1, 1), "num_heads": (1, 2), "strides": (4, 2)}
SMALL_TRANSUNET: dict[str, Any] = {
    "image_size": 24,
    "width": 4,
    "blocks": (2, 1),
    "hidden_channels": 8,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_channels": (8, 4, 4),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_attention_equals_a_brute_force_softmax() -> None:
    queries, keys, values = random(2, 5, 6), random(2, 7, 6, seed=1), random(2, 7, 6, seed=2)
    mixed = attend(queries, keys, values, num_heads=3)
    for b in range(2):
        for n in range(5):
            for head in range(3):
                mine = slice(2 * head, 2 * head + 2)
                scores = [math.exp(float(queries[b, n, mine] @ keys[b, m, mine]) / math.sqrt(2)) for m in range(7)]
                expected = sum(score * values[b, m, mine] for m, score in enumerate(scores)) / sum(scores)
                torch.testing.assert_close(mixed[b, n, mine], expected)


def test_a_block_equals_torch_s_own() -> None:
    torch.manual_seed(0)
    ours = TransformerBlock(8, attention=Attention(8, 2), mlp=Mlp(8, 16)).double()
    for weight in ours.parameters():
        nn.init.normal_(weight)
    theirs = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).double()
    names = {
        "attn.qkv.": "self_attn.in_proj_", "attn.proj.": "self_attn.out_proj.",
        "mlp.fc1.": "linear1.", "mlp.fc2.": "linear2.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    weights = {
        theirs_prefix + kind: ours.state_dict()[prefix + kind]
        for prefix, theirs_prefix in names.items()
        for kind in ("weight", "bias")
    }
    theirs.load_state_dict(weights)
    tokens = random(2, 6, 8)
    torch.testing.assert_close(ours(tokens, (2, 3)), theirs(tokens))


@pytest.mark.parametrize("grid", [(2, 4), (2, 4, 2)])
def test_reduced_attention_at_ratio_1_is_full_attention(grid: tuple[int, ...]) -> None:
    full = Attention(8, 2).double()
    reduced = ReducedAttention(8, 2, reduction=[1] * len(grid)).double()
    q, kv = full.qkv.weight.split([8, 16])
    q_bias, kv_bias = full.qkv.bias.split([8, 16])
    reduced.load_state_dict(
        {
            "q.weight": q,
            "q.bias": q_bias,
            "kv.weight": kv,
            "kv.bias": kv_bias,
            "proj.weight": full.proj.weight,
            "proj.bias": full.proj.bias,
        }
    )
    tokens = random(2, math.prod(grid), 8)
    torch.testing.assert_close(reduced(tokens, grid), full(tokens, grid))


def test_reduced_attention_attends_to_one_key_for_each_block_of_tokens() -> None:
    attention = ReducedAttention(4, 1, reduction=(2, 1)).double()
    assert attention.sr is not None
    nn.init.constant_(attention.sr.weight, 0)
    for channel in range(4):
        attention.sr.weight.data[channel, channel] = 0.5  # the mean of each block of two
    nn.init.zeros_(attention.sr.bias)
    tokens = random(1, 8, 4)
    means = tokens.unflatten(1, (2, 2, 2)).mean(dim=2).flatten(1, 2)  # of (4, 2): two along the first axis
    keys, values = attention.kv(attention.norm(means)).chunk(2, dim=-1)
    expected = attention.proj(attend(attention.q(tokens), keys, values, num_heads=1))
    torch.testing.assert_close(attention(tokens, (4, 2)), expected)


@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 4)])
def test_position_embeddings_at_the_built_size_are_left_alone(grid: tuple[int, ...]) -> None:
    positions = random(1, math.prod(grid), 6)
    assert torch.equal(resize_positions(positions, grid, grid), positions)


def test_position_embeddings_keep_their_axes_when_interpolated() -> None:
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in (4, 6, 8)], indexing="ij")
    positions = to_tokens(torch.stack(axes)[None])  # each token says where it is
    for channel, finer in enumerate(to_grid(resize_positions(positions, (4, 6, 8), (8, 12, 16)), (8, 12, 16))[0]):
        along = finer.movedim(channel, 0)
        inner = torch.arange(1, len(along) - 1, dtype=torch.float64) / 2 - 0.25  # voxel centres; the ends are flat
        torch.testing.assert_close(along[1:-1], inner[:, None, None].expand_as(along[1:-1]))


def test_a_dropped_path_leaves_whole_samples_as_they_were_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(4, attention=Attention(4, 1), mlp=Mlp(4, 4), drop_path=0.25).double()
    with torch.no_grad():
        for weight in block.attn.parameters():
            weight.zero_()
        for weight in block.mlp.parameters():
            weight.zero_()
        block.mlp.fc2.bias.fill_(3)
    tokens = torch.zeros(4000, 5, 4, dtype=torch.float64)
    change = block.train()(tokens, (5,)).detach()
    per_sample = change.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert sorted(set(per_sample[:, 0].tolist())) == pytest.approx([0, 4])
    assert change.mean().item() == pytest.approx(3, rel=0.05)
    assert (block.eval()(tokens, (5,)) == 3).all()
    assert falling_paths(0.2, 3) == pytest.approx([0, 0.1, 0.2]) and falling_paths(0.2, 1) == [0]


def test_linear_layers_start_small_and_without_bias() -> None:
    torch.manual_seed(0)
    mlp = Mlp(64, 256)
    initialize_tokens(mlp)
    assert mlp.fc1.weight.detach().std() == pytest.approx(0.02, rel=0.05)
    assert not mlp.fc1.bias.any() and not mlp.fc2.bias.any()


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    for make in (lambda: Attention(10, 4), lambda: ReducedAttention(10, 4, reduction=(1, 1)), lambda: Attention(8, 0)):
        with pytest.raises(ValueError, match="the heads must divide the channels"):
            make()


@pytest.mark.parametrize("dims", [2, 3])
def test_a_standardized_convolution_does_not_change_with_the_scale_and_offset_of_its_weights(dims: int) -> None:
    conv = StandardizedConv(dims, 3, 4, kernel_size=3).double()
    x = random(1, 3, *[5] * dims)
    before = conv(x)
    kernel = conv.weight[1].detach().clone()
    with torch.no_grad():
        conv.weight.mul_(50).add_(7)
    torch.testing.assert_close(conv(x), before, rtol=1e-3, atol=1e-3)
    middle = (slice(None), *[slice(1, 4)] * dims)
    expected = (x[0][middle] * (kernel - kernel.mean()) / kernel.std(correction=0)).sum()
    torch.testing.assert_close(before[(0, 1, *[2] * dims)], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("network", "args"), [(SegFormer, SMALL_SEGFORMER), (TransUNet, SMALL_TRANSUNET)], ids=["segformer", "transunet"]
)
def test_inflated_to_3d_it_equals_the_2d_network_on_a_stack_of_equal_slices(network: Any, args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    flat = network(2, 2, 3, norm="batch", **args).double()
    if network is TransUNet:
        flat.encoder.patch_embed.backbone.stem.conv.standardize = True  # at each call, as the published one
    for _ in range(3):
        flat(random(4, 2, 24, 24))  # running averages of the batch norms
    deep = network(3, 2, 3, norm="batch", in_plane=True, **{**args, **_deep_grid(args)}).double()
    weights = flat.state_dict()
    if network is TransUNet:
        positions = to_grid(weights["encoder.pos_embed"], flat.encoder.grid)
        weights["encoder.pos_embed"] = to_tokens(positions.transpose(2, 3))  # row by row, as they are published
        encoder = deep.encoder.fitted(_under("encoder.", weights))
        weights.update({f"encoder.{name}": w for name, w in encoder.items()})
    deep.load_state_dict({name: _inflated(weights[name], w.shape) for name, w in deep.state_dict().items()})
    slices = random(2, 2, 21, 30, seed=1)
    expected = flat.eval()(slices)
    logits = deep.eval()(slices[..., None].expand(-1, -1, -1, -1, 5))
    assert deep.min_size == (*flat.min_size, 1)
    torch.testing.assert_close(logits, expected[..., None].expand_as(logits), rtol=1e-5, atol=1e-5)


def _deep_grid(args: dict[str, Any]) -> dict[str, Any]:
    return {"image_size": (args["image_size"], args["image_size"], 4)} if "image_size" in args else {}


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _inflated(weight: Tensor, shape: torch.Size) -> Tensor:
    if weight.shape == shape:
        return weight
    inflated = weight.new_zeros(shape)
    inflated[..., shape[-1] // 2] = weight
    return inflated
