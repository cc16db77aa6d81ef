from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.errors import WorkflowError
from medseg.losses import CrossEntropy

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
    loss = CrossEntropy(class_weights=weights, label_smoothing=smoothing)
    options = {"weight": torch.tensor(weights) if weights else None, "label_smoothing": smoothing}
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
    loss = CrossEntropy(class_weights=weights, label_smoothing=smoothing)(logits, target, mask)
    torch.testing.assert_close(loss.double(), expected)


def test_voxels_whose_class_weighs_nothing_cost_nothing() -> None:
    logits, target, _ = draw((4, 4), regions=False)
    assert CrossEntropy(class_weights=(0, 1, 1))(logits, torch.zeros_like(target)) == 0


@pytest.mark.parametrize("regions", [False, True])
def test_class_weights_that_do_not_fit_the_network_are_refused(regions: bool) -> None:
    logits, target, _ = draw((4, 4), regions=regions)
    with pytest.raises(WorkflowError, match="has 2 entries but the network has 3 outputs"):
        CrossEntropy(class_weights=(1, 2))(logits, target)


def test_arguments_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        CrossEntropy(class_weights=(1, -1))
    with pytest.raises(ValueError, match="negative"):
        CrossEntropy(class_weights=(0, 0))
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        CrossEntropy(label_smoothing=1)
