from __future__ import annotations

import pytest
import torch
from monai.networks.blocks.squeeze_and_excitation import ChannelSELayer

from medseg.nets.blocks import Layers
from medseg.nets.gates import AttentionGate, SqueezeExcitation


@pytest.mark.parametrize("dims", [2, 3])
def test_squeeze_and_excitation_is_monai_s(dims: int) -> None:
    ours = SqueezeExcitation(Layers(dims), 8, reduction=4)
    theirs = ChannelSELayer(dims, 8, r=4)
    weights = [w if w.dim() == 1 else w.flatten(1) for w in ours.state_dict().values()]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights, strict=True)))
    x = torch.randn(2, 8, *[5, 4, 3][:dims])
    torch.testing.assert_close(ours(x), theirs(x))


def test_squeeze_and_excitation_never_narrows_to_nothing() -> None:
    gate = SqueezeExcitation(Layers(2), 4)
    assert gate(torch.ones(1, 4, 3, 3)).shape == (1, 4, 3, 3)
    with pytest.raises(ValueError, match="reduction is 0"):
        SqueezeExcitation(Layers(2), 4, reduction=0)


def test_attention_is_additive_as_in_the_paper() -> None:
    gate = AttentionGate(Layers(2), 3, 5, stride=1, hidden=4).double()
    skip, context = torch.randn(2, 3, 4, 6).double(), torch.randn(2, 5, 4, 6).double()
    w_x, w_g, psi = (m.weight[..., 0, 0] for m in (gate.of_skip, gate.of_gate, gate.weigh))
    for b, i, j in ((0, 0, 0), (1, 3, 5), (0, 2, 4)):
        compared = (w_x @ skip[b, :, i, j] + w_g @ context[b, :, i, j] + gate.of_gate.bias).clamp(min=0)
        alpha = 1 / (1 + (-(psi @ compared + gate.weigh.bias)).exp())
        torch.testing.assert_close(gate(skip, context)[b, :, i, j], alpha * skip[b, :, i, j])


@pytest.mark.parametrize(("dims", "stride"), [(2, 2), (3, (2, 2, 1))])
def test_the_coarser_grid_decides_about_blocks_of_the_finer_one(dims: int, stride: int | tuple[int, ...]) -> None:
    gate = AttentionGate(Layers(dims), 2, 3, stride=stride)
    coarse = (4, 3, 5)[:dims]
    fine = [n * s for n, s in zip(coarse, (stride,) * dims if isinstance(stride, int) else stride, strict=True)]
    skip, context = torch.randn(1, 2, 1, 1).expand(1, 2, *fine[:2]), torch.randn(1, 3, *coarse)
    if dims == 3:
        skip = skip.unsqueeze(-1).expand(1, 2, *fine)
    weights = gate.weights(skip, context)
    assert weights.shape == (1, 1, *fine)
    assert (weights > 0).all() and (weights < 1).all()
    even = gate.weights(skip, torch.ones(1, 3, *coarse))
    torch.testing.assert_close(even, even.flatten()[0].expand_as(even))  # nothing to tell voxels apart
    assert weights.std() > 1e-4


def test_a_closed_gate_lets_nothing_through_and_an_open_one_all() -> None:
    gate = AttentionGate(Layers(3), 2, 3, stride=2)
    skip, context = torch.randn(1, 2, 4, 4, 4), torch.randn(1, 3, 2, 2, 2)
    torch.nn.init.constant_(gate.weigh.bias, -1000.0)
    assert not gate(skip, context).any()
    torch.nn.init.constant_(gate.weigh.bias, 1000.0)
    assert torch.equal(gate(skip, context), skip)
