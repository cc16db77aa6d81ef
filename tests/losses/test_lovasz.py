from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from medseg.losses import Lovasz
from medseg.losses.lovasz import lovasz_extension


def jaccard_loss(wrong: np.ndarray, inside: np.ndarray) -> float:
    """One minus the Jaccard index of a prediction that is wrong in some voxels."""
    union = (inside | wrong).sum()
    return 1 - (inside & ~wrong).sum() / union if union else 0.0


def choquet(errors: np.ndarray, inside: np.ndarray) -> float:
    """The extension by its definition: the Jaccard loss of all voxels beyond a threshold, integrated over it."""
    thresholds = np.unique([0.0, *errors])
    steps = itertools.pairwise(thresholds)
    return sum((high - low) * jaccard_loss(errors > low, inside) for low, high in steps)


def authors(errors: np.ndarray, inside: np.ndarray) -> float:
    """As the authors compute it: sorted errors times differences of the Jaccard loss."""
    order = np.argsort(-errors)
    truth = inside[order].astype(float)
    jaccard = 1 - (truth.sum() - truth.cumsum()) / (truth.sum() + (1 - truth).cumsum())
    return float(errors[order] @ np.diff(jaccard, prepend=0))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_extension_is_the_integral_over_thresholds_and_the_authors_sum(share: float) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        errors, inside = random.random(12), random.random(12) < share
        errors[:2] = 0, 0.5
        found = lovasz_extension(torch.tensor(errors), torch.tensor(inside)).item()
        assert found == pytest.approx(choquet(errors, inside), abs=1e-12)
        assert found == pytest.approx(authors(errors, inside), abs=1e-12)


def test_the_extension_of_wrong_and_right_is_the_jaccard_loss() -> None:
    for inside in itertools.product([False, True], repeat=4):
        for wrong in itertools.product([False, True], repeat=4):
            found = lovasz_extension(torch.tensor(wrong).double(), torch.tensor(inside))
            assert found.item() == pytest.approx(jaccard_loss(np.array(wrong), np.array(inside)), abs=1e-12)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_lovasz_softmax_averages_the_present_classes(batch: bool, background: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 4, 4, 5, 3, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 3, (2, 4, 5, 3), generator=generator)  # class 3 is absent, in one sample class 2 too
    target[0][target[0] == 2] = 1
    mask = torch.rand(2, 1, 4, 5, 3, generator=generator) < 0.7
    values = []
    for samples in [[0, 1]] if batch else [[0], [1]]:
        kept = mask[samples, 0]
        probs = logits[samples].softmax(1).movedim(1, -1)[kept].numpy()
        truth = target[samples][kept].numpy()
        values += [
            authors(np.abs(probs[:, c] - (truth == c)), truth == c)
            for c in range(0 if background else 1, 4)
            if (truth == c).any()
        ]
    found = Lovasz(batch=batch, include_background=background)(logits, target, mask)
    assert found.item() == pytest.approx(np.mean(values), abs=1e-9)


@pytest.mark.parametrize("batch", [False, True])
def test_the_lovasz_hinge_averages_all_regions(batch: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 2, (2, 3, 6, 5), generator=generator).float()
    target[:, 2] = 0
    mask = torch.rand(2, 1, 6, 5, generator=generator) < 0.7
    values = []
    for samples in [[0, 1]] if batch else [[0], [1]]:
        for r in range(3):
            kept = mask[samples, 0]
            truth, x = target[samples, r][kept].numpy() > 0, logits[samples, r][kept].numpy()
            order = np.argsort(-(1 - x * (2 * truth - 1)))  # theirs: sorted first, cut at 0 later
            errors = (1 - x * (2 * truth - 1))[order]
            jaccard = 1 - (truth.sum() - truth[order].cumsum()) / (truth.sum() + (~truth[order]).cumsum())
            values.append(np.maximum(errors, 0) @ np.diff(jaccard, prepend=0))
    assert Lovasz(batch=batch)(logits, target, mask).item() == pytest.approx(np.mean(values), abs=1e-9)


def test_in_float32_a_million_voxels_are_still_precise() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(300_000, generator=generator)
    inside = torch.rand(300_000, generator=generator) < 0.01
    found = lovasz_extension(errors, inside).item()
    assert found == pytest.approx(authors(errors.double().numpy(), inside.numpy()), rel=1e-5)
