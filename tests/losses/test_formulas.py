"""Every loss beside its formula as the papers have it, in float64 and without a thought for speed: value and slope."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from medseg.losses import LOSSES

R = 3  # classes or regions
WEIGHTS = (0.2, 1.0, 3.0)
SIZE = (4, 5, 3)  # in 2D all is as in a volume of one slice, see test_losses.py


def probabilities(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of each organ in each voxel, beside what is true."""
    if target.dim() == x.dim():
        return 1 / (1 + (-x).exp()), target
    return x.exp() / x.exp().sum(1, keepdim=True), torch.stack([target == c for c in range(R)], 1).double()


def organs(x: Tensor, target: Tensor, mask: Tensor, *, batch: bool, background: bool) -> Iterator[tuple[Tensor, ...]]:
    """Probability and truth of each organ's voxels that count, of the batch or of one sample after the other."""
    probs, truth = probabilities(x, target)
    first = 0 if background or target.dim() == x.dim() else 1
    for samples in [slice(None)] if batch else [slice(b, b + 1) for b in range(len(x))]:
        for organ in range(first, R):
            yield tuple(part[samples, organ][mask[samples, 0]] for part in (probs, truth))


def mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def binary_cross_entropy(
    x: Tensor, target: Tensor, mask: Tensor, *, class_weights: Sequence[float] = (1, 1, 1), label_smoothing: float = 0
) -> Tensor:
    truth = probabilities(x, target)[1] * (1 - label_smoothing) + label_smoothing / 2
    losses = truth * (-x).exp().log1p() + (1 - truth) * x.exp().log1p()
    per_organ = torch.stack([losses[:, organ][mask[:, 0]].mean() for organ in range(R)])
    share = torch.tensor(class_weights, dtype=x.dtype) / sum(class_weights)
    return (per_organ * share).sum()


def cross_entropy(
    x: Tensor, target: Tensor, mask: Tensor, *, class_weights: Sequence[float] = (1, 1, 1), label_smoothing: float = 0
) -> Tensor:
    if target.dim() == x.dim():
        return binary_cross_entropy(x, target, mask, class_weights=class_weights, label_smoothing=label_smoothing)
    probs, truth = probabilities(x, target)
    weights = torch.tensor(class_weights, dtype=x.dtype).view(R, *[1] * (x.dim() - 2))
    aim = truth * (1 - label_smoothing) + label_smoothing / R
    losses, counted = -(aim * weights * probs.log()).sum(1), (truth * weights).sum(1)
    return losses[mask[:, 0]].sum() / counted[mask[:, 0]].sum()


def surprise(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """1 - p and -log p of the truth, (B, R or 1, ...)."""
    probs, truth = probabilities(x, target)
    if target.dim() == x.dim():
        wrong_way = torch.where(truth > 0, -x, x)
        return 1 / (1 + (-wrong_way).exp()), wrong_way.exp().log1p()
    return (probs * (1 - truth)).sum(1, keepdim=True), -(probs.log() * truth).sum(1, keepdim=True)


def top_k(x: Tensor, target: Tensor, mask: Tensor, *, share: float = 0.1) -> Tensor:
    losses = surprise(x, target)[1]
    losses = losses[mask.expand_as(losses)].sort(descending=True).values
    return losses[: max(1, round(share * len(losses)))].mean()


def focal(x: Tensor, target: Tensor, mask: Tensor, *, gamma: float = 2, alpha: float | None = None) -> Tensor:
    doubt, losses = surprise(x, target)
    in_organ = (target if target.dim() == x.dim() else target[:, None]) > 0
    factor = 1 if alpha is None else torch.where(in_organ, alpha, 1 - alpha)
    losses = factor * doubt**gamma * losses
    return losses[mask.expand_as(losses)].mean()


def dice(*given: Tensor, batch: bool = True, background: bool = False, squared: bool = False) -> Tensor:
    power = 2 if squared else 1
    return 1 - mean(
        [
            (2 * (p * q).sum() + 1e-5) / ((p**power).sum() + (q**power).sum() + 1e-5)
            for p, q in organs(*given, batch=batch, background=background)
        ]
    )


def generalized_dice(*given: Tensor, batch: bool = True, background: bool = True) -> Tensor:
    found = list(organs(*given, batch=batch, background=background))
    groups = 1 if batch else len(given[0])
    size, losses = len(found) // groups, []
    for group in (found[i * size : (i + 1) * size] for i in range(groups)):
        smallest = min((q.sum() for _, q in group if q.any()), default=torch.tensor(1.0))
        weights = [(smallest / q.sum()) ** 2 if q.any() else 1 for _, q in group]
        hit = sum(w * (p * q).sum() for w, (p, q) in zip(weights, group, strict=True))
        both = sum(w * (p.sum() + q.sum()) for w, (p, q) in zip(weights, group, strict=True))
        losses.append(1 - (2 * hit + 1e-5) / (both + 1e-5))
    return mean(losses)


def tversky_indices(*given: Tensor, alpha: float, beta: float, batch: bool, background: bool) -> list[Tensor]:
    return [
        ((p * q).sum() + 1e-5) / ((p * q).sum() + alpha * (p * (1 - q)).sum() + beta * ((1 - p) * q).sum() + 1e-5)
        for p, q in organs(*given, batch=batch, background=background)
    ]


def tversky(
    *given: Tensor, alpha: float = 0.3, beta: float = 0.7, batch: bool = True, background: bool = False
) -> Tensor:
    return 1 - mean(tversky_indices(*given, alpha=alpha, beta=beta, batch=batch, background=background))


def focal_tversky(*given: Tensor, gamma: float = 4 / 3, batch: bool = True, background: bool = False) -> Tensor:
    indices = tversky_indices(*given, alpha=0.3, beta=0.7, batch=batch, background=background)
    return mean([(1 - index) ** (1 / gamma) for index in indices])


def authors_lovasz(errors: Tensor, truth: Tensor) -> Tensor:
    """As in the authors' program, `lovasz_grad` and all."""
    order = errors.detach().argsort(descending=True)
    sorted_truth = truth[order]
    union = truth.sum() + (1 - sorted_truth).cumsum(0)
    jaccard = 1 - (truth.sum() - sorted_truth.cumsum(0)) / union
    return (errors[order].relu() * jaccard.diff(prepend=jaccard.new_zeros(1))).sum()


def lovasz(x: Tensor, target: Tensor, mask: Tensor, *, batch: bool = True, background: bool = True) -> Tensor:
    if target.dim() < x.dim():
        found = organs(x, target, mask, batch=batch, background=background)
        losses = [authors_lovasz((q - p).abs(), q) for p, q in found if q.any()]
        return mean(losses) if losses else 0 * x.sum()
    samples = [slice(None)] if batch else [slice(b, b + 1) for b in range(len(x))]
    kept = [(x[s, r][mask[s, 0]], target[s, r][mask[s, 0]]) for s in samples for r in range(R)]
    return mean([authors_lovasz(1 - logits * (2 * q - 1), q) for logits, q in kept])


def to_the_other_kind(inside: Tensor, counted: Tensor, spacing: Sequence[float]) -> Tensor:
    """Distance of each voxel to the nearest counted one that is inside where it is outside, or the other way around."""
    places = torch.ones_like(inside).nonzero() * torch.tensor(spacing, dtype=torch.float64)
    apart = (places[:, None] - places).square().sum(-1).sqrt()
    kind, counts = inside.flatten(), counted.flatten()
    apart[(kind[:, None] == kind) | ~counts] = torch.inf
    nearest = apart.amin(1).view(inside.shape)
    return nearest.where(nearest.isfinite(), 0)


def maps(x: Tensor, target: Tensor, mask: Tensor, background: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    probs, truth = probabilities(x, target)
    first = 0 if background or target.dim() == x.dim() else 1
    for b, organ in itertools.product(range(len(x)), range(first, R)):
        yield probs[b, organ], truth[b, organ], mask[b, 0]


def boundary(
    x: Tensor, target: Tensor, mask: Tensor, *, background: bool = False, spacing_mm: Sequence[float] | None = None
) -> Tensor:
    spacing, terms = spacing_mm or [1.0] * (x.dim() - 2), []
    for p, q, counted in maps(x, target, mask, background):
        away = to_the_other_kind(q > 0, counted, spacing)
        beneath = away > 1.001 * min(spacing)  # but for rounding the outermost voxels are at 0
        level_set = away.where(q == 0, (min(spacing) - away).where(beneath, 0))
        terms.append((p * level_set)[counted])
    return torch.cat(terms).mean()


def hausdorff(
    x: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    alpha: float = 2,
    background: bool = False,
    spacing_mm: Sequence[float] | None = None,
) -> Tensor:
    spacing, terms = spacing_mm or [1.0] * (x.dim() - 2), []
    for p, q, counted in maps(x, target, mask, background):
        far = sum(to_the_other_kind(part > 0.5, counted, spacing) ** alpha for part in (p, q))
        terms.append(((p - q) ** 2 * far)[counted])
    return torch.cat(terms).mean()


def pooled(values: Tensor, counted: Tensor, *, least: bool) -> Tensor:
    """The least of a voxel and its face neighbors, or the greatest of all its neighbors, of those that count."""
    outside = torch.inf if least else -torch.inf
    padded = torch.nn.functional.pad(values.where(counted, outside), [1] * 2 * values.dim(), value=outside)
    steps = [s for s in itertools.product((0, 1, 2), repeat=values.dim()) if not least or s.count(1) >= len(s) - 1]
    places = [tuple(slice(i, i + n) for i, n in zip(step, values.shape, strict=True)) for step in steps]
    around = torch.stack([padded[place] for place in places])
    return (around.amin(0) if least else around.amax(0)).where(counted, 0)


def skeleton(values: Tensor, counted: Tensor, iterations: int) -> Tensor:
    found = torch.zeros_like(values)
    for _ in range(iterations + 1):
        eroded = pooled(values, counted, least=True)
        ridges = (values - pooled(eroded, counted, least=False)).relu()
        found, values = found + (1 - found) * ridges, eroded
    return found.where(counted, 0)


def cldice(
    x: Tensor, target: Tensor, mask: Tensor, *, iterations: int = 3, batch: bool = True, background: bool = False
) -> Tensor:
    sums = []  # for each sample and organ: of either skeleton, what is covered and all of it
    for p, q, counted in maps(x, target, mask, background):
        thin_p, thin_q = (skeleton(part, counted, iterations) for part in (p, q))
        covered = [(thin_p * q)[counted], thin_p[counted], (thin_q * p)[counted], thin_q[counted]]
        sums.append(torch.stack([part.sum() for part in covered]))
    table = torch.stack(sums).view(len(x), -1, 4)
    table = (table.sum(0) if batch else table.flatten(0, 1)) + 1
    precision, sensitivity = table[:, 0] / table[:, 1], table[:, 2] / table[:, 3]
    return 1 - (2 * precision * sensitivity / (precision + sensitivity)).mean()


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "top_k": top_k,
    "focal": focal,
    "dice": dice,
    "generalized_dice": generalized_dice,
    "tversky": tversky,
    "focal_tversky": focal_tversky,
    "lovasz": lovasz,
    "boundary": boundary,
    "hausdorff": hausdorff,
    "cldice": cldice,
}

EACH_AND_ALL = [
    {"batch": batch, "include_background": background} for batch in (True, False) for background in (True, False)
]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cross_entropy": [{}, {"class_weights": WEIGHTS, "label_smoothing": 0.1}],
    "binary_cross_entropy": [{}, {"class_weights": WEIGHTS, "label_smoothing": 0.1}],
    "top_k": [{}, {"share": 0.3}],
    "focal": [{}, {"gamma": 0.5, "alpha": 0.25}],
    "dice": [*EACH_AND_ALL, {"squared": True}, {"squared": True, "batch": False}],
    "generalized_dice": EACH_AND_ALL,
    "tversky": [*EACH_AND_ALL, {"alpha": 1.0, "beta": 0.2}],
    "focal_tversky": [*EACH_AND_ALL, {"gamma": 2.0}],
    "lovasz": EACH_AND_ALL,
    "boundary": [{}, {"include_background": True, "spacing_mm": (0.7, 2.0, 1.1)}],
    "hausdorff": [{}, {"include_background": True, "spacing_mm": (0.7, 2.0, 1.1)}, {"alpha": 1.0}],
    "cldice": [{"iterations": 2}, {"batch": False, "include_background": True, "iterations": 1}],
}
every_variant = pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, variants in VARIANTS.items() for options in variants]
)
both_kinds = pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])


def draw(*, regions: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, R, *SIZE, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, *SIZE, generator=generator) < 0.8
    if regions:
        return noise, torch.randint(0, 2, noise.shape, generator=generator).double(), mask
    return noise, torch.randint(0, R, (2, *SIZE), generator=generator), mask


MOMENTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "a first step": lambda noise, _: 0.01 * noise,
    "training": lambda noise, _: 2 * noise,
    "sure and often wrong": lambda noise, limit: limit * noise.sign() + 0.1 * noise,
}
TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "some of each": lambda target: target,
    "nothing there": torch.zeros_like,
    "one organ everywhere": torch.ones_like,
}


def value_and_slope(score: Callable[..., Tensor], logits: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = score(logits, *given)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def both(
    name: str, options: dict[str, Any], logits: Tensor, target: Tensor, mask: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Value and slope of the loss, and in float64 those of the formula."""
    found = value_and_slope(LOSSES[name](**options), logits, target, mask)
    options = {("background" if key == "include_background" else key): value for key, value in options.items()}

    def formula(x: Tensor, *given: Tensor) -> Tensor:
        return FORMULAS[name](x, *given, **options)

    return found, value_and_slope(formula, logits.double(), target, mask)


@every_variant
@both_kinds
def test_every_loss_is_its_formula_in_value_and_slope_however_sure_the_network(
    name: str, options: dict[str, Any], regions: bool
) -> None:
    noise, target, mask = draw(regions=regions)
    for moment, kind in itertools.product(MOMENTS.values(), TARGETS.values()):
        (value, slope), (expected, expected_slope) = both(name, options, moment(noise, 12.0), kind(target), mask)
        assert value.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
        tolerance = 1e-6 * expected_slope.abs().max().item() + 1e-16  # where the formula has 0, both round
        torch.testing.assert_close(slope, expected_slope, rtol=1e-6, atol=tolerance)


@every_variant
@both_kinds
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 30.0), (torch.float32, 12.0)])
def test_nothing_silences_a_slope_that_the_formula_has(
    name: str, options: dict[str, Any], regions: bool, dtype: torch.dtype, limit: float
) -> None:
    """Of a logit, or of the logits of a voxel's classes, of which the surest has a slope of 0 to any precision."""
    noise, target, mask = draw(regions=regions)
    limit /= (1 if regions else 2) * (2 if name == "cldice" else 1)  # classes differ by twice as much; ties erode alike
    rounded = 1e-15 if name == "cldice" else 0  # its formula subtracts what is equal where all is covered
    for moment, reference in itertools.product(MOMENTS.values(), (target, torch.zeros_like(target))):
        (_, slope), (_, expected) = both(name, options, moment(noise, limit).to(dtype), reference, mask)
        pulled, has_slope = slope != 0, expected.abs() > rounded
        if not regions:
            pulled, has_slope = pulled.any(1), has_slope.any(1)
        assert pulled[has_slope].all()


@every_variant
@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_slope_of_every_variant_are_finite(
    name: str, options: dict[str, Any], regions: bool, dtype: torch.dtype
) -> None:
    noise, target, mask = draw(regions=regions)
    one_voxel = torch.zeros_like(target)
    one_voxel[..., 2, 3, 1] = 1
    loss = LOSSES[name](**options)
    for scale, reference in itertools.product((0, 1, 1e4), (*(of(target) for of in TARGETS.values()), one_voxel)):
        value, slope = value_and_slope(loss, (scale * noise).to(dtype), reference, mask)
        assert value.isfinite() and slope.isfinite().all()


def test_every_loss_has_a_formula() -> None:
    assert list(FORMULAS) == list(VARIANTS) == list(LOSSES)


def test_a_region_sure_beyond_float32_and_wrong_is_left_to_cross_entropy() -> None:
    target = torch.zeros(1, 1, 2, 2)
    for limit, has_slope in ((16.0, True), (17.5, False)):
        slopes = [
            value_and_slope(LOSSES[name](), torch.full((1, 1, 2, 2), limit), target)[1]
            for name in ("dice", "tversky", "cross_entropy", "focal", "lovasz")
        ]
        assert [slope.all().item() for slope in slopes[:2]] == [has_slope] * 2
        assert all(slope.any() for slope in slopes[2:])
        probs = torch.tensor(limit, dtype=torch.float64).sigmoid()
        assert has_slope or probs * (1 - probs) < 5e-8
