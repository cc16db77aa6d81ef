from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from torch import Tensor

from medseg.data.resample import resample_image, resample_label
from medseg.geometry import Geometry

SHAPE = (13, 11, 9)
SOURCE = Geometry.from_spacing(SHAPE, (0.8, 1.0, 2.5))
SPACINGS = [(1.5, 1.5, 2.5), (0.5, 0.6, 1.0), (0.5, 1.7, 2.5)]
SHEARED = Geometry(SHAPE, np.array([[1, 0, 0, 5], [0, 1, 0.4, -7], [0, 0, 2, 9], [0, 0, 0, 1.0]]))


def noise(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def linear_by_scipy(volume: np.ndarray, source: Geometry, target: Geometry) -> np.ndarray:
    """Trilinear interpolation in float64; beyond the outer centers their value goes on."""
    voxels = np.stack(np.meshgrid(*map(np.arange, target.shape), [1], indexing="ij")).reshape(4, -1)
    at = (np.linalg.inv(source.affine) @ target.affine @ voxels)[:3]
    values = ndimage.map_coordinates(volume.astype(np.float64), at, order=1, mode="nearest")
    return values.reshape(target.shape)


@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_images_agree_with_scipy(spacing_mm: tuple[float, ...]) -> None:
    image, target = noise(2, *SHAPE), SOURCE.resampled(spacing_mm)
    result = resample_image(image, SOURCE, target)
    for channel, expected in zip(result, image, strict=True):
        by_scipy = linear_by_scipy(expected.numpy(), SOURCE, target)
        np.testing.assert_allclose(channel, by_scipy, atol=1e-5)


@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_images_agree_with_itk(spacing_mm: tuple[float, ...]) -> None:
    image, target = noise(1, *SHAPE), SOURCE.resampled(spacing_mm)
    by_itk = sitk.GetImageFromArray(image[0].numpy().transpose())
    origin, spacing, direction = SOURCE.lps()
    by_itk.SetOrigin(origin)
    by_itk.SetSpacing(spacing)
    by_itk.SetDirection(direction)
    origin, spacing, direction = target.lps()
    by_itk = sitk.Resample(by_itk, target.shape, sitk.Transform(), sitk.sitkLinear, origin, spacing, direction)
    expected = sitk.GetArrayFromImage(by_itk).transpose()
    np.testing.assert_allclose(resample_image(image, SOURCE, target)[0], expected, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 2, 1), (0, 2, 3, 1)])
def test_the_layout_in_memory_changes_nothing(order: tuple[int, ...]) -> None:
    image, target = noise(1, *SHAPE), SOURCE.resampled((1.5, 1.5, 1.5))
    label = (image > 0).to(torch.uint8) + (image > 1)
    back = np.argsort(order).tolist()
    turned = image.permute(order).contiguous().permute(back)
    turned_label = label.permute(order).contiguous().permute(back)
    torch.testing.assert_close(resample_image(turned, SOURCE, target), resample_image(image, SOURCE, target))
    assert torch.equal(resample_label(turned_label, SOURCE, target), resample_label(label, SOURCE, target))


@pytest.mark.parametrize("order", [(0, 3, 2, 1), (0, 2, 3, 1), (0, 1, 3, 2)])
def test_ties_go_to_the_lowest_index_however_the_label_map_lies_in_memory(order: tuple[int, ...]) -> None:
    """At half the resolution all eight votes are equal: the most frequent label, of several the first by index."""
    label = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (1, 12, 10, 8)).astype(np.uint8))
    source = Geometry.from_spacing(label.shape[1:], (1, 1, 1))
    turned = label.permute(order).contiguous().permute(np.argsort(order).tolist())
    result = resample_label(turned, source, source.resampled((2, 2, 2)))[0]
    for i, j, k in np.ndindex(*result.shape):
        around = label[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].flatten().tolist()
        assert result[i, j, k] == max(around, key=around.count)  # max() returns the first


@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_labels_are_those_with_the_most_linear_weight(spacing_mm: tuple[float, ...]) -> None:
    label, target = (noise(1, *SHAPE) * 2).round().clamp(0, 3).to(torch.int16), SOURCE.resampled(spacing_mm)
    result = resample_label(label, SOURCE, target)
    weights = np.stack([linear_by_scipy((label[0] == v).numpy(), SOURCE, target) for v in range(4)])
    chosen = np.take_along_axis(weights, result.long().numpy(), axis=0)[0]
    assert result.dtype == torch.int16
    np.testing.assert_allclose(chosen, weights.max(0), atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_ties_do_not_make_labels_grow(axis: int) -> None:
    """At half the resolution the votes at both faces of this slab are equal; one face gains what the other loses."""
    label = torch.zeros(1, 40, 40, 40, dtype=torch.uint8)
    label.narrow(axis, 11, 18).fill_(1)
    source = Geometry.from_spacing((40, 40, 40), (1, 1, 1))
    half = resample_label(label, source, source.resampled((2, 2, 2)))
    assert int(half.sum()) * 8 == int(label.sum())


def test_pictures_are_resampled_in_their_plane() -> None:
    source = Geometry.from_spacing((13, 11), (1, 1))
    target = source.resampled((1.6, 0.7))
    picture = noise(3, 13, 11)
    deep = Geometry.from_spacing((13, 11, 4), (1, 1, 1))
    expected = resample_image(picture[..., None].expand(-1, -1, -1, 4), deep, deep.resampled((1.6, 0.7, 1)))
    torch.testing.assert_close(resample_image(picture, source, target), expected[..., 0])
    label = (picture[:1] > 0).to(torch.uint8)
    expected = resample_label(label[..., None].expand(-1, -1, -1, 4), deep, deep.resampled((1.6, 0.7, 1)))
    assert torch.equal(resample_label(label, source, target), expected[..., 0])


def test_the_same_grid_returns_the_same_voxels() -> None:
    image, label = noise(1, *SHAPE), (noise(1, *SHAPE) > 0).to(torch.uint8)
    assert torch.equal(resample_image(image, SOURCE, SOURCE), image)
    assert torch.equal(resample_label(label, SOURCE, SOURCE), label)


def test_a_grid_over_a_part_of_the_scan_is_not_filled_with_the_whole() -> None:
    """Same first voxel and spacing, fewer voxels: what lies beyond is cut off, not squeezed in."""
    image, label = noise(1, *SHAPE), (noise(1, *SHAPE) > 0).to(torch.uint8)
    part = Geometry((SHAPE[0], 6, SHAPE[2]), SOURCE.affine)
    torch.testing.assert_close(resample_image(image, SOURCE, part), image[:, :, :6])
    assert torch.equal(resample_label(label, SOURCE, part), label[:, :, :6])


def test_a_sheared_image_keeps_its_voxels_in_place() -> None:
    """A field that is linear in millimetres is the same field after linear interpolation."""
    target = SHEARED.straightened()
    voxels = np.stack(np.meshgrid(*map(np.arange, SHAPE), [1], indexing="ij"), -1).reshape(*SHAPE, 4)
    field = (voxels @ SHEARED.affine.T)[..., :3] @ [1.0, 2.0, -1.0]
    result = resample_image(torch.from_numpy(field[None].astype(np.float32)), SHEARED, target)[0].numpy()
    for index in np.ndindex(*target.shape):
        at = np.linalg.inv(SHEARED.affine) @ target.affine @ [*index, 1]
        if (at[:3] >= 0).all() and (at[:3] <= np.array(SHAPE) - 1).all():
            np.testing.assert_allclose(result[index], (target.affine @ [*index, 1])[:3] @ [1, 2, -1], atol=1e-3)


def test_outside_a_sheared_scan_is_its_lowest_value_and_background() -> None:
    target = SHEARED.straightened()
    result = resample_image(torch.full((1, *SHAPE), -1000.0), SHEARED, target)
    assert torch.equal(result, torch.full_like(result, -1000.0))
    label = resample_label(torch.ones(1, *SHAPE, dtype=torch.uint8), SHEARED, target)
    assert label.dtype == torch.uint8
    assert set(label.unique().tolist()) == {0, 1}
