"""What every loss of the table promises, in 2D and 3D, for classes and for regions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from medseg.losses import LOSSES, Compound, DeepSupervision

R = 3  # classes or regions
SIZES = [(6, 5), (4, 5, 3)]
for_all = pytest.mark.parametrize("name", list(LOSSES))
for_all_kinds = pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])
for_all_sizes = pytest.mark.parametrize("size", SIZES, ids=["2d", "3d"])


def draw(size: tuple[int, ...], *, regions: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, R, *size, generator=generator)
    if regions:
        return logits, torch.randint(0, 2, (2, R, *size), generator=generator).float()
    return logits, torch.randint(0, R, (2, *size), generator=generator)


def draw_mask(size: tuple[int, ...]) -> Tensor:
    return torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1)) < 0.6


def single_voxel(like: Tensor) -> Tensor:
    """All 0 but one voxel, in every sample and region."""
    result = torch.zeros_like(like)
    result[..., 2, 3, 1] = 1
    return result


def perfect(target: Tensor, *, regions: bool) -> Tensor:
    hot = target if regions else nn.functional.one_hot(target, R).movedim(-1, 1)
    return 40 * hot.float() - 20


@for_all
@for_all_kinds
@for_all_sizes
def test_a_perfect_answer_costs_nothing_and_its_opposite_much(name: str, regions: bool, size: tuple[int, ...]) -> None:
    _, target = draw(size, regions=regions)
    answer = perfect(target, regions=regions)
    cost, cost_of_opposite = LOSSES[name]()(answer, target), LOSSES[name]()(-answer, target)
    assert cost < 1e-4 and cost_of_opposite > 0.3
    if name != "boundary":  # which rewards what is well inside
        assert cost > -1e-6


@for_all
@for_all_kinds
@for_all_sizes
def test_the_gradient_is_that_of_finite_differences(name: str, regions: bool, size: tuple[int, ...]) -> None:
    logits, target = draw(size, regions=regions)
    loss, mask = LOSSES[name](), draw_mask(size)
    logits = logits.double().requires_grad_()
    value = loss(logits, target, mask)
    assert value.dtype == torch.float64
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.any()
    assert torch.autograd.gradcheck(lambda x: loss(x, target, mask), logits, fast_mode=True, eps=1e-7, atol=1e-5)


@for_all
@for_all_kinds
def test_every_voxel_that_counts_is_pulled_unless_the_formula_leaves_it_alone(name: str, regions: bool) -> None:
    logits, target = draw((6, 5), regions=regions)
    logits = (logits / 3).requires_grad_()
    mask = draw_mask((6, 5))
    (gradient,) = torch.autograd.grad(LOSSES[name]()(logits, target, mask), logits)
    pulled = (gradient != 0).any(dim=1, keepdim=True)
    if name == "top_k":
        assert 0 < pulled.sum() < mask.sum() / 2
    elif name in ("lovasz", "boundary", "cldice"):  # a margin, an outermost voxel, what is not on a centerline
        assert pulled[mask].float().mean() > 0.5 and not pulled[~mask].any()
    else:
        assert torch.equal(pulled, mask)


@for_all
@for_all_kinds
@for_all_sizes
def test_masked_voxels_change_neither_the_loss_nor_the_gradient(
    name: str, regions: bool, size: tuple[int, ...]
) -> None:
    logits, target = draw(size, regions=regions)
    mask = draw_mask(size)
    loss = LOSSES[name]()
    other_logits = logits.where(mask, -5 * logits)
    other_target = target.where(mask if regions else mask[:, 0], 0)
    results = []
    for a, b in ((logits, target), (other_logits, other_target)):
        a = a.clone().requires_grad_()
        value = loss(a, b, mask)
        value.backward()
        results.append((value.detach(), a.grad))
    torch.testing.assert_close(*(value for value, _ in results))
    torch.testing.assert_close(*(gradient for _, gradient in results))
    assert not (results[0][1] * ~mask).any()


@for_all
@for_all_kinds
def test_a_mask_equals_leaving_the_voxels_out(name: str, regions: bool) -> None:
    logits, target = draw((6, 5), regions=regions)
    mask = torch.ones(2, 1, 6, 5, dtype=torch.bool)
    mask[:, :, 4:] = False
    loss = LOSSES[name]()
    torch.testing.assert_close(loss(logits, target, mask), loss(logits[:, :, :4], target[..., :4, :]))


@for_all
@for_all_kinds
@pytest.mark.parametrize(
    "fill",
    [
        pytest.param(lambda t, m: (torch.zeros_like(t), None), id="nothing there"),
        pytest.param(lambda t, m: (torch.ones_like(t), None), id="one organ everywhere"),
        pytest.param(lambda t, m: (single_voxel(t), None), id="one voxel"),
        pytest.param(lambda t, m: (single_voxel(t), single_voxel(m.float()) > 0), id="one voxel that counts"),
        pytest.param(lambda t, m: (t, torch.zeros_like(m)), id="all masked"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_finite(
    name: str, regions: bool, fill: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]], dtype: torch.dtype
) -> None:
    for scale in (0.0, 1.0, 1e4):
        logits, target = draw((4, 5, 3), regions=regions)
        target, mask = fill(target, draw_mask((4, 5, 3)))
        logits = (scale * logits).to(dtype).requires_grad_()
        value = LOSSES[name]()(logits, target, mask)
        value.backward()
        assert value.isfinite() and logits.grad is not None and logits.grad.isfinite().all()
        if mask is not None and not mask.any():
            assert abs(value) < 1e-6 and not logits.grad.any()


@for_all
@for_all_kinds
@pytest.mark.parametrize("sure", [False, True])
def test_a_perfect_answer_has_a_finite_gradient(name: str, regions: bool, sure: bool) -> None:
    _, target = draw((4, 5, 3), regions=regions)
    logits = ((1e3 if sure else 0.3) * perfect(target, regions=regions)).requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[name]()(logits, target), logits)
    assert gradient.isfinite().all()


@for_all
@for_all_kinds
def test_neither_the_order_of_samples_nor_that_of_organs_matters(name: str, regions: bool) -> None:
    logits, target = draw((4, 5, 3), regions=regions)
    mask = draw_mask((4, 5, 3))
    loss = LOSSES[name]()
    expected = loss(logits, target, mask)
    torch.testing.assert_close(loss(logits.flip(0), target.flip(0), mask.flip(0)), expected)
    if regions:
        torch.testing.assert_close(loss(logits.flip(1), target.flip(1), mask), expected)
    else:  # the background stays where it is
        renamed = torch.tensor([0, 2, 1])
        torch.testing.assert_close(loss(logits[:, renamed], renamed[target], mask), expected)


@for_all
@for_all_kinds
def test_mirrored_images_cost_the_same(name: str, regions: bool) -> None:
    logits, target = draw((4, 5, 3), regions=regions)
    mask = draw_mask((4, 5, 3))
    loss = LOSSES[name]()
    mirrored = loss(logits.flip(2, -1), target.flip(-3, -1), mask.flip(2, -1))
    torch.testing.assert_close(mirrored, loss(logits, target, mask))


@for_all
@for_all_kinds
def test_a_slice_costs_the_same_as_a_volume_of_one_slice(name: str, regions: bool) -> None:
    logits, target = draw((6, 5), regions=regions)
    mask = draw_mask((6, 5))
    loss = LOSSES[name]()
    torch.testing.assert_close(loss(logits[..., None], target[..., None], mask[..., None]), loss(logits, target, mask))


@for_all
@for_all_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scored_in_float32(name: str, regions: bool, dtype: torch.dtype) -> None:
    logits, target = draw((41, 41, 41), regions=regions)  # sums that float16 cannot hold
    logits = logits.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = LOSSES[name]()(logits, target)
    value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, LOSSES[name]()(logits.float(), target))
    assert logits.grad is not None and logits.grad.isfinite().all()


@for_all
@for_all_kinds
def test_bfloat16_costs_a_loss_and_its_gradient_no_more_than_the_rounding_of_logits(name: str, regions: bool) -> None:
    logits, target = draw((8, 9, 7), regions=regions)
    mask, loss = draw_mask((8, 9, 7)), LOSSES[name]()
    rounded = logits.bfloat16()
    results = []
    for given in (rounded, rounded.float(), logits):
        given = given.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(given, target, mask)
        value.backward()
        assert value.dtype == torch.float32 and given.grad is not None
        results.append((value.detach(), given.grad.float()))
    (value, gradient), (same, same_gradient), (exact, _) = results
    assert value == same == loss(rounded.float(), target, mask)
    torch.testing.assert_close(gradient, same_gradient, rtol=2**-8, atol=1e-30)
    torch.testing.assert_close(value, exact, rtol=2e-3, atol=0)


@for_all
@for_all_kinds
def test_deep_supervision_of_every_loss_is_the_mean_over_resolutions_in_bfloat16_too(name: str, regions: bool) -> None:
    logits, target = draw((4, 6, 8), regions=regions)
    coarse, _ = draw((2, 3, 4), regions=regions)
    mask, loss = draw_mask((4, 6, 8)), LOSSES[name]()
    outputs = [part.bfloat16().requires_grad_() for part in (logits, coarse)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = DeepSupervision(Compound([loss], [1.0]), (0.5,))(outputs, target, mask)
    value.backward()
    assert value.dtype == torch.float32
    assert all(part.grad is not None and part.grad.isfinite().all() and part.grad.any() for part in outputs)
    fine, rough = (part.detach().float() for part in outputs)
    every_other = (..., slice(1, None, 2), slice(1, None, 2), slice(1, None, 2))
    expected = loss(fine, target, mask) + 0.5 * loss(rough, target[every_other], mask[every_other])
    torch.testing.assert_close(value, expected / 1.5)


def test_every_loss_says_where_it_comes_from_and_what_it_is_good_for() -> None:
    for loss in LOSSES.values():
        assert loss.title and loss.paper and loss.good_for
