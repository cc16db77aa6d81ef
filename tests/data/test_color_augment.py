"""CLAHE, edges, the negative and colors: against brute force in double precision, colorsys and hand computation."""

from __future__ import annotations

import colorsys
import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from medseg.data.augment import augmentation
from medseg.data.color_augment import (
    BINS,
    LUMA,
    RandClahed,
    RandColord,
    RandEmbossd,
    RandGrayd,
    RandHued,
    RandInvertd,
    RandSaturationd,
    RandSharpend,
    clahe,
    emboss,
    saturate,
    sharpen,
    shift_hue,
)
from medseg.data.intensity_augment import mean_and_std
from medseg.errors import WorkflowError
from medseg.labels import Labels

Array = npt.NDArray[np.float64]
LABELS = Labels(names={0: "background", 1: "nucleus"})
COLOR: list[type[RandColord]] = [RandHued, RandSaturationd, RandGrayd]


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def colors(*size: int) -> Tensor:
    return torch.rand((3, *size), generator=torch.Generator().manual_seed(0))


# --- local contrast


def brute_clahe(image: Array, clip_limit: float, tiles: list[int], bins: int) -> Array:
    """Pixel by pixel: its rank in each of the tiles around it, weighted by how near their centres are."""
    low, high = image.min(), image.max()
    level = np.minimum((image - low) / (high - low) * bins, bins - 1).astype(int)
    tile_of = [np.arange(n) * t // n for n, t in zip(image.shape, tiles, strict=True)]
    shares = {}
    for tile in np.ndindex(*tiles):
        inside = level[np.ix_(*[np.flatnonzero(of == t) for of, t in zip(tile_of, tile, strict=True)])]
        histogram = [float((inside == b).sum()) for b in range(bins)]
        limit = clip_limit * inside.size / bins
        excess = sum(max(0.0, h - limit) for h in histogram)
        limited = [min(h, limit) + excess / bins for h in histogram]
        shares[tile] = [sum(limited[: b + 1]) / inside.size for b in range(bins)]
    result = np.zeros(image.shape)
    for pixel in np.ndindex(image.shape):
        along = []
        for i, n, t in zip(pixel, image.shape, tiles, strict=True):
            place = min(max((i + 0.5) * t / n - 0.5, 0.0), t - 1.0)
            below = math.floor(place)
            along.append([(below, 1 - (place - below)), (min(below + 1, t - 1), place - below)])
        for corner in itertools.product(*along):
            weight = math.prod(w for _, w in corner)
            result[pixel] += weight * shares[tuple(number for number, _ in corner)][level[pixel]]
    return low + (high - low) * result


@pytest.mark.parametrize(
    ("size", "tiles", "counts"), [((17, 23), 3, [3, 3]), ((12, 9), 8, [3, 2]), ((9, 10, 8), 2, [2, 2, 2])]
)
@pytest.mark.parametrize("clip_limit", [1.0, 2.0, 50.0])
def test_clahe_equals_brute_force(size: tuple[int, ...], tiles: int, counts: list[int], clip_limit: float) -> None:
    image = noise(*size)
    expected = brute_clahe(image.numpy().astype(np.float64), clip_limit, counts, bins=16)
    np.testing.assert_allclose(clahe(image, clip_limit, tiles=tiles, bins=16).numpy(), expected, atol=1e-5)


def test_clahe_without_a_limit_on_one_tile_is_the_rank_of_each_value() -> None:
    image = torch.arange(256.0).pow(2).view(16, 16)[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    level = np.minimum((image.numpy() / 255**2 * BINS).astype(int), BINS - 1)
    rank = np.array([(level <= value).mean() for value in level.ravel()]).reshape(16, 16)
    np.testing.assert_allclose(clahe(image, BINS, tiles=1).numpy(), rank * 255**2, rtol=1e-5)


def test_clahe_shows_what_is_hidden_in_the_dark() -> None:
    image = torch.zeros(64, 64)
    image[:, 32:] = 100
    image[10:14, 10:14] = 1  # hardly to be seen beside 100
    contrast = clahe(image, 40.0)
    assert contrast[12, 12] - contrast[12, 9] > 8 * (image[12, 12] - image[12, 9])


# --- edges and the negative


def test_sharpening_equals_scipy() -> None:
    image = noise(14, 11)
    values = image.numpy().astype(np.float64)
    smooth = ndimage.gaussian_filter(values, 0.8, mode="nearest", radius=3)
    expected = (values + 0.7 * (values - smooth)).clip(values.min(), values.max())
    np.testing.assert_allclose(sharpen(image, 0.7, sigma=0.8).numpy(), expected, atol=1e-5)


def test_an_edge_is_steeper_when_sharpened() -> None:
    edge = torch.tensor([0.0, 0, 0, 1, 3, 4, 4, 4]).expand(8, 8)
    found = sharpen(edge, 1.0, sigma=1.0)
    assert found[4, 4] - found[4, 3] > 2.3 and found.min() == 0 and found.max() == 4


def test_embossing_adds_the_slope_by_hand() -> None:
    image = torch.tensor([[0.0, 1, 4], [2, 3, 6], [10, 11, 14]])
    # Along the columns the slopes are 1/2, 2, 3/2 in each row: the border repeats itself.
    np.testing.assert_allclose(emboss(image, np.array([0, 1.0]))[1], [2.5, 5.0, 7.5])
    # Along the rows 1, 5, 4 in each column; 14 + 4 would leave the range.
    np.testing.assert_allclose(emboss(image, np.array([1.0, 0]))[:, 2], [5, 11, 14])


def test_embossing_equals_numpys_gradient_within() -> None:
    image, slope = noise(9, 8, 7), np.array([0.3, -0.5, 0.2])
    values = image.numpy().astype(np.float64)
    expected = values + sum(s * g for s, g in zip(slope, np.gradient(values), strict=True))
    inner = (slice(1, -1),) * 3
    expected = expected.clip(values.min(), values.max())
    np.testing.assert_allclose(emboss(image, slope).numpy()[inner], expected[inner], atol=1e-5)


def test_a_flat_axis_takes_no_part_in_embossing() -> None:
    image = torch.arange(36.0).view(6, 6, 1)
    changed = {float(RandEmbossd(prob=1).set_random_state(seed).change(image)[2, 2, 0]) for seed in range(20)}
    assert len(changed) == 20 and all(abs(value - 14) <= 0.8 * math.hypot(6, 1) for value in changed)


def test_the_negative_keeps_mean_and_deviation() -> None:
    image = noise(1, 20, 20) * 3 + 5
    found = RandInvertd(prob=1)({"image": image})["image"]
    torch.testing.assert_close(found, 2 * image.mean() - image)
    assert mean_and_std(found) == pytest.approx(mean_and_std(image), rel=1e-5)


# --- colors


@pytest.mark.parametrize("degrees", [-180.0, -33.0, 0.0, 20.0, 120.0, 700.0])
def test_hue_equals_colorsys(degrees: float) -> None:
    image = colors(12, 9)
    image[:, 0] = image[:1, 0]  # gray
    image[1, 1] = image[0, 1]  # two channels equal
    image[2, 2] = image[1, 2]
    found = shift_hue(image, degrees)
    for i, j in np.ndindex(12, 9):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[:, i, j].tolist())
        expected = colorsys.hsv_to_rgb((hue + degrees / 360) % 1, saturation, value)
        np.testing.assert_allclose(found[:, i, j], expected, atol=2e-6)


def test_hue_is_the_same_on_any_scale_common_to_the_channels() -> None:
    image = colors(20, 20)
    torch.testing.assert_close(shift_hue(image * 255 - 40, 25.0), shift_hue(image, 25.0) * 255 - 40, rtol=0, atol=1e-3)


def test_red_turned_by_a_third_is_green() -> None:
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    torch.testing.assert_close(shift_hue(red, 120.0).flatten(), torch.tensor([0.0, 1, 0]))


def test_saturation_equals_the_formula_and_stays_in_range() -> None:
    image = colors(10, 10)
    values = image.numpy().astype(np.float64)
    gray = sum(share * channel for share, channel in zip(LUMA, values, strict=True))
    for factor in (0.0, 0.5, 1.0, 1.8):
        expected = (gray + factor * (values - gray)).clip(values.min(), values.max())
        np.testing.assert_allclose(saturate(image, factor).numpy(), expected, atol=1e-6)


def test_gray_pictures_have_no_hue_and_no_saturation_to_change() -> None:
    image = noise(1, 8, 8).expand(3, 8, 8)
    for transform in (RandHued(prob=1), RandSaturationd(prob=1), RandGrayd(prob=1)):
        torch.testing.assert_close(transform({"image": image})["image"], image)


@pytest.mark.parametrize("kind", COLOR)
def test_colors_change_as_often_as_asked_and_the_label_never(kind: type[RandColord]) -> None:
    transform = kind(prob=0.3).set_random_state(0)
    sample = {"image": colors(3, 3), "label": torch.ones(1, 3, 3, dtype=torch.uint8)}
    before = sample["image"].clone()
    results = [transform(sample) for _ in range(1500)]
    assert np.mean([not torch.equal(r["image"], before) for r in results]) == pytest.approx(0.3, abs=0.04)
    assert all(r["label"] is sample["label"] for r in results) and torch.equal(sample["image"], before)


@pytest.mark.parametrize("name", ["hue", "saturation", "gray"])
def test_colors_of_anything_but_rgb_are_refused(name: str) -> None:
    with pytest.raises(WorkflowError, match="1 channels have no color"):
        augmentation([{"name": name}], patch_size=(8, 8), labels=LABELS)
    augmentation([{"name": name}], patch_size=(8, 8), labels=LABELS, num_channels=3)


# --- draws


@pytest.mark.parametrize("kind", [RandClahed, RandSharpend, RandEmbossd, RandInvertd, *COLOR])
def test_the_state_alone_decides_the_draw(kind: Any) -> None:
    sample = {"image": colors(24, 20)}
    first, same, other = (kind(prob=1).set_random_state(seed)(sample)["image"] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    if kind not in (RandInvertd, RandGrayd):  # which have nothing to draw but whether
        assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("clahe", {"clip_limit": [0.5, 2]}),
        ("clahe", {"tiles": 0}),
        ("sharpen", {"amount": [1, 0]}),
        ("emboss", {"strength": 0.5}),
        ("hue", {"shift_deg": 200}),
        ("saturation", {"factor": [0, 1]}),
        ("gray", {"num_channels": 3}),
    ],
)
def test_arguments_out_of_range_are_refused(name: str, args: dict[str, Any]) -> None:
    with pytest.raises(WorkflowError, match="E-ARGUMENT"):
        augmentation([{"name": name, "args": args}], patch_size=(8, 8), labels=LABELS, num_channels=3)
