"""Random transforms: image and label from one draw, decided by the seed, against independent oracles."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Compose, RandBiasFieldd
from scipy import ndimage
from torch import Tensor

from medseg.data.augment import AUGMENTATIONS, RECIPES, Augmentation, augmentation
from medseg.data.intensity_augment import (
    RandIntensityd,
    RandNoised,
    add_noise,
    adjust_contrast,
    adjust_gamma,
    blur,
    lower_resolution,
    mean_and_std,
)
from medseg.data.spatial_augment import RandFlipLabelsd, RandSpatiald
from medseg.errors import DataError, WorkflowError
from medseg.labels import Labels

LABELS = Labels(names={0: "background", 1: "left kidney", 2: "right kidney", 3: "liver"}, pairs=((1, 2),))
INTENSITY = {name: part for name, part in AUGMENTATIONS.items() if issubclass(part, RandIntensityd)}
PATCH = (20, 24, 18)


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def sample_for(augment: Augmentation, channels: int = 1) -> dict[str, Any]:
    label = torch.randint(
        0, 4, (1, *augment.source_size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    return {"image": noise(channels, *augment.source_size), "label": label}


def spatial(patch_size: tuple[int, ...] = PATCH, **args: Any) -> RandSpatiald:
    return RandSpatiald(patch_size=patch_size, **{"rotate_prob": 1, "scale_prob": 1, **args})


# --- recipes and seeds


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("patch", [PATCH, (20, 24), (20, 24, 1), (1, 20, 24), (32, 30, 5)])
def test_every_recipe_gives_contiguous_patches_of_the_right_type(recipe: str, patch: tuple[int, ...]) -> None:
    augment = augmentation(recipe, patch_size=patch, labels=LABELS)
    sample = sample_for(augment, channels=2)
    before = {key: tensor.clone() for key, tensor in sample.items()}
    for seed in range(25):
        result = augment(sample, seed)
        assert result["image"].shape == (2, *patch) and result["image"].dtype == torch.float32
        assert result["label"].shape == (1, *patch) and result["label"].dtype == torch.uint8
        assert result["image"].is_contiguous() and result["label"].is_contiguous()
        assert result["image"].isfinite().all()
    assert all(torch.equal(sample[key], before[key]) for key in before), "the source was changed in place"


def test_the_seed_alone_decides_the_draw() -> None:
    first, second = (augmentation("strong", patch_size=PATCH, labels=LABELS) for _ in range(2))
    sample = sample_for(first)
    results = [first(sample, seed) for seed in range(12)]
    for seed in reversed(range(12)):
        again = second(sample, seed)
        assert torch.equal(again["image"], results[seed]["image"])
        assert torch.equal(again["label"], results[seed]["label"])
    assert all(not torch.equal(a["image"], b["image"]) for a, b in itertools.combinations(results, 2))


def test_removing_a_step_leaves_the_draws_of_those_before_it() -> None:
    steps = [{"name": "spatial", "args": {"rotate_prob": 1}}, {"name": "noise", "args": {"prob": 1}}]
    whole = augmentation(steps, patch_size=PATCH, labels=LABELS)
    part = augmentation(steps[:1], patch_size=PATCH, labels=LABELS)
    sample = sample_for(whole)
    assert torch.equal(whole(sample, 5)["label"], part(sample, 5)["label"])


def test_what_a_seed_needs_gives_the_same_sample_as_the_largest_source() -> None:
    augment = augmentation("strong", patch_size=PATCH, labels=LABELS)
    sample = sample_for(augment)
    sizes = set()
    for seed in range(30):
        size = augment.source_size_for(seed)
        start = [(whole - n) // 2 for whole, n in zip(augment.source_size, size, strict=True)]
        box = (slice(None), *[slice(s, s + n) for s, n in zip(start, size, strict=True)])
        small, large = augment({key: tensor[box] for key, tensor in sample.items()}, seed), augment(sample, seed)
        torch.testing.assert_close(small["image"], large["image"], rtol=0, atol=1e-4)
        assert torch.equal(small["label"], large["label"])
        sizes.add(size)
    assert PATCH in sizes and len(sizes) > 5


def test_no_augmentation_returns_the_source_itself() -> None:
    augment = augmentation("none", patch_size=PATCH, labels=LABELS)
    sample = sample_for(augment)
    assert augment.source_size == PATCH == augment.source_size_for(3)
    result = augment(sample, 3)
    assert torch.equal(result["image"], sample["image"]) and torch.equal(result["label"], sample["label"])


def test_read_only_half_precision_arrays_are_taken() -> None:
    augment = augmentation("default", patch_size=PATCH, labels=LABELS)
    sample = {key: tensor.numpy() for key, tensor in sample_for(augment).items()}
    half = {"image": sample["image"].astype(np.float16), "label": sample["label"].astype(np.uint16)[:, ::-1][:, ::-1]}
    half["image"].flags.writeable = half["label"].flags.writeable = False
    for seed in range(8):
        expected, result = augment(sample, seed), augment(half, seed)
        assert result["image"].dtype == torch.float32
        torch.testing.assert_close(result["image"], expected["image"], rtol=0.02, atol=0.02)
        assert torch.equal(result["label"].long(), expected["label"].long())


@pytest.mark.parametrize(
    ("recipe", "error_id"),
    [
        ("defautl", "E-UNKNOWN-NAME"),
        ([{"name": "nois"}], "E-UNKNOWN-NAME"),
        ([{"name": "noise", "args": {"sdt": [0, 1]}}], "E-ARGUMENT"),
        ([{"name": "flip", "args": {"pairs": []}}], "E-ARGUMENT"),
        ([{"name": "noise", "args": {"prob": 1.5}}], "E-ARGUMENT"),
        ([{"name": "noise", "args": {"prob": "often"}}], "E-ARGUMENT"),
        ([{"name": "gamma", "args": {"gamma": [1.5, 0.7]}}], "E-ARGUMENT"),
        ([{"name": "gamma", "args": {"gamma": 0.7}}], "E-ARGUMENT"),
        ([{"name": "spatial", "args": {"scale": [0, 2]}}], "E-ARGUMENT"),
        ([{"name": "flip"}, {"name": "spatial"}], "E-AUGMENT-ORDER"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused(recipe: Any, error_id: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        augmentation(recipe, patch_size=PATCH, labels=LABELS)
    assert caught.value.error_id == error_id


def test_monai_random_transforms_compose_with_ours() -> None:
    def compose() -> Compose:
        parts = [spatial(), RandBiasFieldd("image", prob=1.0), RandNoised(prob=1.0), RandFlipLabelsd(pairs=[(1, 2)])]
        return Compose(parts).set_random_state(seed=3)

    sample = sample_for(augmentation("default", patch_size=PATCH, labels=LABELS))
    first, second, third = compose(), compose(), compose().set_random_state(seed=4)
    result, same, other = (c(sample) for c in (first, second, third))
    assert result["image"].shape == (1, *PATCH)
    assert torch.equal(result["image"], same["image"]) and torch.equal(result["label"], same["label"])
    assert not torch.equal(result["image"], other["image"])


# --- rotation and scaling


@pytest.mark.parametrize(
    ("patch", "spacing_mm"), [(PATCH, None), (PATCH, (1.0, 0.7, 2.0)), ((30, 26), None), ((20, 1, 24), None)]
)
def test_resampling_equals_scipy_for_the_same_matrix(patch: tuple[int, ...], spacing_mm: Any) -> None:
    transform = spatial(patch, spacing_mm=spacing_mm, scale_axes_apart=True)
    image = noise(2, *transform.source_size)
    label = (image[:1] > 0.4).to(torch.int16) * 3
    for seed in range(5):
        matrix = transform.set_random_state(seed).randomize()
        assert matrix is not None
        result = transform.set_random_state(seed)({"image": image, "label": label})
        centre = [(n - p) // 2 + (p - 1) / 2 for n, p in zip(image.shape[1:], patch, strict=True)]
        offset = np.array(centre) - matrix @ ((np.array(patch) - 1) / 2)
        for order, source, found in ((1, image[1], result["image"][1]), (0, label[0], result["label"][0])):
            expected = ndimage.affine_transform(
                source.numpy().astype(np.float64), matrix, offset, output_shape=patch, order=order, mode="nearest"
            )
            differs = np.abs(found.numpy() - expected) > 1e-4
            assert differs.mean() < (0.0 if order else 1e-3) + 1e-9  # nearest: float32 may break a tie the other way


def test_rotation_is_rigid_in_millimetres() -> None:
    spacing_mm = np.array([1.0, 1.5, 2.5])
    transform = spatial(spacing_mm=spacing_mm.tolist(), scale_prob=0)
    for seed in range(5):
        in_mm = transform.set_random_state(seed).randomize() * spacing_mm[:, None] / spacing_mm
        np.testing.assert_allclose(in_mm @ in_mm.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(in_mm) == pytest.approx(1)


def test_magnification_above_one_makes_organs_larger() -> None:
    transform = spatial((24, 24, 24), rotate_prob=0, scale=(1.25, 1.25))
    grid = torch.stack(torch.meshgrid(*[torch.arange(24.0) - 11.5] * 3, indexing="ij"))
    sphere = (grid.norm(dim=0, keepdim=True) < 6).to(torch.uint8)
    enlarged = transform({"image": sphere, "label": sphere})["label"]
    assert int(enlarged.sum()) == pytest.approx(int(sphere.sum()) * 1.25**3, rel=0.05)


@pytest.mark.parametrize("recipe", ["default", "strong"])
def test_image_and_label_stay_aligned(recipe: str) -> None:
    steps = [step for step in RECIPES[recipe] if step["name"] in ("spatial", "flip")]
    steps[0] = {"name": "spatial", "args": {**steps[0].get("args", {}), "rotate_prob": 1, "scale_prob": 1}}
    augment = augmentation(steps, patch_size=(32, 40, 36), labels=Labels(names={0: "background", 1: "ball"}))
    centre = torch.tensor(augment.source_size).view(3, 1, 1, 1) / 2 + torch.tensor([3.0, -4, 2]).view(3, 1, 1, 1)
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in augment.source_size], indexing="ij"))
    distance = (grid - centre).norm(dim=0, keepdim=True)
    sample = {"image": 12 - distance, "label": (distance < 12).to(torch.uint8)}
    for seed in range(10):
        result = augment(sample, seed)
        ball, label = result["image"] > 0, result["label"] == 1
        assert 2 * (ball & label).sum() / (ball.sum() + label.sum()) > 0.95


@pytest.mark.parametrize("spacing_mm", [None, (1.0, 0.8, 2.0)])
@pytest.mark.parametrize("args", [{}, {"scale_axes_apart": True}, {"rotation_deg": 75}, {"scale_prob": 0}])
def test_the_source_covers_every_draw(args: dict[str, Any], spacing_mm: Any) -> None:
    transform = spatial(spacing_mm=spacing_mm, **args)
    transform.set_random_state(0)
    half = (np.array(PATCH) - 1) / 2
    corners = np.array(list(itertools.product(*[(-h, h) for h in half])))
    limit = (np.array(transform.source_size) - 1) / 2
    reach = np.max([np.abs(corners @ transform.randomize().T).max(axis=0) for _ in range(3000)], axis=0)
    assert (reach <= limit + 1e-6).all()
    assert (reach > 0.85 * limit).all(), "larger than need be"


def test_no_voxel_from_beyond_the_source_appears() -> None:
    transform = spatial(rotation_deg=30, scale=(0.7, 0.7))
    marked = torch.zeros(1, *[n + 2 for n in transform.source_size])
    inner = (slice(None), *[slice(1, -1)] * 3)
    marked[inner] = 1
    for seed in range(30):
        result = transform.set_random_state(seed)({"image": marked, "label": marked.to(torch.uint8)})
        assert result["image"].min() > 1 - 1e-5 and result["label"].min() == 1


def test_a_source_that_is_too_small_repeats_its_border() -> None:
    transform = spatial(scale=(0.7, 0.7))
    result = transform.set_random_state(1)({"image": torch.ones(1, *PATCH), "label": torch.ones(1, *PATCH).byte()})
    torch.testing.assert_close(result["image"], torch.ones(1, *PATCH))
    assert (result["label"] == 1).all()


def test_a_source_smaller_than_the_patch_is_refused() -> None:
    with pytest.raises(DataError, match=r"\(1, 19, 24, 18\) holds no patch of \(20, 24, 18\)"):
        spatial()({"image": torch.ones(1, 19, 24, 18), "label": torch.ones(1, 19, 24, 18).byte()})


@pytest.mark.parametrize(
    ("patch", "spacing_mm", "thin"),
    [((20, 24, 1), None, 2), ((1, 20, 24), None, 0), ((40, 12, 40), None, 1), (PATCH, (5.0, 1.0, 1.0), 0)],
)
def test_slices_are_rotated_and_scaled_in_their_plane_only(patch: Any, spacing_mm: Any, thin: int) -> None:
    transform = spatial(patch, spacing_mm=spacing_mm)
    assert transform.source_size[thin] == patch[thin]
    source = torch.arange(patch[thin], dtype=torch.float32).view([-1 if a == thin else 1 for a in range(3)])
    image = source.expand(1, *transform.source_size)
    for seed in range(5):
        assert transform.set_random_state(seed).randomize() is not None
        result = transform.set_random_state(seed)({"image": image, "label": image.to(torch.uint8)})
        torch.testing.assert_close(result["image"], source.expand(1, *patch), rtol=0, atol=1e-5)
        assert torch.equal(result["label"], source.expand(1, *patch).to(torch.uint8))


def test_a_rod_is_left_alone() -> None:
    transform = spatial((40, 2, 2))
    assert transform.source_size == (40, 2, 2)
    assert transform.set_random_state(0).randomize() is None


# --- mirroring


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_only_a_left_right_flip_exchanges_paired_labels(axis: int) -> None:
    label = torch.tensor([0, 1, 2, 3, 255], dtype=torch.uint8).repeat(12).view(1, 3, 4, 5)
    image = noise(2, 3, 4, 5)
    result = RandFlipLabelsd(prob=1, axes=[axis], pairs=[(1, 2)])({"image": image, "label": label})
    expected = np.flip(label.numpy(), 1 + axis)
    if axis == 0:
        expected = np.where(expected == 1, 2, np.where(expected == 2, 1, expected))
    np.testing.assert_array_equal(result["label"].numpy(), expected)
    np.testing.assert_array_equal(result["image"].numpy(), np.flip(image.numpy(), 1 + axis))
    assert result["label"].dtype == torch.uint8


def test_negative_labels_are_refused_where_pairs_are_exchanged() -> None:
    with pytest.raises(DataError, match="-1 to 2"):
        RandFlipLabelsd(prob=1, pairs=[(1, 2)])({"image": noise(1, 4), "label": torch.tensor([[-1, 0, 1, 2]])})


# --- how often


def share(transform: RandIntensityd, runs: int = 1500) -> float:
    transform.set_random_state(0)
    image = noise(1, 3, 3, 3)
    return sum(not torch.equal(transform({"image": image})["image"], image) for _ in range(runs)) / runs


@pytest.mark.parametrize("name", INTENSITY)
def test_intensity_changes_happen_as_often_as_asked(name: str) -> None:
    args = {"factor": (0.3, 0.5)} if name == "low_resolution" else {}
    assert share(INTENSITY[name](prob=0.3, channel_prob=0.5, **args)) == pytest.approx(0.15, abs=0.03)


def test_rotation_scaling_and_flips_happen_as_often_as_asked() -> None:
    transform = RandSpatiald(patch_size=PATCH, rotate_prob=0.2, scale_prob=0.3).set_random_state(0)
    matrices = [transform.randomize() for _ in range(5000)]
    scaled = [m is not None and not math.isclose(np.linalg.det(m), 1) for m in matrices]
    rotated = [m is not None and bool(np.abs(m - np.diag(np.diag(m))).max() > 0) for m in matrices]
    assert np.mean(rotated) == pytest.approx(0.2, abs=0.03)
    assert np.mean(scaled) == pytest.approx(0.3, abs=0.03)
    assert np.mean([a and b for a, b in zip(rotated, scaled, strict=True)]) == pytest.approx(0.06, abs=0.02)
    flip = RandFlipLabelsd().set_random_state(0)
    flips = [flip.randomize(3) for _ in range(2000)]
    for axis in range(3):
        assert np.mean([axis in drawn for drawn in flips]) == pytest.approx(0.5, abs=0.04)


# --- intensity


@pytest.mark.parametrize("name", INTENSITY)
@pytest.mark.parametrize("size", [(12, 10, 14), (12, 10), (12, 10, 1)])
def test_intensity_transforms_change_the_image_alone(name: str, size: tuple[int, ...]) -> None:
    transform = INTENSITY[name](prob=1, channel_prob=1).set_random_state(0)
    sample = {"image": noise(2, *size), "label": torch.ones(1, *size, dtype=torch.uint8)}
    before = sample["image"].clone()
    result = transform(sample)
    assert result["label"] is sample["label"]
    assert torch.equal(sample["image"], before) and not torch.equal(result["image"], before)
    assert result["image"].shape == before.shape and result["image"].is_contiguous()


@pytest.mark.parametrize("name", INTENSITY)
@pytest.mark.parametrize("value", [0.0, -3.0, 1e4])
def test_constant_images_stay_finite(name: str, value: float) -> None:
    transform = INTENSITY[name](prob=1, channel_prob=1).set_random_state(0)
    assert transform({"image": torch.full((1, 6, 6, 6), value)})["image"].isfinite().all()


def test_channels_are_drawn_apart_and_use_their_own_statistics() -> None:
    image = torch.stack([noise(20, 20, 20), 100 * noise(20, 20, 20, seed=1) + 50])
    result = RandNoised(prob=1, std=(0.5, 0.5)).set_random_state(0)({"image": image})["image"]
    added = (result - image).flatten(1)
    torch.testing.assert_close(added.std(dim=1), 0.5 * image.flatten(1).std(dim=1), rtol=0.03, atol=0)
    assert torch.corrcoef(added)[0, 1].abs() < 0.05


def test_mean_and_deviation_equal_numpy() -> None:
    values = 3 + 2 * noise(31, 17)
    expected = values.numpy().astype(np.float64)
    assert mean_and_std(values) == pytest.approx((expected.mean(), expected.std()), rel=1e-5)


def test_noise_is_that_of_its_seed() -> None:
    image = noise(9, 9)
    assert torch.equal(add_noise(image, 0.1, seed=1), add_noise(image, 0.1, seed=1))
    assert not torch.equal(add_noise(image, 0.1, seed=1), add_noise(image, 0.1, seed=2))


def test_blur_equals_scipy() -> None:
    image, sigmas = noise(17, 5, 9), (0.5, 0.8, 1.0)
    expected = image.numpy().astype(np.float64)
    for axis, sigma in enumerate(sigmas):
        radius = math.ceil(3 * sigma)
        expected = ndimage.gaussian_filter1d(expected, sigma, axis, mode="nearest", radius=radius)
    np.testing.assert_allclose(blur(image, sigmas).numpy(), expected, atol=1e-5)


def test_contrast_spreads_about_the_mean_within_the_range() -> None:
    image = torch.tensor([[0.0, 4.0, 5.0, 6.0, 10.0]])
    np.testing.assert_allclose(adjust_contrast(image, 1.5).numpy(), [[0, 3.5, 5, 6.5, 10]], atol=1e-6)
    np.testing.assert_allclose(adjust_contrast(image, 0.5).numpy(), [[2.5, 4.5, 5, 5.5, 7.5]], atol=1e-6)


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("gamma", [0.7, 1.5])
def test_gamma_equals_the_formula_in_double_precision(gamma: float, invert: bool) -> None:
    image = noise(11, 12, 13)
    values = image.numpy().astype(np.float64) * (-1 if invert else 1)
    bent = ((values - values.min()) / (values.max() - values.min())) ** gamma
    bent = (bent - bent.mean()) / bent.std() * values.std() + values.mean()
    found = adjust_gamma(image, gamma, invert=invert)
    np.testing.assert_allclose(found.numpy(), bent * (-1 if invert else 1), atol=1e-5)


def test_gamma_keeps_the_order_of_grey_values() -> None:
    image = noise(200).sort().values.view(10, 20)
    assert (adjust_gamma(image, 1.5, invert=True).flatten().diff() >= -1e-6).all()


def test_low_resolution_loses_detail_within_slices_only() -> None:
    image = noise(16, 16, 4)
    coarse = lower_resolution(image, 0.5, axes=(0, 1))
    torch.testing.assert_close(coarse[:, :, 1], lower_resolution(image[:, :, 1], 0.5, axes=(0, 1)))
    ramp = torch.arange(16.0).expand(16, 16)
    torch.testing.assert_close(lower_resolution(ramp, 0.5, axes=(0, 1))[:, 2:-2], ramp[:, 2:-2], atol=0.51, rtol=0)
