"""The CRF against all pairs in float64, and the networks that end with a random field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg.errors import WorkflowError
from medseg.nets import NETS
from medseg.nets.crf import CRF, EXACT_VOXELS, PAIRS_AT_ONCE, Messages, mean_field, refine
from medseg.nets.crf_layers import CRFAsRNN, DeepParsingNetwork
from medseg.nets.weights import encoder_of

GRIDS = [((7, 9), (1.0, 0.7)), ((5, 6, 4), (0.8, 1.0, 2.5))]
UNSYMMETRIC = ((0.0, 1.0, 0.3), (0.8, 0.0, 2.0), (1.0, 0.5, -0.1))
EVERYWHERE: dict[str, Any] = {"connections": "window", "cutoff": 1000.0, "neighbors": 10**6}
TINY: dict[str, Any] = {"name": "unet", "args": {"channels": (4, 8)}}
for_grids = pytest.mark.parametrize(("shape", "spacing_mm"), GRIDS, ids=["2d", "3d"])


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def brute_force(logits: Tensor, image: Tensor, spacing_mm: tuple[float, ...], crf: CRF, regions: bool = False) -> Any:
    """Probabilities by the formula: one kernel matrix of all pairs, in float64."""
    num = image[0].numel()
    place = np.stack(np.indices(image.shape[1:])).reshape(len(spacing_mm), num).T * spacing_mm
    color = image.double().numpy().reshape(len(image), num).T / crf.theta_beta
    apart, alike = (((x[:, None] - x) ** 2).sum(-1) for x in (place, color))
    kernels = [np.exp(-apart / (2 * crf.theta_alpha_mm**2) - alike / 2), np.exp(-apart / (2 * crf.theta_gamma_mm**2))]
    weights = crf.appearance_weight, crf.smoothness_weight
    unary = logits.double().numpy().reshape(len(logits), num)
    costs = 1 - np.eye(len(unary)) if crf.compatibility is None else np.array(crf.compatibility)
    total = np.zeros((num, num))
    for weight, kernel in zip(weights, kernels, strict=True):
        size = kernel.sum(1) if crf.normalization == "symmetric" else np.ones(num)
        total += weight * kernel / np.sqrt(size[:, None] * size)
    np.fill_diagonal(total, 0)
    if regions:  # each a CRF of two labels
        return np.stack([_both(np.stack([0 * one, one]), total, 1 - np.eye(2), crf.iterations)[1] for one in unary])
    return _both(unary, total, costs, crf.iterations)


def _both(unary: Any, total: Any, costs: Any, iterations: int) -> Any:
    def softmax(x: Any) -> Any:
        return np.exp(x) / np.exp(x).sum(0)

    chances = softmax(unary)
    for _ in range(iterations):
        chances = softmax(unary - costs @ (chances @ total))
    return chances


@for_grids
@pytest.mark.parametrize(
    "args",
    [
        {},
        {"normalization": "none", "appearance_weight": 0.2, "smoothness_weight": 0.1},
        {"theta_beta": (0.4, 1.5), "iterations": 3},
        {"compatibility": UNSYMMETRIC},
        EVERYWHERE,
        {**EVERYWHERE, "normalization": "none", "appearance_weight": 0.2, "smoothness_weight": 0.1},
    ],
    ids=["usual", "sums", "channels", "compatibility", "window", "window sums"],
)
def test_it_is_the_sum_over_all_pairs_in_float64(shape, spacing_mm, args) -> None:
    logits, image, crf = drawn(3, *shape), drawn(2, *shape, seed=1), CRF(**args)
    found = refine(logits, image, spacing_mm, crf)
    expected = brute_force(logits, image, spacing_mm, crf).reshape(logits.shape)
    np.testing.assert_allclose(found.logits.softmax(0), expected, atol=1e-5)
    assert found.connections.startswith("windowed" if "connections" in args else "exact")
    assert np.abs(expected - logits.softmax(0).numpy()).max() > 0.1


@for_grids
def test_regions_are_each_a_field_of_yes_and_no(shape, spacing_mm) -> None:
    logits, image = drawn(3, *shape), drawn(1, *shape, seed=1)
    found = refine(logits, image, spacing_mm, regions=True).logits.sigmoid()
    np.testing.assert_allclose(
        found, brute_force(logits, image, spacing_mm, CRF(), regions=True).reshape(logits.shape), atol=1e-5
    )
    alone = refine(logits[1:2], image, spacing_mm, regions=True).logits.sigmoid()
    torch.testing.assert_close(found[1:2], alone)


@for_grids
def test_without_weights_each_voxel_stays_what_it_is(shape, spacing_mm) -> None:
    logits, image = drawn(3, *shape), drawn(1, *shape)
    for args in ({}, EVERYWHERE):
        found = refine(logits, image, spacing_mm, CRF(appearance_weight=0, smoothness_weight=0, **args))
        assert torch.equal(found.logits.softmax(0), logits.softmax(0))


@for_grids
def test_probabilities_do_as_well_as_logits(shape, spacing_mm) -> None:
    logits, image = drawn(3, *shape), drawn(1, *shape, seed=1)
    for chances, regions in ((logits.softmax(0), False), (logits.sigmoid(), True)):
        found = refine(chances, image, spacing_mm, probabilities=True, regions=regions).logits
        expected = refine(logits, image, spacing_mm, regions=regions).logits
        as_chances = torch.sigmoid if regions else lambda x: x.softmax(0)
        torch.testing.assert_close(as_chances(found), as_chances(expected))
    certain = torch.zeros(2, *shape)
    certain[0] = 1
    assert refine(certain, image, spacing_mm, probabilities=True).logits.isfinite().all()


def test_labels_may_be_numbered_otherwise() -> None:
    logits, image, order = drawn(4, 8, 6), drawn(1, 8, 6, seed=1), [2, 0, 3, 1]
    found = refine(logits, image, (1, 1)).logits
    torch.testing.assert_close(refine(logits[order], image, (1, 1)).logits, found[order])


def test_axes_may_be_exchanged_with_their_spacing() -> None:
    logits, image = drawn(2, 9, 6, 5), drawn(1, 9, 6, 5, seed=1)
    for args in ({"connections": "all"}, {"connections": "window", "neighbors": 10}):
        crf = CRF(theta_alpha_mm=4, **args)
        found = refine(logits, image, (1, 2, 3), crf).logits
        turned = refine(logits.permute(0, 3, 1, 2), image.permute(0, 3, 1, 2), (3, 1, 2), crf).logits
        torch.testing.assert_close(turned.permute(0, 2, 3, 1), found, atol=1e-5, rtol=1e-5)


def test_thick_slices_speak_less_to_each_other() -> None:
    """A voxel that all others contradict is persuaded, unless they lie far away."""
    logits = torch.zeros(2, 1, 1, 5)
    logits[1] = 3
    logits[:, 0, 0, 2] = torch.tensor([1.0, 0.0])
    image = torch.zeros(1, 1, 1, 5)
    near, far = (refine(logits, image, (1, 1, mm)).logits[:, 0, 0, 2].argmax() for mm in (1, 30))
    assert (near, far) == (1, 0)


def test_a_window_ends_at_so_many_deviations_and_has_no_more_neighbors_than_wished() -> None:
    image = torch.zeros(1, 1, 40, 40, 40)
    whole = Messages(CRF(theta_alpha_mm=2, cutoff=2, neighbors=1000, connections="window"), image, (1, 1, 2))
    offsets = [o for half, _ in whole._offsets for o in (half, tuple(-n for n in half))]
    grid = np.indices((9, 9, 9)).reshape(3, -1).T - 4
    inside = (grid * (1, 1, 2) ** np.array(1) / 2) ** 2
    assert set(offsets) == {tuple(o) for o, d in zip(grid.tolist(), inside.sum(1), strict=True) if 0 < d <= 4}
    assert f"{len(offsets)} neighbors within 2 standard deviations, 4 mm" in whole.connections
    for neighbors in (100, 30, 6):
        few = Messages(CRF(theta_alpha_mm=9, neighbors=neighbors, connections="window"), image, (1, 1, 2))
        assert neighbors / 8 <= 2 * len(few._offsets) <= neighbors


def test_all_pairs_are_computed_up_to_a_size_or_where_that_is_wished() -> None:
    side = round(EXACT_VOXELS**0.5)
    for n, connections, exact in ((side, "auto", True), (side + 1, "auto", False), (side + 1, "all", True)):
        messages = Messages(CRF(connections=connections), torch.zeros(1, 1, n, n), (1, 1))
        assert messages.is_exact == exact == messages.connections.startswith("exact")


def phantom(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """A ball in a box, logits that noise has spoiled, and the image that shows both plainly but for other noise."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    label = (sum(x**2 for x in axes) < 0.6).astype(np.int64)
    label[sum(np.abs(x - 0.1) for x in axes) < 0.3 * len(shape)] = 2
    image = label + rng.normal(0, 0.2, shape)
    logits = 2 * np.stack([label == n for n in range(3)]) + rng.normal(0, 1.5, (3, *shape))
    return torch.from_numpy(label), torch.from_numpy(image[None]).float(), torch.from_numpy(logits).float()


def dice(found: Tensor, truth: Tensor) -> float:
    return min(
        float(2 * ((found == n) & (truth == n)).sum() / ((found == n).sum() + (truth == n).sum())) for n in (1, 2)
    )


@pytest.mark.parametrize("shape", [(48, 40), (20, 24, 18)], ids=["2d", "3d"])
@pytest.mark.parametrize("connections", ["auto", "window"])
def test_it_raises_the_dice_of_a_noisy_prediction(shape, connections) -> None:
    truth, image, logits = phantom(shape)
    before = dice(logits.argmax(0), truth)
    after = dice(refine(logits, image, (1.0,) * len(shape), CRF(connections=connections)).logits.argmax(0), truth)
    assert after > max(0.85, before + 0.2)


def test_the_image_decides_where_an_edge_is_not_smoothness_alone() -> None:
    truth, image, logits = phantom((48, 40))
    with_image = dice(refine(logits, image, (1, 1)).logits.argmax(0), truth)
    smooth = CRF(appearance_weight=0, smoothness_weight=6)
    assert with_image > dice(refine(logits, image, (1, 1), smooth).logits.argmax(0), truth) + 0.02


def test_pairs_are_held_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    cdist = torch.cdist

    def seen(one: Tensor, other: Tensor, **args: Any) -> Tensor:
        pairs = cdist(one, other, **args)
        sizes.append(pairs.numel())
        return pairs

    monkeypatch.setattr(torch, "cdist", seen)
    refine(drawn(2, 60, 60), drawn(1, 60, 60), (1, 1), CRF(iterations=1))
    assert max(sizes) <= PAIRS_AT_ONCE < 3600**2 == sum(sizes) // 2


def test_a_window_holds_no_more_than_the_prediction_a_few_times() -> None:
    """Counted by torch's own allocations: outputs × voxels floats, whatever the number of neighbors."""
    shape, peaks = (40, 40, 32), []
    logits, image = drawn(6, *shape), drawn(1, *shape)
    for neighbors in (6, 120):
        with torch.profiler.profile(profile_memory=True) as seen:
            refine(logits, image, (1, 1, 1), CRF(neighbors=neighbors, iterations=1))
        held = peak = 0
        for event in seen.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks.append(peak / logits.nbytes)
    assert peaks[1] < 5.2 and peaks[1] - peaks[0] < 0.1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"theta_beta": 0}, "theta_beta is 0; it must be a finite number above 0"),
        ({"theta_beta": (1.0, -1.0)}, "theta_beta"),
        ({"theta_beta": ()}, "theta_beta"),
        ({"theta_alpha_mm": float("nan")}, "theta_alpha_mm"),
        ({"theta_gamma_mm": float("inf")}, "theta_gamma_mm"),
        ({"iterations": 0}, "iterations"),
        ({"neighbors": -1}, "neighbors"),
        ({"cutoff": 0.0}, "cutoff"),
        ({"appearance_weight": -1.0}, "appearance_weight is -1.0; it must be 0 or more"),
        ({"normalization": "paper"}, "one of symmetric, none"),
        ({"connections": "exact"}, "one of auto, all, window"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(args, message) -> None:
    with pytest.raises(ValueError, match=message):
        CRF(**args)


def test_what_does_not_fit_the_image_or_the_labels_is_refused() -> None:
    logits, image = drawn(3, 6, 5), drawn(1, 6, 5)
    for args, message in (
        ({"theta_beta": (1.0, 2.0)}, "2 entries; the image has 1 channels"),
        ({"compatibility": ((0, 1), (1, 0))}, "3 rows of 3"),
        ({"compatibility": ((0, 1, 1), (1, 0, 1), (1, 1, float("nan")))}, "3 rows of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            refine(logits, image, (1, 1), CRF(**args))
    with pytest.raises(ValueError, match="regions are decided each for itself"):
        refine(logits, image, (1, 1), CRF(compatibility=UNSYMMETRIC), regions=True)
    for wrong in (drawn(1, 5, 6), drawn(1, 6, 5, 1)):
        with pytest.raises(ValueError, match="same grid"):
            refine(logits, wrong, (1, 1))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("connections", ["all", "window"])
def test_gradients_of_all_that_is_learned_are_right(connections, regions) -> None:
    image = drawn(1, 1, 3, 4).double()
    crf = CRF(connections=connections, neighbors=6)
    given = [drawn(1, 3, 3, 4), 1 + drawn(2, 3).square(), drawn(3, 3)]
    given = [x.double().requires_grad_() for x in given]

    def field(logits: Tensor, weights: Tensor, costs: Tensor) -> Tensor:
        messages = Messages(crf, image, (1.0, 1.5))
        return mean_field(logits, messages, weights, iterations=2, compatibility=costs, regions=regions)

    assert torch.autograd.gradcheck(field, given)


def inside_of(network: Any) -> Any:
    return network.network


@pytest.mark.parametrize("dims", [2, 3])
def test_crf_as_rnn_is_the_crf_after_the_network(dims) -> None:
    torch.manual_seed(0)
    crf = {"connections": "all", "theta_beta": 0.8}
    network = CRFAsRNN(dims, 1, 3, network=TINY, crf=crf, spacing_mm=(1, 1, 3)[-dims:], iterations=7).eval()
    image = drawn(2, 1, *(8,) * dims)
    with torch.no_grad():
        found, alone = network(image).softmax(1), inside_of(network)(image)
    for n in range(2):
        expected = refine(alone[n], image[n], network.spacing_mm, replace(network.crf, iterations=7))
        torch.testing.assert_close(found[n], expected.logits.softmax(0), atol=1e-5, rtol=1e-5)


def test_crf_as_rnn_takes_fewer_steps_in_training() -> None:
    torch.manual_seed(0)
    network = CRFAsRNN(2, 1, 3, network={"name": "unet", "args": {"channels": (4, 8), "norm": "instance"}})
    image = drawn(1, 1, 16, 16)
    assert (network.train_iterations, network.iterations) == (5, 10)
    five = network.train()(image)
    assert not torch.allclose(network.eval()(image), five)
    network.iterations = 5
    torch.testing.assert_close(network(image), five)


def test_crf_as_rnn_adds_two_weights_a_label_and_a_matrix_to_the_papers_fcn() -> None:
    with torch.device("meta"):
        network = CRFAsRNN(2, 3, 21, network={"name": "fcn"})
        inside = NETS["fcn"].network(2, 3, 21)
    added = sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in inside.parameters())
    assert added == 2 * 21 + 21 * 21
    assert encoder_of(network) is network.network.encoder


def test_the_deep_parsing_network_adds_the_papers_label_context_convolution() -> None:
    with torch.device("meta"):
        network = DeepParsingNetwork(2, 3, 21, network=TINY)
    assert network.context.weight.shape == (105, 21, 9, 9)  # 9 × 9 × 21 × 105
    assert [n for n, _ in network.named_parameters() if not n.startswith("network.")] == [
        "strength", "context.weight", "context.bias"
    ]  # fmt: skip


def test_the_mildest_of_a_labels_contexts_is_its_penalty() -> None:
    torch.manual_seed(0)
    network = DeepParsingNetwork(2, 1, 3, network=TINY, contexts=4, context_size=3).eval()
    logits, image = drawn(1, 3, 9, 7), drawn(1, 1, 9, 7, seed=1)
    with torch.no_grad():
        found = network.field(logits, image)
        local, _ = Messages(network.crf, image, (1.0, 1.0)).filters
        belief = logits.softmax(1)
        penalties = network.context(belief + local(belief)).sigmoid()[0].numpy()
    expected = [[penalties[4 * label + k] for k in range(4)] for label in range(3)]
    np.testing.assert_allclose(logits[0] - found[0], np.min(expected, axis=1), atol=1e-6)
    winners = np.argmin(expected, axis=1)
    assert all(set(np.unique(of_label)) == {0, 1, 2, 3} for of_label in winners)  # none is dead from the start


@pytest.mark.parametrize("name", ["crf_rnn", "deep_parsing"])
def test_any_network_may_be_inside_and_is_checked_as_if_it_stood_alone(name) -> None:
    def make(**args: Any) -> Any:
        with torch.device("meta"):
            return NETS[name].network(2, 1, 2, **args)

    for other in ("fcn", "segformer"):
        inside = NETS[other].network(2, 1, 2, **NETS[other].tiny)
        assert make(network={"name": other, "args": NETS[other].tiny}).min_size == inside.min_size
    with pytest.raises(WorkflowError, match="did you mean 'unet'"):
        make(network={"name": "unett"})
    with pytest.raises(WorkflowError, match="did you mean 'channels'"):
        make(network={"name": "unet", "args": {"chanels": [4, 8]}})
    with pytest.raises(WorkflowError, match=r"deep_supervision: true switches it on"):
        make(network={"name": "unet", "args": {"deep_supervision": True}})
    with pytest.raises(ValueError, match="give its name"):
        make(network={"args": {}})
    with pytest.raises(ValueError, match="give its name"):
        make(network={"name": "unet", "arg": {}})
    with pytest.raises(ValueError, match="padding: same"):
        make(network={"name": "unet", "args": {"padding": "valid", "downsample": "maxpool"}})
    with pytest.raises(ValueError, match="deep_supervision"):
        make(network={"name": "fcn"}, deep_supervision=True)
    with pytest.raises(WorkflowError, match="did you mean 'theta_beta'"):
        make(crf={"theta_betta": 1})
    with pytest.raises(WorkflowError, match="'iterations' is set by medseg itself"):
        make(crf={"iterations": 3})
    with pytest.raises(ValueError, match="spacing_mm"):
        make(spacing_mm=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("name", ["crf_rnn", "deep_parsing"])
def test_regions_stay_independent_yes_and_no(name) -> None:
    """Adding the same to all logits changes sigmoids, but would change no softmax."""
    torch.manual_seed(0)
    network = NETS[name].network(2, 1, 2, network=TINY, regions=True).eval()
    logits, image = drawn(1, 2, 16, 16), drawn(1, 1, 16, 16)
    with torch.no_grad():
        first, second = network.field(logits, image), network.field(logits + 3, image)
    assert not torch.allclose(second - first, torch.full_like(first, 3.0), atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@for_grids
def test_on_a_gpu_it_is_the_same(shape, spacing_mm) -> None:
    logits, image = drawn(3, *shape), drawn(1, *shape, seed=1)
    for args in ({}, EVERYWHERE):
        on_gpu = refine(logits.cuda(), image.cuda(), spacing_mm, CRF(**args)).logits.cpu()
        torch.testing.assert_close(on_gpu, refine(logits, image, spacing_mm, CRF(**args)).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["crf_rnn", "deep_parsing"])
def test_a_step_of_training_can_be_imagined_without_memory(name) -> None:
    with torch.device("meta"):
        network = NETS[name].network(3, 1, 3).train()
        network(torch.empty(1, 1, 64, 64, 64)).sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


def test_without_normalization_a_thinned_window_counts_as_the_full_one() -> None:
    torch.manual_seed(0)
    logits, image = torch.randn(2, 14, 14, 14), torch.zeros(1, 14, 14, 14)

    def change(neighbors: int) -> float:
        crf = CRF(
            normalization="none", connections="window", theta_alpha_mm=3.0, cutoff=2.0, iterations=1,
            smoothness_weight=0.0, neighbors=neighbors,
        )  # fmt: skip
        return float((refine(logits, image, (1.0, 1.0, 1.0), crf).logits - logits).abs().mean())

    ratios = [change(neighbors) / change(10_000) for neighbors in (400, 120, 30)]
    assert all(0.5 < ratio < 2 for ratio in ratios), ratios


def test_half_precision_is_refined_in_full() -> None:
    torch.manual_seed(0)
    logits, image = torch.randn(2, 5, 6), torch.randn(1, 5, 6)
    found = refine(logits.half(), image.half(), (1.0, 1.0)).logits
    torch.testing.assert_close(found, refine(logits, image, (1.0, 1.0)).logits, atol=0.02, rtol=0.02)
