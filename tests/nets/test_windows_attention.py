from __future__ import annotations

import itertools
import math

import pytest
import torch
from monai.networks.nets.swin_unetr import PatchMergingV2, SwinTransformerBlock, compute_mask
from torch import Tensor

from medseg.nets.transformer import Mlp, TransformerBlock
from medseg.nets.windows_attention import PatchExpansion, PatchMerging, WindowAttention, join_blocks, to_blocks

GRIDS = [(6, 9), (7, 4), (3, 10), (5, 6, 4), (4, 7, 3)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(dims: int, *, shifted: bool, window: int = 4, channels: int = 6, heads: int = 2) -> WindowAttention:
    torch.manual_seed(0)
    made = WindowAttention(channels, heads, window_size=[window] * dims, shifted=shifted).double()
    for weight in made.parameters():
        torch.nn.init.normal_(weight)
    return made


def window_of(place: tuple[int, ...], grid: tuple[int, ...], size: int, shifted: bool) -> tuple[int, ...]:
    """Which window a token lies in: those at the near end are cut short where windows are shifted."""
    missing = [size - size // 2 if shifted and m > size else 0 for m in grid]
    return tuple((n + lost) // min(size, m) for n, lost, m in zip(place, missing, grid, strict=True))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_window_attention_equals_a_brute_force_softmax_over_each_token_s_window(
    grid: tuple[int, ...], shifted: bool
) -> None:
    made = attention(len(grid), shifted=shifted)
    tokens = random(1, math.prod(grid), 6)
    places = list(itertools.product(*[range(n) for n in grid]))
    queries, keys, values = made.qkv(tokens)[0].chunk(3, dim=1)
    expected = torch.empty_like(tokens[0])
    for n, place in enumerate(places):
        mine = window_of(place, grid, 4, shifted)
        seen = [m for m, other in enumerate(places) if window_of(other, grid, 4, shifted) == mine]
        rows = []
        for m in seen:
            row = 0
            for a, b in zip(place, places[m], strict=True):
                row = row * 7 + a - b + 3  # 2 · 4 − 1 offsets along an axis
            rows.append(row)
        for head in range(2):
            of_head = slice(3 * head, 3 * head + 3)
            scores = keys[seen, of_head] @ queries[n, of_head] / math.sqrt(3)
            weights = (scores + made.relative_position_bias_table[rows, head]).softmax(dim=0)
            expected[n, of_head] = weights @ values[seen, of_head]
    torch.testing.assert_close(made(tokens, grid)[0], made.proj(expected))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(8, 12), (8, 4, 12)])
def test_a_block_equals_monai_s_where_windows_divide_the_grid(grid: tuple[int, ...], shifted: bool) -> None:
    dims = len(grid)
    ours = TransformerBlock(6, attention=attention(dims, shifted=shifted), mlp=Mlp(6, 12)).double()
    shift = [2 if shifted else 0] * dims
    theirs = SwinTransformerBlock(6, 2, [4] * dims, shift, mlp_ratio=2.0).double()
    names = {"mlp.fc1": "mlp.linear1", "mlp.fc2": "mlp.linear2"}
    weights = dict(ours.state_dict())
    for name, other in names.items():
        for kind in ("weight", "bias"):
            weights[f"{other}.{kind}"] = weights.pop(f"{name}.{kind}")
    index = {name: tensor for name, tensor in theirs.state_dict().items() if name.endswith("index")}
    theirs.load_state_dict(weights | index)
    for norm in (theirs.norm1, theirs.norm2):
        norm.eps = ours.norm1.eps
    tokens = random(2, math.prod(grid), 6)
    window, used = theirs.window_size, [s if n > 4 else 0 for s, n in zip(shift, grid, strict=True)]
    mask = compute_mask(list(grid), tuple(window), tuple(used), tokens.device)
    expected = theirs(tokens.unflatten(1, grid), mask.double())
    torch.testing.assert_close(ours(tokens, grid), expected.flatten(1, -2))


def test_padding_changes_nothing() -> None:
    made = attention(2, shifted=True)
    tokens = random(2, 7 * 9, 6)
    one_more = torch.cat([tokens.unflatten(1, (7, 9)), random(2, 7, 1, 6, seed=1)], dim=2)  # a column at the far end
    inside = made(one_more.flatten(1, 2), (7, 10)).unflatten(1, (7, 10))[:, :, :6]
    # The windows of the first six columns end before it, whether it is a token or padding.
    torch.testing.assert_close(made(tokens, (7, 9)).unflatten(1, (7, 9))[:, :, :6], inside)


def test_shifted_windows_join_what_windows_keep_apart() -> None:
    plain, shifted = (attention(2, shifted=s) for s in (False, True))
    tokens = random(1, 64, 6).requires_grad_()

    def seen_from(mixed: Tensor) -> set[tuple[int, int]]:
        (gradient,) = torch.autograd.grad(mixed.unflatten(1, (8, 8))[0, 3, 3].sum(), tokens)
        return {tuple(n) for n in gradient[0].abs().sum(dim=1).unflatten(0, (8, 8)).nonzero().tolist()}

    assert seen_from(plain(tokens, (8, 8))) == set(itertools.product(range(4), range(4)))
    assert seen_from(shifted(tokens, (8, 8))) == set(itertools.product(range(2, 6), range(2, 6)))
    everything = set(itertools.product(range(8), range(8)))
    assert seen_from(shifted(plain(tokens, (8, 8)), (8, 8))) == everything


@pytest.mark.parametrize(("grid", "block"), [((4, 6), (2, 3)), ((4, 6, 2), (2, 3, 1))])
def test_blocks_are_cut_row_by_row_and_joined_again(grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    x = random(2, *grid, 3)
    blocks = to_blocks(x, block)
    assert blocks.shape == (2, math.prod(grid) // 6, 6, 3)
    torch.testing.assert_close(blocks[:, 1, 1], x[:, 0, 4] if len(grid) == 2 else x[:, 0, 1, 1])
    assert torch.equal(join_blocks(blocks, block, grid), x)


@pytest.mark.parametrize("grid", [(4, 6), (4, 6, 2)])
def test_merging_equals_monai_s_but_for_the_order_of_the_neighbors(grid: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dims = len(grid)
    ours = PatchMerging(3, 6, stride=[2] * dims).double()
    theirs = PatchMergingV2(3, spatial_dims=dims).double()
    order = list(itertools.product(range(2), repeat=dims))
    order = [place[::-1] for place in order] if dims == 2 else order  # as in the published 2D ones
    places = {place: slice(3 * n, 3 * n + 3) for n, place in enumerate(order)}
    for name, weight in theirs.state_dict().items():
        blocks = [weight[..., places[place]] for place in itertools.product(range(2), repeat=dims)]
        ours.state_dict()[name].copy_(torch.cat(blocks, dim=-1))
    tokens = random(2, math.prod(grid), 3)
    torch.testing.assert_close(ours(tokens, grid), theirs(tokens.unflatten(1, grid)).flatten(1, -2))


@pytest.mark.parametrize("grid", [(2, 3), (2, 3, 4)])
def test_an_expanded_token_stands_where_it_stood_in_finer_ones(grid: tuple[int, ...]) -> None:
    made = PatchExpansion(4, 2, stride=[2] * len(grid)).double()
    tokens = random(1, math.prod(grid), 4).requires_grad_()
    finer = tuple(2 * n for n in grid)
    expanded = made(tokens, grid)
    assert expanded.shape == (1, math.prod(finer), 2)
    last = expanded.unflatten(1, finer)[(0, *[n - 1 for n in finer])]
    (gradient,) = torch.autograd.grad(last[0], tokens)
    assert gradient[0].abs().sum(dim=1).nonzero().flatten().tolist() == [math.prod(grid) - 1]


def test_a_single_window_and_heads_that_do_not_divide_are_told_apart() -> None:
    whole = attention(2, shifted=True)(random(1, 12, 6), (3, 4))  # no longer than the window: nothing to shift
    torch.testing.assert_close(whole, attention(2, shifted=False)(random(1, 12, 6), (3, 4)))
    with pytest.raises(ValueError, match="the heads must divide the channels"):
        WindowAttention(10, 4, window_size=(7, 7))
