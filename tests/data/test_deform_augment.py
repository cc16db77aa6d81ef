"""Deformations and turns: resampling against scipy in double precision, fields against brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage
from scipy.interpolate import BSpline
from torch import Tensor

from medseg.data.augment import AUGMENTATIONS, augmentation
from medseg.data.deform_augment import (
    Deformationsd,
    RandDeformd,
    RandElasticd,
    RandGridDistortiond,
    RandOpticalDistortiond,
    RandPiecewiseAffined,
    RandShiftScaleRotated,
    deform,
)
from medseg.data.turn_augment import RandQuarterTurnd, RandTransposed
from medseg.errors import DataError, WorkflowError
from medseg.labels import Labels

Array = npt.NDArray[np.float64]
LABELS = Labels(names={0: "background", 1: "nucleus", 2: "other"})
PAIRED = Labels(names={0: "background", 1: "left", 2: "right"}, pairs=((1, 2),))
DEFORMATIONS: dict[str, Any] = {n: part for n, part in AUGMENTATIONS.items() if issubclass(part, RandDeformd)}
SIZES = [(40, 36), (20, 24, 18)]


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def label_of(*size: int) -> Tensor:
    return torch.randint(0, 3, (1, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def field_of(transform: RandDeformd, seed: int = 0) -> Array:
    field = transform.set_random_state(seed).randomize()
    assert field is not None
    return field.numpy().astype(np.float64)


def strongest(name: str, size: tuple[int, ...]) -> RandDeformd:
    """As far as its arguments allow."""
    args: dict[str, Any] = {
        "shift_scale_rotate": {"rotation_deg": 180, "scale": (0.5, 2)},
        "elastic": {"distance": 10, "magnitude": (4, 4)},
        "grid_distortion": {"limit": 0.9},
        "optical_distortion": {"distortion": (-0.33, 0.33)},
        "piecewise_affine": {"magnitude": (1 / (2 * len(size)), 1 / (2 * len(size)))},
    }[name]
    transform: RandDeformd = DEFORMATIONS[name](patch_size=size, prob=1, **args)
    return transform


# --- one resampling


@pytest.mark.parametrize("name", DEFORMATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_resampling_equals_scipy_for_the_same_field(name: str, size: tuple[int, ...]) -> None:
    transform = strongest(name, size)
    image, label = noise(2, *size), label_of(*size)
    for seed in range(3):
        place = np.indices(size) + field_of(transform, seed)
        result = transform.set_random_state(seed)({"image": image, "label": label})
        for order, source, found in ((1, image[1], result["image"][1]), (0, label[0], result["label"][0])):
            values = source.numpy().astype(np.float64)
            expected = ndimage.map_coordinates(values, place, order=order, mode="nearest")
            differs = np.abs(found.numpy() - expected) > 2e-4
            assert differs.mean() <= (0.0 if order else 1e-3)  # nearest: float32 may break a tie the other way
        assert result["image"].dtype == torch.float32 and result["label"].dtype == torch.uint8
        assert result["image"].is_contiguous() and result["label"].is_contiguous()


@pytest.mark.parametrize("name", DEFORMATIONS)
def test_image_and_label_stay_aligned(name: str) -> None:
    size = (48, 48)
    away = torch.stack(torch.meshgrid(*[torch.arange(48.0)] * 2, indexing="ij")) - torch.tensor([20.0, 27]).view(
        2, 1, 1
    )
    distance = away.norm(dim=0, keepdim=True)
    sample = {"image": 12 - distance, "label": (distance < 12).to(torch.int32)}
    for seed in range(5):
        result = strongest(name, size).set_random_state(seed)(sample)
        disc, label = result["image"] > 0, result["label"] == 1
        assert 2 * (disc & label).sum() / (disc.sum() + label.sum()) > 0.95


def test_high_label_values_survive() -> None:
    label = torch.tensor([0, 40_000, 65_535], dtype=torch.int32).repeat(12).view(1, 6, 6)
    found = deform(label, torch.zeros(2, 6, 6), axes=(0, 1), is_label=True)
    assert torch.equal(found, label) and found.dtype == torch.int32


def test_beyond_the_border_the_border_repeats() -> None:
    image = torch.arange(6.0).expand(1, 6, 6)
    field = torch.stack([torch.zeros(6, 6), torch.full((6, 6), 4.0)])
    torch.testing.assert_close(deform(image, field, axes=(0, 1), is_label=False)[0, 0], torch.tensor([4.0] + [5.0] * 5))


def test_a_patch_of_another_size_is_refused() -> None:
    with pytest.raises(DataError, match="E-PATCH"):
        strongest("elastic", (40, 36))({"image": noise(1, 36, 40), "label": label_of(36, 40)})


@pytest.mark.parametrize(
    ("size", "spacing_mm", "thin"),
    [((24, 20, 1), None, 2), ((1, 24, 20), None, 0), ((24, 20, 12), (1.0, 1.0, 5.0), 2), ((24, 6, 24), None, 1)],
)
@pytest.mark.parametrize("name", DEFORMATIONS)
def test_slices_are_deformed_in_their_plane_and_alike(name: str, size: Any, spacing_mm: Any, thin: int) -> None:
    transform = DEFORMATIONS[name](patch_size=size, spacing_mm=spacing_mm, prob=1).set_random_state(3)
    plane = [n for axis, n in enumerate(size) if axis != thin]
    image = noise(1, *plane).unsqueeze(1 + thin).expand(1, *size)
    label = label_of(*plane).unsqueeze(1 + thin).expand(1, *size)
    result = transform({"image": image, "label": label})
    assert result["image"].shape == (1, *size)
    assert not torch.equal(result["image"], image)
    for array in result.values():
        slices = array.movedim(1 + thin, 0)
        assert all(torch.equal(slices[0], other) for other in slices)


def test_a_rod_is_left_alone() -> None:
    for kind in DEFORMATIONS.values():
        assert kind(patch_size=(40, 2, 2), prob=1).randomize() is None


# --- the fields


@pytest.mark.parametrize("name", ["elastic", "grid_distortion", "optical_distortion", "piecewise_affine"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_folds_at_the_largest_magnitude_allowed(name: str, size: tuple[int, ...]) -> None:
    transform = strongest(name, size)
    for seed in range(20):
        field = field_of(transform, seed)
        steps = []
        for axis in range(len(size)):
            forward = np.diff(np.indices(size) + field, axis=1 + axis)
            steps.append(forward[(slice(None), *[slice(0, n - 1) for n in size])])
        jacobian = np.stack(steps)  # (step along, component, …)
        determinant = np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))
        assert determinant.min() > -1e-6


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0), (1.0, 2.0)])
def test_shifting_scaling_and_rotating_is_one_affine_map(spacing_mm: tuple[float, float]) -> None:
    size = (30, 26)
    transform = RandShiftScaleRotated(
        patch_size=size, spacing_mm=spacing_mm, prob=1, shift=0.1, scale=(1.25, 1.25), rotation_deg=30
    )
    centre, mm = (np.array(size) - 1) / 2, np.array(spacing_mm)
    angles = []
    for seed in range(20):
        place = np.indices(size) + field_of(transform, seed)
        matrix = np.stack([place[:, 1, 0] - place[:, 0, 0], place[:, 0, 1] - place[:, 0, 0]], axis=1)
        shift = place[:, 0, 0] - matrix @ -centre - centre
        points = np.indices(size) - centre[:, None, None]
        expected = np.einsum("ab,b...->a...", matrix, points) + (centre + shift)[:, None, None]
        np.testing.assert_allclose(place, expected, atol=1e-4)
        assert (np.abs(shift) <= 0.1 * np.array(size) + 1e-4).all()
        in_mm = matrix * mm[:, None] / mm
        np.testing.assert_allclose(in_mm @ in_mm.T, np.eye(2) / 1.25**2, atol=1e-5)  # magnified 1.25 times
        angles.append(math.degrees(math.atan2(in_mm[1, 0], in_mm[0, 0])))
    assert max(np.abs(angles)) <= 30 + 1e-3 and max(angles) > 15 and min(angles) < -15


def test_magnification_above_one_makes_things_larger() -> None:
    away = torch.stack(torch.meshgrid(*[torch.arange(60.0) - 29.5] * 2, indexing="ij"))
    disc = (away.norm(dim=0, keepdim=True) < 12).to(torch.uint8)
    transform = RandShiftScaleRotated(patch_size=(60, 60), prob=1, shift=0, scale=(1.5, 1.5))
    found = transform({"image": disc, "label": disc})["label"]
    assert int(found.sum()) == pytest.approx(int(disc.sum()) * 1.5**2, rel=0.03)


@pytest.mark.parametrize("size", SIZES)
def test_elastic_fields_are_the_splines_of_scipy(size: tuple[int, ...]) -> None:
    distance = 7.5
    transform = RandElasticd(patch_size=size, prob=1, distance=distance, magnitude=(2, 2))
    field = field_of(transform, 4)
    draws = np.random.RandomState(4)
    draws.random_sample(), draws.uniform(2, 2)
    counts = [math.floor((n - 1) / distance) + 4 for n in size]
    expected = draws.uniform(-2, 2, (len(size), *counts))
    for axis, (n, count) in enumerate(zip(size, counts, strict=True), start=1):
        knots = np.arange(-3, count + 1, dtype=float) * distance
        spline = BSpline(knots, np.moveaxis(expected, axis, 0), 3)
        expected = np.moveaxis(spline(np.arange(n)), 0, axis)
    np.testing.assert_allclose(field, expected, atol=1e-5)


def test_grid_distortion_moves_lines_and_keeps_the_border() -> None:
    transform = RandGridDistortiond(patch_size=(41, 21), prob=1, bands=4, limit=0.5)
    for seed in range(5):
        place = np.indices((41, 21)) + field_of(transform, seed)
        assert np.ptp(place[0], axis=1).max() < 1e-4 and np.ptp(place[1], axis=0).max() < 1e-4
        for along, last in ((place[0, :, 0], 40), (place[1, 0], 20)):
            assert along[0] == pytest.approx(0) and along[-1] == pytest.approx(last, abs=1e-4)
            widths = np.diff(along[:: last // 4])
            relative = widths / widths.mean()
            assert relative.min() > 0.5 / 1.5 and relative.max() < 1.5 / 0.5 and np.ptp(relative) > 0.05
            assert np.abs(np.diff(along).reshape(4, -1) - widths[:, None] / (last // 4)).max() < 1e-4  # linear between


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0), (1.0, 2.0)])
def test_optical_distortion_by_hand(spacing_mm: tuple[float, float]) -> None:
    transform = RandOpticalDistortiond(patch_size=(21, 21), spacing_mm=spacing_mm, prob=1, distortion=(0.2, 0.2))
    place = np.indices((21, 21)) + field_of(transform)
    assert place[:, 10, 10].tolist() == [10, 10]
    np.testing.assert_allclose(place[:, 0, 20], [10 - 10 * 1.2, 10 + 10 * 1.2], atol=1e-4)  # a corner: 20 % further out
    share = (10 * spacing_mm[0]) ** 2 / ((10 * spacing_mm[0]) ** 2 + (10 * spacing_mm[1]) ** 2)
    np.testing.assert_allclose(place[:, 0, 10], [10 - 10 * (1 + 0.2 * share), 10], atol=1e-4)  # the middle of an edge


@pytest.mark.parametrize("size", [(25, 17), (13, 9, 17)])
def test_piecewise_affine_fields_are_linear_on_each_simplex(size: tuple[int, ...]) -> None:
    dims, cells = len(size), 4
    field = field_of(RandPiecewiseAffined(patch_size=size, prob=1, cells=cells, magnitude=(0.15, 0.15)), 2)
    draws = np.random.RandomState(2)
    draws.random_sample(), draws.uniform(0.15, 0.15)
    cell = np.array([(n - 1) / cells for n in size])
    nodes = draws.uniform(-0.15, 0.15, (dims, *[cells + 1] * dims)) * cell.reshape(-1, *[1] * dims)
    for voxel in list(np.ndindex(*size))[::7]:
        place = np.array(voxel) / cell
        corner = np.minimum(np.floor(place), cells - 1).astype(int)
        within = place - corner
        order = max(  # the simplex that holds the point: the one along whose edges it lies in descending order
            itertools.permutations(range(dims)), key=lambda way: all(np.diff(within[list(way)]) <= 1e-12)
        )
        corners = np.array([corner + np.isin(range(dims), order[:k]) for k in range(dims + 1)])
        barycentric = np.linalg.solve(np.vstack([corners.T, np.ones(dims + 1)]), np.append(place, 1))
        expected = sum(b * nodes[(slice(None), *c)] for b, c in zip(barycentric, corners, strict=True))
        np.testing.assert_allclose(field[(slice(None), *voxel)], expected, atol=1e-5)


# --- recipes and draws


@pytest.mark.parametrize("name", DEFORMATIONS)
def test_the_state_alone_decides_and_deformations_happen_as_often_as_asked(name: str) -> None:
    transform = DEFORMATIONS[name](patch_size=(12, 10), prob=0.3)
    sample = {"image": noise(1, 12, 10), "label": label_of(12, 10)}
    results = [transform.set_random_state(seed)(sample) for seed in range(400)]
    changed = [not torch.equal(result["image"], sample["image"]) for result in results]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.08)
    for seed in (7, 3, 399):
        again = transform.set_random_state(seed)(sample)
        assert all(torch.equal(again[key], results[seed][key]) for key in sample)


def test_deformations_in_a_row_are_one_resampling_of_the_sum_of_their_fields() -> None:
    names = ["elastic", "grid_distortion", "optical_distortion"]
    steps = [{"name": name, "args": {"prob": 1}} for name in names]
    augment = augmentation([*steps, {"name": "flip", "args": {"prob": 0}}], patch_size=(32, 32), labels=LABELS)
    joined = augment.others[0]
    assert isinstance(joined, Deformationsd) and len(augment.others) == 2
    total = field_of(joined, 5)
    state = np.random.RandomState(5)
    parts = [DEFORMATIONS[name](patch_size=(32, 32), prob=1).set_random_state(state=state) for name in names]
    np.testing.assert_allclose(total, sum(part.randomize().numpy() for part in parts), atol=1e-5)
    image = noise(1, 32, 32)
    found = joined.set_random_state(5)({"image": image, "label": label_of(32, 32)})["image"][0]
    expected = ndimage.map_coordinates(
        image[0].numpy().astype(np.float64), np.indices((32, 32)) + total, order=1, mode="nearest"
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)


def test_joined_deformations_happen_each_by_its_own_chance() -> None:
    steps = [{"name": "elastic", "args": {"prob": 0.3}}, {"name": "grid_distortion", "args": {"prob": 0.3}}]
    joined = augmentation(steps, patch_size=(16, 16), labels=LABELS).others[0]
    fields = [joined.set_random_state(seed).randomize(None) for seed in range(600)]
    assert np.mean([field is not None for field in fields]) == pytest.approx(1 - 0.7**2, abs=0.07)


@pytest.mark.parametrize("patch", [(32, 32), (32, 32, 1), (24, 24, 24)])
def test_everything_pictures_want_runs_in_one_recipe(patch: tuple[int, ...]) -> None:
    steps = [{"name": name} for name in AUGMENTATIONS]
    first, second = (augmentation(steps, patch_size=patch, labels=LABELS, num_channels=3) for _ in range(2))
    size = first.source_size
    sample = {"image": noise(3, *size), "label": label_of(*size)}
    for seed in (*range(6), 3, 0):
        one, two = first(sample, seed), second(sample, seed)
        assert one["image"].shape == (3, *patch) and one["image"].isfinite().all()
        assert one["label"].shape == (1, *patch) and one["label"].dtype == torch.uint8
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["label"], two["label"])
        assert one["image"].is_contiguous() and one["label"].is_contiguous()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("elastic", {"distance": 10, "magnitude": [0, 5]}),
        ("elastic", {"magnitude": 3}),
        ("grid_distortion", {"limit": 1.0}),
        ("grid_distortion", {"bands": 0}),
        ("optical_distortion", {"distortion": [-0.5, 0]}),
        ("piecewise_affine", {"magnitude": [0, 0.3]}),
        ("shift_scale_rotate", {"shift": -0.1}),
        ("shift_scale_rotate", {"patch_size": [8, 8]}),
    ],
)
def test_arguments_out_of_range_are_refused(name: str, args: dict[str, Any]) -> None:
    with pytest.raises(WorkflowError, match="E-ARGUMENT"):
        augmentation([{"name": name, "args": args}], patch_size=(32, 32), labels=LABELS)


# --- turns


@pytest.mark.parametrize("size", [(8, 8), (8, 8, 5)])
def test_transposing_is_numpys(size: tuple[int, ...]) -> None:
    image, label = noise(2, *size), label_of(*size)
    result = RandTransposed(patch_size=size, prob=1)({"image": image, "label": label})
    np.testing.assert_array_equal(result["image"], image.numpy().swapaxes(1, 2))
    np.testing.assert_array_equal(result["label"], label.numpy().swapaxes(1, 2))
    assert result["label"].dtype == torch.uint8 and result["image"].is_contiguous()


def test_quarter_turns_are_numpys_and_equally_likely() -> None:
    image, label = noise(2, 5, 8, 8), label_of(5, 8, 8)
    transform = RandQuarterTurnd(patch_size=(5, 8, 8), axes=(1, 2), prob=0.75)
    counts = {quarters: 0 for quarters in range(4)}
    for seed in range(400):
        quarters = transform.set_random_state(seed).randomize()
        counts[quarters] += 1
        if seed < 20:
            result = transform.set_random_state(seed)({"image": image, "label": label})
            np.testing.assert_array_equal(result["image"], np.rot90(image.numpy(), quarters, (2, 3)))
            np.testing.assert_array_equal(result["label"], np.rot90(label.numpy(), quarters, (2, 3)))
    assert all(count == pytest.approx(100, abs=30) for count in counts.values())


@pytest.mark.parametrize("name", ["transpose", "quarter_turn"])
def test_turns_that_would_change_the_shape_or_left_and_right_are_refused(name: str) -> None:
    def build(patch: tuple[int, ...], labels: Labels = LABELS, spacing_mm: Any = None, **args: Any) -> None:
        augmentation([{"name": name, "args": args}], patch_size=patch, labels=labels, spacing_mm=spacing_mm)

    build((8, 8, 5))
    build((5, 8, 8), axes=[1, 2])
    with pytest.raises(WorkflowError, match="8 and 9 voxels"):
        build((8, 9))
    with pytest.raises(WorkflowError, match="1 and 2 mm"):
        build((8, 8), spacing_mm=(1.0, 2.0))
    with pytest.raises(WorkflowError, match="left and right"):
        build((8, 8), labels=PAIRED)
    for axes in ([0, 0], [0, 2], [1]):
        with pytest.raises(WorkflowError, match="axes"):
            build((8, 8), axes=axes)
