"""What every network of the table promises, in 2D and 3D."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch

from medseg.errors import WorkflowError
from medseg.nets import NETS
from medseg.nets.network import SegmentationNetwork

OUTPUTS = 3
ALL = [pytest.param(name, dims, id=f"{name}-{dims}d") for name, entry in NETS.items() for dims in entry.spatial_dims]
NORM_CHOSEN = [
    pytest.param(name, dims, id=f"{name}-{dims}d")
    for name, entry in NETS.items()
    for dims in entry.spatial_dims
    if "norm" in inspect.signature(entry.network).parameters
]
SUPERVISED = [
    pytest.param(name, dims, id=f"{name}-{dims}d")
    for name, entry in NETS.items()
    for dims in entry.spatial_dims
    if "deep_supervision" in inspect.signature(entry.network).parameters
]
for_all = pytest.mark.parametrize(("name", "dims"), ALL)
for_those_whose_norm_can_be_left_out = pytest.mark.parametrize(("name", "dims"), NORM_CHOSEN)
for_supervised = pytest.mark.parametrize(("name", "dims"), SUPERVISED)


def tiny(name: str, dims: int, in_channels: int = 2, **args: Any) -> SegmentationNetwork:
    torch.manual_seed(0)
    return NETS[name].network(dims, in_channels, OUTPUTS, **{**NETS[name].tiny, **args})


def image(*size: int, batch: int = 2, channels: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@for_all
def test_logits_have_the_size_of_the_input_even_where_the_strides_do_not_divide_it(name: str, dims: int) -> None:
    network = tiny(name, dims).eval()
    least = network.min_size
    odd = [least[0] + 3, *[2 * n - 1 for n in least[1:]]]
    for size in (least, odd, network.efficient_size(odd)):
        assert network(image(*size)).shape == (2, OUTPUTS, *size)


@for_all
def test_the_seed_decides_weights_logits_and_gradients(name: str, dims: int) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        network = tiny(name, dims).train()
        logits = network(image(*[2 * n for n in network.min_size]))
        logits.square().mean().backward()
        found.append([logits, *network.state_dict().values(), *(weight.grad for weight in network.parameters())])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@for_all
def test_every_weight_receives_a_finite_gradient(name: str, dims: int) -> None:
    network = tiny(name, dims).train()
    size = [2 * n for n in network.min_size]
    network(image(*size)).square().mean().backward()
    for weight, tensor in network.named_parameters():
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0, weight


@for_all
def test_one_sample_of_the_smallest_size_can_be_trained_on(name: str, dims: int) -> None:
    network = tiny(name, dims).train()
    logits = network(image(*network.min_size, batch=1))
    logits.sum().backward()
    assert logits.shape == (1, OUTPUTS, *network.min_size)
    assert logits.isfinite().all()


@for_all
def test_an_input_below_the_minimum_is_refused_with_the_minimum_and_a_size_that_fits(name: str, dims: int) -> None:
    network = tiny(name, dims)
    size = [*network.min_size[:-1], network.min_size[-1] - 1]
    with pytest.raises(WorkflowError, match="E-PATCH-SIZE") as caught:
        network(image(*size))
    for named in (size, network.min_size, network.efficient_size(size)):
        assert " × ".join(map(str, named)) in caught.value.message
    with pytest.raises(WorkflowError, match="one size an axis"):
        network.check_size([64] * (5 - dims))


@for_all
def test_the_efficient_size_is_not_padded(name: str, dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny(name, dims).eval()
    seen: list[tuple[int, ...]] = []
    compute = network.outputs
    monkeypatch.setattr(network, "outputs", lambda x: seen.append(tuple(x.shape[2:])) or compute(x))
    size = network.efficient_size([n + n // 3 + 1 for n in network.min_size])
    network(image(*size))
    assert seen == [size]


@for_all
def test_weights_make_the_round_trip_and_evaluation_is_repeatable(name: str, dims: int) -> None:
    network = tiny(name, dims).eval()
    other = NETS[name].network(dims, 2, OUTPUTS, **NETS[name].tiny).eval()
    x = image(*[2 * n for n in network.min_size])
    logits = network(x)
    assert not torch.equal(other(x), logits)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), logits)
    assert torch.equal(network(x), logits)
    assert torch.equal(copy.deepcopy(network)(x), logits)  # as an average of weights makes one


@for_all
def test_bf16_autocast_stays_finite_and_close_to_float32(name: str, dims: int) -> None:
    network = tiny(name, dims).train()
    x = image(*[2 * n + 1 for n in network.min_size])
    exact = network(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(x)
        logits.float().square().mean().backward()
    assert logits.isfinite().all()
    assert (logits.float() - exact).abs().mean() < 0.1 * exact.abs().mean()
    assert all(tensor.grad.isfinite().all() for tensor in network.parameters() if tensor.grad is not None)


@for_those_whose_norm_can_be_left_out
def test_activations_neither_fade_nor_explode_at_the_start(name: str, dims: int) -> None:
    network = tiny(name, dims, norm="none").eval()  # a norm would hide a wrong initialization
    assert 0.1 < network(image(*[4 * n for n in network.min_size])).std() < 10


@for_supervised
def test_deep_supervision_gives_a_list_in_training_only_finest_first(name: str, dims: int) -> None:
    network = tiny(name, dims, deep_supervision=True).train()
    size = [2 * n + 1 for n in network.min_size]
    outputs = network(image(*size))
    assert len(outputs) == 1 + len(network.extra_weights) > 1
    assert outputs[0].shape == (2, OUTPUTS, *size)
    for finer, coarser in itertools.pairwise(outputs):
        assert coarser.shape[1] == OUTPUTS
        is_same_size = name in ("unet_plus_plus", "setr")  # all at full resolution, or on the grid of the tokens
        assert all(n < m or is_same_size for n, m in zip(coarser.shape[2:], finer.shape[2:], strict=True))
    assert isinstance(network.eval()(image(*size)), torch.Tensor)


@for_supervised
def test_every_head_of_deep_supervision_is_trained(name: str, dims: int) -> None:
    network = tiny(name, dims, deep_supervision=True).train()
    outputs = network(image(*[2 * n for n in network.min_size]))
    sum(output.square().mean() for output in outputs).backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in network.parameters())


@for_supervised
def test_weights_trained_with_deep_supervision_load_without_it(name: str, dims: int) -> None:
    trained = tiny(name, dims, deep_supervision=True).eval()
    plain = NETS[name].network(dims, 2, OUTPUTS, **NETS[name].tiny).eval()
    weights = trained.state_dict()
    names = set(weights)
    plain.load_state_dict(weights)
    x = image(*[2 * n for n in plain.min_size])
    assert torch.equal(plain(x), trained(x))
    assert set(weights) == names  # the caller's own is left alone
    with pytest.raises(RuntimeError, match="extra_heads"):
        trained.load_state_dict(plain.state_dict())


def test_every_entry_says_where_it_comes_from_and_what_it_is_good_for() -> None:
    for entry in NETS.values():
        assert entry.title and entry.good_for
        assert "arXiv:" in entry.paper or "doi:" in entry.paper
        assert set(entry.spatial_dims) <= {2, 3}


@pytest.mark.slow
@for_all
def test_exported_it_computes_the_same_for_any_batch(name: str, dims: int) -> None:
    network = tiny(name, dims).eval()
    size = [2 * n for n in network.min_size]
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(network, (image(*size),), dynamic_shapes=({0: batch},)).module()
    for number in (1, 3):
        x = image(*size, batch=number)
        torch.testing.assert_close(exported(x), network(x))


@pytest.mark.parametrize("name", ["ddrnet", "hrnet", "enet", "bisenet", "fast_scnn"])
def test_no_channels_are_refused(name: str) -> None:
    none = {"enet": {"channels": (16, 0, 8)}, "fast_scnn": {"channels": (0, 8, 8)}}
    with pytest.raises(ValueError, match="channels"):
        NETS[name].network(2, 1, 2, **none.get(name, {"width": 0}))
