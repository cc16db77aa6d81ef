from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.losses import FocalLoss
from torch import Tensor

from medseg.errors import WorkflowError
from medseg.losses import BinaryCrossEntropy, CrossEntropy, Focal, TopK

WEIGHTS = (0.2, 1.0, 3.0)


def draw(size: tuple[int, ...], *, regions: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 3, *size, generator=generator)
    target = torch.randint(0, 3, (2, *size), generator=generator)
    mask = torch.rand(2, 1, *size, generator=generator) < 0.6
    return logits, torch.randint(0, 2, logits.shape, generator=generator).float() if regions else target, mask


@pytest.mark.parametrize("size", [(6, 5), (4, 3, 5)])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classes_equal_torch_s_mean_over_the_voxels_that_count(
    size: tuple[int, ...], weights: tuple[float, ...] | None, smoothing: float
) -> None:
    logits, target, mask = draw(size, regions=False)
    logits = logits.double()
    loss = CrossEntropy(class_weights=weights, label_smoothing=smoothing)
    options = {"weight": logits.new_tensor(weights) if weights else None, "label_smoothing": smoothing}
    torch.testing.assert_close(loss(logits, target), F.cross_entropy(logits, target, **options))
    kept = mask[:, 0]
    expected = F.cross_entropy(logits.movedim(1, -1)[kept], target[kept], **options)
    torch.testing.assert_close(loss(logits, target, mask), expected)


@pytest.mark.parametrize("size", [(6, 5), (4, 3, 5)])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_regions_equal_brute_force_in_float64(
    size: tuple[int, ...], weights: tuple[float, ...] | None, smoothing: float
) -> None:
    logits, target, mask = draw(size, regions=True)
    probs = logits.double().sigmoid()
    aim = target.double() * (1 - smoothing) + smoothing / 2
    voxels = -(aim * probs.log() + (1 - aim) * (1 - probs).log()).movedim(1, -1)[mask[:, 0]]  # (voxels, R)
    share = torch.tensor(weights or (1.0, 1.0, 1.0), dtype=torch.float64)
    expected = (voxels.mean(0) * share).sum() / share.sum()
    loss = CrossEntropy(class_weights=weights, label_smoothing=smoothing)(logits.double(), target, mask)
    torch.testing.assert_close(loss, expected)


def test_voxels_whose_class_weighs_nothing_cost_nothing() -> None:
    logits, target, _ = draw((4, 4), regions=False)
    assert CrossEntropy(class_weights=(0, 1, 1))(logits, torch.zeros_like(target)) == 0


@pytest.mark.parametrize("size", [(6, 5), (4, 3, 5)])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_judges_each_class_against_the_rest(
    size: tuple[int, ...], weights: tuple[float, ...] | None, smoothing: float
) -> None:
    logits, target, mask = draw(size, regions=False)
    logits, hot = logits.double(), F.one_hot(target, 3).movedim(-1, 1).double()
    options = {"class_weights": weights, "label_smoothing": smoothing}
    loss = BinaryCrossEntropy(**options)
    torch.testing.assert_close(loss(logits, target, mask), CrossEntropy(**options)(logits, hot, mask))
    if not (weights or smoothing):
        torch.testing.assert_close(loss(logits, target), F.binary_cross_entropy_with_logits(logits, hot))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0, 1e-9])
def test_top_k_is_the_mean_of_the_hardest(regions: bool, share: float) -> None:
    logits, target, mask = draw((4, 3, 5), regions=regions)
    logits = logits.double()
    if regions:
        losses = F.binary_cross_entropy(logits.sigmoid(), target.double(), reduction="none")[
            mask.expand(-1, 3, -1, -1, -1)
        ]
    else:
        losses = -logits.softmax(1).gather(1, target[:, None]).log()[mask]
    hardest = losses.sort(descending=True).values[: max(1, round(share * len(losses)))]
    torch.testing.assert_close(TopK(share=share)(logits, target, mask), hardest.mean(), rtol=0, atol=1e-9)


def test_top_k_of_all_is_cross_entropy() -> None:
    logits, target, mask = draw((6, 5), regions=False)
    torch.testing.assert_close(TopK(share=1)(logits, target, mask), CrossEntropy()(logits, target, mask))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_is_the_paper_s_formula_and_monai_s(regions: bool, gamma: float, alpha: float | None) -> None:
    logits, target, mask = draw((4, 3, 5), regions=regions)
    logits = logits.double().requires_grad_()
    probs = logits.sigmoid() if regions else logits.softmax(1)
    p = probs.where(target > 0, 1 - probs) if regions else probs.gather(1, target[:, None])
    organ = target > 0 if regions else target[:, None] > 0
    factor = 1 if alpha is None else torch.where(organ, alpha, 1 - alpha)
    losses = -factor * (1 - p) ** gamma * p.log()
    loss = Focal(gamma=gamma, alpha=alpha)
    kept = mask.expand_as(losses)
    torch.testing.assert_close(loss(logits, target, mask), losses[kept].mean(), rtol=0, atol=1e-9)
    hot = target if regions else F.one_hot(target, 3).movedim(-1, 1)
    theirs = FocalLoss(gamma=gamma, alpha=alpha, use_softmax=not regions)(logits, hot.double())
    theirs = theirs if regions else 3 * theirs  # their mean is over the classes too
    ours = loss(logits, target)
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("regions", [False, True])
def test_focal_without_focus_is_cross_entropy_weighted_or_not(regions: bool) -> None:
    logits, target, mask = draw((6, 5), regions=regions)
    for weights in (None, WEIGHTS):
        expected = CrossEntropy(class_weights=weights)(logits, target, mask)
        torch.testing.assert_close(Focal(gamma=0, class_weights=weights)(logits, target, mask), expected)


@pytest.mark.parametrize("regions", [False, True])
def test_class_weights_that_do_not_fit_the_network_are_refused(regions: bool) -> None:
    logits, target, _ = draw((4, 4), regions=regions)
    for kind in (CrossEntropy, BinaryCrossEntropy, Focal):
        with pytest.raises(WorkflowError, match="has 2 entries but the network has 3 outputs"):
            kind(class_weights=(1, 2))(logits, target)


def test_arguments_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        CrossEntropy(class_weights=(1, -1))
    with pytest.raises(ValueError, match="negative"):
        CrossEntropy(class_weights=(0, 0))
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        CrossEntropy(label_smoothing=1)
    with pytest.raises(ValueError, match="in a workflow 'balanced'"):
        CrossEntropy(class_weights="balance")
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        TopK(share=0)
    with pytest.raises(ValueError, match="gamma is -1"):
        Focal(gamma=-1)
    with pytest.raises(ValueError, match="alpha is 2"):
        Focal(alpha=2)
