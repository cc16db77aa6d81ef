from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss, GeneralizedDiceLoss, TverskyLoss
from torch import Tensor

from medseg.losses import Dice, FocalTversky, GeneralizedDice, Tversky


def draw(size: tuple[int, ...], *, regions: bool, num: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, num, *size, generator=generator)
    if regions:
        return logits, torch.randint(0, 2, (3, num, *size), generator=generator).float()
    return logits, torch.randint(0, num, (3, *size), generator=generator)


def brute_dice(
    logits: Tensor, target: Tensor, mask: Tensor, *, batch: bool, background: bool, squared: bool, smooth: float
) -> float:
    """In float64, voxel by voxel."""
    x, t, counts = logits.double().numpy(), target.numpy(), mask.numpy()
    regions = t.ndim == x.ndim
    num = x.shape[1]
    sums = np.zeros((x.shape[0], num, 3))
    for place in itertools.product(range(x.shape[0]), *(range(n) for n in x.shape[2:])):
        b, voxel = place[0], place[1:]
        if not counts[(b, 0, *voxel)]:
            continue
        values = x[(b, slice(None), *voxel)]
        p = 1 / (1 + np.exp(-values)) if regions else np.exp(values) / np.exp(values).sum()
        y = t[(b, slice(None), *voxel)] if regions else np.eye(num)[t[(b, *voxel)]]
        power = 2 if squared else 1
        sums[b] += np.stack([p * y, p**power, y**power], axis=1)
    if batch:
        sums = sums.sum(0, keepdims=True)
    if not (regions or background):
        sums = sums[:, 1:]
    return float(1 - ((2 * sums[..., 0] + smooth) / (sums[..., 1] + sums[..., 2] + smooth)).mean())


@pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_dice_equals_brute_force(regions: bool, batch: bool, background: bool, squared: bool) -> None:
    for size in ((4, 5), (3, 4, 2)):
        logits, target = draw(size, regions=regions)
        mask = torch.rand(3, 1, *size, generator=torch.Generator().manual_seed(1)) < 0.7
        loss = Dice(batch=batch, include_background=background, squared=squared, smooth=0.5)
        expected = brute_dice(logits, target, mask, batch=batch, background=background, squared=squared, smooth=0.5)
        assert loss(logits.double(), target, mask).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_dice_and_tversky_equal_monai_s_in_value_and_gradient(regions: bool, batch: bool, background: bool) -> None:
    logits, target = draw((6, 5, 4), regions=regions)
    how = {"sigmoid": True} if regions else {"softmax": True, "to_onehot_y": True}
    common = {"batch": batch, "include_background": background or regions, "smooth_nr": 1e-5, "smooth_dr": 1e-5, **how}
    ours_and_theirs = [
        (Dice(batch=batch, include_background=background), DiceLoss(**common)),
        (
            Dice(batch=batch, include_background=background, squared=True),
            DiceLoss(squared_pred=True, **common),
        ),
        (
            Tversky(alpha=0.3, beta=0.7, batch=batch, include_background=background),
            TverskyLoss(alpha=0.3, beta=0.7, **common),
        ),
    ]
    for ours, theirs in ours_and_theirs:
        a, b = logits.double().requires_grad_(), logits.double().requires_grad_()
        value, expected = ours(a, target), theirs(b, target.double() if regions else target[:, None])
        torch.testing.assert_close(value, expected.to(value), rtol=0, atol=1e-6)
        value.backward()
        expected.backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_dice_of_a_half_found_organ_by_hand() -> None:
    target = torch.tensor([[[1, 1, 0, 0]]])
    logits = torch.full((1, 2, 1, 4), -30.0)
    logits[0, 1, 0, 0] = logits[0, 0, 0, 1:] = 30
    assert Dice(smooth=0)(logits, target).item() == pytest.approx(1 - 2 * 1 / (1 + 2))
    assert Dice(smooth=0, include_background=True)(logits, target).item() == pytest.approx(
        1 - (2 * 1 / (1 + 2) + 2 * 2 / (3 + 2)) / 2
    )


def test_tversky_weighs_misses_by_beta_and_false_alarms_by_alpha() -> None:
    target = torch.tensor([[[1, 1, 0, 0]]])
    sure = torch.full((1, 2, 1, 4), -30.0)
    missed, false_alarm = sure.clone(), sure.clone()
    missed[0, 1, 0, 0] = missed[0, 0, 0, 1:] = 30  # 1 of 2 voxels found
    false_alarm[0, 1, 0, :3] = false_alarm[0, 0, 0, 3] = 30  # both, and 1 more
    loss = Tversky(alpha=0.2, beta=0.8, smooth=0)
    assert loss(missed, target).item() == pytest.approx(1 - 1 / (1 + 0.8))
    assert loss(false_alarm, target).item() == pytest.approx(1 - 2 / (2 + 0.2))


def test_tversky_of_equal_halves_is_dice() -> None:
    logits, target = draw((6, 5), regions=False)
    ours = Tversky(alpha=0.5, beta=0.5, smooth=0)(logits, target)
    torch.testing.assert_close(ours, Dice(smooth=0)(logits, target))


def test_scoring_the_batch_as_one_forgives_a_patch_without_the_organ() -> None:
    target = torch.zeros(2, 4, 4, dtype=torch.long)
    target[0] = 1
    logits = torch.stack([8 * (1.0 - target), 8.0 * target], dim=1)  # all but certain
    assert Dice(batch=True)(logits, target) < 0.01
    assert Dice(batch=False)(logits, target) > 0.49


def organ_sums(logits: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hits, predicted and true voxels in float64, each (B, R)."""
    x = logits.double().numpy()
    regions = target.dim() == logits.dim()
    probs = 1 / (1 + np.exp(-x)) if regions else np.exp(x) / np.exp(x).sum(1, keepdims=True)
    true = target.double().numpy() if regions else np.moveaxis(np.eye(x.shape[1])[target.numpy()], -1, 1)
    counted = np.ones_like(x) if mask is None else mask.numpy()
    axes = tuple(range(2, x.ndim))
    return (probs * true * counted).sum(axes), (probs * counted).sum(axes), (true * counted).sum(axes)


@pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])
@pytest.mark.parametrize("batch", [False, True])
def test_generalized_dice_is_the_paper_s_formula(regions: bool, batch: bool) -> None:
    for size in ((6, 5), (4, 5, 3)):
        logits, target = draw(size, regions=regions)
        mask = torch.rand(3, 1, *size, generator=torch.Generator().manual_seed(1)) < 0.7
        hit, predicted, true = (s.sum(0, keepdims=True) if batch else s for s in organ_sums(logits, target, mask))
        weights = 1 / true**2
        expected = 1 - 2 * (weights * hit).sum(1) / (weights * (predicted + true)).sum(1)
        loss = GeneralizedDice(batch=batch, smooth=0)(logits.double(), target, mask)
        assert loss.item() == pytest.approx(expected.mean(), abs=1e-9)


@pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("absent", [False, True])
def test_generalized_dice_equals_monai_s(regions: bool, batch: bool, background: bool, absent: bool) -> None:
    logits, target = draw((6, 5, 4), regions=regions)
    if absent and regions:
        target[:, 2] = 0
    elif absent:
        target[target == 2] = 1
    how = {"sigmoid": True} if regions else {"softmax": True, "to_onehot_y": True}
    theirs = GeneralizedDiceLoss(batch=batch, include_background=background or regions, smooth_nr=0, smooth_dr=0, **how)
    a, b = logits.double().requires_grad_(), logits.double().requires_grad_()
    value = GeneralizedDice(batch=batch, include_background=background, smooth=0)(a, target)
    expected = theirs(b, target.double() if regions else target[:, None])
    torch.testing.assert_close(value, expected.to(value), rtol=0, atol=1e-6)
    value.backward()
    expected.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_generalized_dice_punishes_what_is_found_of_an_absent_organ() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[0, 0, 0] = 1
    right = 20 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    wrong = right.clone()
    wrong[0, :, 3] = torch.tensor([0.0, 0, 20])[:, None]
    loss = GeneralizedDice()
    assert loss(right, target) < 1e-3
    assert loss(wrong, target) > 0.3
    empty = torch.zeros(1, 4, 4, dtype=torch.long)
    assert GeneralizedDice(include_background=False)(wrong, empty) > 0.9


def test_generalized_dice_still_sees_large_organs() -> None:
    target = torch.ones(1, 1, 40, 40, 40)
    logits = torch.zeros(1, 1, 40, 40, 40)
    assert GeneralizedDice()(logits, target).item() == pytest.approx(1 - 2 * 0.5 / 1.5, abs=1e-4)


@pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])
@pytest.mark.parametrize("gamma", [1.0, 4 / 3, 3.0])
def test_focal_tversky_is_the_paper_s_formula(regions: bool, gamma: float) -> None:
    logits, target = draw((4, 5, 3), regions=regions)
    hit, predicted, true = (sums.sum(0) for sums in organ_sums(logits, target))
    index = (hit + 1e-5) / (hit + 0.7 * (true - hit) + 0.3 * (predicted - hit) + 1e-5)
    expected = ((1 - index[0 if regions else 1 :]) ** (1 / gamma)).mean()
    assert FocalTversky(gamma=gamma)(logits.double(), target).item() == pytest.approx(expected, abs=1e-9)


def test_focal_tversky_needs_a_positive_gamma() -> None:
    with pytest.raises(ValueError, match="gamma is 0"):
        FocalTversky(gamma=0)


@pytest.mark.parametrize("kind", [Dice, GeneralizedDice, Tversky, FocalTversky])
def test_arguments_without_meaning_are_refused(kind: type[torch.nn.Module]) -> None:
    with pytest.raises(ValueError, match="smooth is -1"):
        kind(smooth=-1)
    for alpha, beta in ((-0.1, 0.7), (0.3, -1.0), (0, 0)) if kind in (Tversky, FocalTversky) else ():
        with pytest.raises(ValueError, match=f"alpha is {alpha} and beta {beta}"):
            kind(alpha=alpha, beta=beta)
