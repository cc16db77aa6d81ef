from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.losses import BoundaryLoss, HausdorffDTLoss
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from medseg.losses import Boundary, Compound, DeepSupervision, Hausdorff
from medseg.losses.boundary import squared_distances
from medseg.losses.compound import at_size

kinds = pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])
sizes = pytest.mark.parametrize("size", [(7, 6), (4, 5, 6)], ids=["2d", "3d"])


def draw(size: tuple[int, ...], *, regions: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    if regions:
        target = (torch.rand(2, 3, *size, generator=generator) < 0.8).float()
        target[0, 0], target[1, 1] = 0, 1
        return logits, target
    target = torch.randint(0, 2, (2, *size), generator=generator)
    target[1, 1, 1:4] = 2
    return logits, target


def brute(inside: np.ndarray, counted: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Squared distance of each voxel to the nearest counted one of the other kind."""
    result = np.zeros(inside.shape)
    voxels = list(itertools.product(*(range(n) for n in inside.shape)))
    for at in voxels:
        others = [o for o in voxels if counted[o] and inside[o] != inside[at]]
        away = [sum(((a - b) * s) ** 2 for a, b, s in zip(at, o, spacing, strict=True)) for o in others]
        result[at] = min(away, default=0)
    return result


@pytest.mark.parametrize("spacing", [None, (0.7, 2.0, 1.1)])
@pytest.mark.parametrize("masked", [False, True])
def test_distances_are_those_to_the_nearest_voxel_of_the_other_kind(
    spacing: tuple[float, ...] | None, masked: bool
) -> None:
    random = np.random.default_rng(0)
    inside = random.random((2, 2, 4, 5, 3)) < 0.8
    inside[0, 0], inside[1, 1] = True, False
    counted = random.random((2, 1, 4, 5, 3)) < (0.5 if masked else 2)
    found = squared_distances(torch.tensor(inside), torch.tensor(counted) if masked else None, spacing)
    for b, organ in np.ndindex(2, 2):
        expected = brute(inside[b, organ], counted[b, 0], spacing or (1, 1, 1))
        np.testing.assert_allclose(found[b, organ], expected, rtol=1e-6)


@kinds
@sizes
def test_boundary_equals_monai_s_in_value_and_gradient(regions: bool, size: tuple[int, ...]) -> None:
    logits, target = draw(size, regions=regions)
    how = {"sigmoid": True} if regions else {"softmax": True, "to_onehot_y": True}
    theirs = BoundaryLoss(include_background=regions, **how)
    assert_same(logits, Boundary(), theirs, target, target.double() if regions else target[:, None])


@kinds
@sizes
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_hausdorff_equals_monai_s_in_value_and_gradient(regions: bool, size: tuple[int, ...], alpha: float) -> None:
    logits, target = draw(size, regions=regions)
    how = {"sigmoid": True} if regions else {"softmax": True, "to_onehot_y": True}
    theirs = HausdorffDTLoss(alpha=alpha, include_background=regions, **how)
    assert_same(logits, Hausdorff(alpha=alpha), theirs, target, target.double() if regions else target[:, None])


def assert_same(
    logits: Tensor, ours: torch.nn.Module, theirs: torch.nn.Module, target: Tensor, their_target: Tensor
) -> None:
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value, expected = ours(a, target), theirs(b, their_target)
    torch.testing.assert_close(value, expected.to(value), rtol=0, atol=1e-6)
    value.backward()
    expected.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


@kinds
@pytest.mark.parametrize("spacing", [None, (0.5, 2.0)])
def test_boundary_is_the_authors_formula(regions: bool, spacing: tuple[float, ...] | None) -> None:
    logits, target = draw((7, 6), regions=regions)
    mask = torch.ones(2, 1, 7, 6, dtype=torch.bool)
    mask[:, :, 5:] = False
    probs = (logits.sigmoid() if regions else logits.softmax(1)).numpy()
    hot = target.numpy() if regions else np.moveaxis(np.eye(3)[target.numpy()], -1, 1)
    products = []
    for b, organ in itertools.product(range(2), range(0 if regions else 1, 3)):
        inside = hot[b, organ, :5] > 0
        phi = np.zeros((5, 6))
        if inside.any() and not inside.all():
            out, within = (distance_transform_edt(m, sampling=spacing) for m in (~inside, inside))
            phi = out * ~inside - (within - (min(spacing) if spacing else 1)) * inside
        products.append(probs[b, organ, :5] * phi)
    found = Boundary(spacing_mm=spacing)(logits, target, mask)
    assert found.item() == pytest.approx(np.mean(products), abs=1e-6)


@kinds
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_hausdorff_is_the_paper_s_formula(regions: bool, alpha: float) -> None:
    logits, target = draw((4, 3, 3), regions=regions)
    mask = torch.rand(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.8
    probs = (logits.sigmoid() if regions else logits.softmax(1)).numpy()
    hot = target.numpy() if regions else np.moveaxis(np.eye(3)[target.numpy()], -1, 1)
    values = []
    for b, organ in itertools.product(range(2), range(0 if regions else 1, 3)):
        counted = mask[b, 0].numpy()
        p, q = probs[b, organ], hot[b, organ]
        far = sum(brute(m > 0.5, counted, (1, 1, 1)) ** (alpha / 2) for m in (p, q))
        values.append(((p - q) ** 2 * far)[counted])
    expected = np.concatenate(values).sum() / (mask.sum().item() * len(values) / 2)
    assert Hausdorff(alpha=alpha)(logits, target, mask).item() == pytest.approx(expected, abs=1e-6)


def test_an_error_costs_the_more_the_farther_it_is() -> None:
    target = torch.zeros(1, 1, 9, 9)
    target[..., 1:3, 1:3] = 1
    for loss in (Boundary(), Hausdorff()):
        costs = []
        for place in (3, 5, 8):
            logits = 40 * target - 20
            logits[..., place, place] = 20
            costs.append(loss(logits, target).item())
        assert costs == sorted(costs) and len(set(costs)) == 3


def test_a_spacing_scales_the_distances() -> None:
    logits, target = draw((4, 5, 6), regions=False)
    assert Boundary(spacing_mm=(2, 2, 2))(logits, target).item() == pytest.approx(2 * Boundary()(logits, target).item())
    doubled, plain = Hausdorff(spacing_mm=(2, 2, 2))(logits, target), Hausdorff()(logits, target)
    assert doubled.item() == pytest.approx(4 * plain.item())


@pytest.mark.parametrize("loss", [Boundary(spacing_mm=(1, 1, 1)), Hausdorff(alpha=1, spacing_mm=(1, 1, 1))])
def test_under_deep_supervision_the_same_cube_has_about_the_same_mm_on_every_grid(
    loss: Boundary | Hausdorff,
) -> None:
    cube = torch.zeros(1, 1, 32, 32, 32)
    cube[..., 8:24, 8:24, 8:24] = 1
    outputs = [torch.zeros(1, 1, n, n, n) for n in (32, 16, 8)]
    found = []
    for times, logits in zip((1, 2, 4), outputs, strict=True):
        kind = type(loss)(**({"alpha": 1} if isinstance(loss, Hausdorff) else {}), spacing_mm=(times,) * 3)
        found.append(kind(logits, at_size(cube, logits.shape[2:])).item())
    assert found == pytest.approx([found[0]] * 3, rel=0.35)  # centers of coarser voxels lie farther from the border
    together = DeepSupervision(Compound([loss], [2.0]), (0.5, 0.25))(outputs, cube)
    assert together.item() == pytest.approx(2 * np.average(found, weights=(1, 0.5, 0.25)))
    assert DeepSupervision(loss, (0.5, 0.25))(outputs, cube).item() == pytest.approx(together.item() / 2)


def test_arguments_without_meaning_are_refused() -> None:
    logits, target = draw((4, 5, 6), regions=False)
    with pytest.raises(ValueError, match="has 2 entries, the patches 3 axes"):
        Boundary(spacing_mm=(1, 1))(logits, target)
    with pytest.raises(ValueError, match="must be positive"):
        Hausdorff(spacing_mm=(1, 0, 1))
    with pytest.raises(ValueError, match="alpha is 0"):
        Hausdorff(alpha=0)
