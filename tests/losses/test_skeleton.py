from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses.cldice import SoftclDiceLoss, soft_skel
from scipy.ndimage import generate_binary_structure, grey_dilation, grey_erosion
from torch import Tensor

from medseg.losses import ClDice
from medseg.losses.skeleton import soft_skeleton

sizes = pytest.mark.parametrize("size", [(9, 8), (6, 7, 5)], ids=["2d", "3d"])


def draw(size: tuple[int, ...], *, regions: bool, outputs: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, outputs, *size, generator=generator, dtype=torch.float64)
    if regions:
        return logits, (torch.rand(2, outputs, *size, generator=generator) < 0.7).float()
    return logits, torch.randint(0, outputs, (2, *size), generator=generator)


def scipy_skeleton(image: np.ndarray, iterations: int) -> np.ndarray:
    """The algorithm of the paper on gray values, with scipy's morphology."""
    cross, block = (generate_binary_structure(image.ndim, n) for n in (1, image.ndim))

    def opened(x: np.ndarray) -> np.ndarray:
        eroded = grey_erosion(x, footprint=cross, mode="constant", cval=np.inf)
        return grey_dilation(eroded, footprint=block, mode="constant", cval=-np.inf)

    skeleton = np.maximum(image - opened(image), 0)
    for _ in range(iterations):
        image = grey_erosion(image, footprint=cross, mode="constant", cval=np.inf)
        skeleton = skeleton + (1 - skeleton) * np.maximum(image - opened(image), 0)
    return skeleton


@sizes
@pytest.mark.parametrize("iterations", [0, 3])
def test_the_soft_skeleton_is_the_paper_s_and_monai_s(size: tuple[int, ...], iterations: int) -> None:
    probs = draw(size, regions=True)[0].sigmoid()
    found = soft_skeleton(probs, iterations=iterations)
    expected = np.stack([[scipy_skeleton(organ, iterations) for organ in sample] for sample in probs.numpy()])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, soft_skel(probs, iterations))


@sizes
def test_the_gradient_of_the_skeleton_is_monai_s(size: tuple[int, ...]) -> None:
    a = draw(size, regions=True)[0].sigmoid().requires_grad_()
    b = a.detach().clone().requires_grad_()
    direction = torch.randn(a.shape, generator=torch.Generator().manual_seed(2), dtype=a.dtype)
    (soft_skeleton(a, iterations=2) * direction).sum().backward()
    (soft_skel(b, 2) * direction).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_the_skeleton_of_a_bar_is_its_centerline() -> None:
    bar = torch.zeros(1, 1, 9, 15)
    bar[..., 2:7, 2:13] = 1
    skeleton = soft_skeleton(bar, iterations=3)[0, 0]
    assert torch.equal(skeleton[4, 4:11], torch.ones(7))
    assert not skeleton[[2, 3, 5, 6], 5:10].any()


def test_masked_voxels_neither_erode_nor_dilate() -> None:
    probs = draw((9, 8), regions=True)[0].sigmoid()
    mask = torch.ones(2, 1, 9, 8, dtype=torch.bool)
    mask[:, :, 6:] = False
    found = soft_skeleton(probs, mask, iterations=2)
    torch.testing.assert_close(found[:, :, :6], soft_skeleton(probs[:, :, :6], iterations=2))
    assert not found[:, :, 6:].any()


@sizes
@pytest.mark.parametrize("iterations", [1, 3])
def test_cldice_of_one_organ_is_monai_s(size: tuple[int, ...], iterations: int) -> None:
    for regions in (False, True):
        logits, target = draw(size, regions=regions, outputs=1 if regions else 2)
        how = {"sigmoid": True} if regions else {"softmax": True, "to_onehot_y": True, "include_background": False}
        theirs = SoftclDiceLoss(iter_=iterations, smooth_nr=1.0, smooth_dr=1.0, smooth=1e-12, **how)
        expected = theirs(logits, target.double() if regions else target[:, None])
        found = ClDice(iterations=iterations, batch=False)(logits, target)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_cldice_weighs_each_organ_the_same(regions: bool, batch: bool) -> None:
    logits, target = draw((6, 7, 5), regions=regions)
    probs = (logits.sigmoid() if regions else logits.softmax(1)).numpy()
    hot = target.numpy() if regions else np.moveaxis(np.eye(3)[target.numpy()], -1, 1)
    values = []
    for organ in range(0 if regions else 1, 3):
        samples = [
            (p, q, scipy_skeleton(p, 3), scipy_skeleton(q, 3))
            for p, q in zip(probs[:, organ], hot[:, organ], strict=True)
        ]
        for group in [samples] if batch else [[sample] for sample in samples]:
            precision = (sum((s * q).sum() for _, q, s, _ in group) + 1) / (sum(s.sum() for *_, s, _ in group) + 1)
            recall = (sum((s * p).sum() for p, *_, s in group) + 1) / (sum(s.sum() for *_, s in group) + 1)
            values.append(2 * precision * recall / (precision + recall))
    assert ClDice(batch=batch)(logits, target).item() == pytest.approx(1 - np.mean(values), abs=1e-9)


def test_a_broken_vessel_costs_more_than_a_thin_one() -> None:
    vessel = torch.zeros(1, 1, 24, 11)
    vessel[..., 3:8] = 1
    thin, broken = vessel.clone(), vessel.clone()
    thin[..., [3, 7]] = 0
    broken[..., 10:13, :] = 0
    loss = ClDice()
    assert loss(40 * broken - 20, vessel) > loss(40 * thin - 20, vessel) + 0.03


def test_arguments_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="smooth is 0"):
        ClDice(smooth=0)
    with pytest.raises(ValueError, match="iterations is -1"):
        ClDice(iterations=-1)
