"""Grids: every claim is checked in millimetres, where a voxel really lies."""

import numpy as np
import pytest
import SimpleITK as sitk

from medseg.errors import GeometryError
from medseg.geometry import Geometry, Volume

ORIENTATIONS = ["RAS", "LPS", "LAS", "PIR", "SAL", "ASR"]


def oblique(shape=(7, 9, 5), spacing=(0.8, 1.1, 2.5), degrees=20.0) -> Geometry:
    a = np.deg2rad(degrees)
    rotation = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-spacing[0], -spacing[1], spacing[2]])
    affine[:3, 3] = (31.0, -12.0, 400.0)
    return Geometry(shape, affine)


def millimetres(geometry: Geometry, index) -> np.ndarray:
    return geometry.affine[:3, :3] @ np.asarray(index) + geometry.affine[:3, 3]


def test_spacing_and_orientation_are_read_from_the_affine():
    geometry = oblique()
    assert geometry.spacing_mm == pytest.approx((0.8, 1.1, 2.5))
    assert geometry.orientation == "LPS"
    assert geometry.voxel_ml == pytest.approx(0.8 * 1.1 * 2.5 / 1000)


def test_lps_round_trip_agrees_with_simpleitk():
    geometry = oblique()
    origin, spacing, direction = geometry.lps()
    image = sitk.Image(list(geometry.shape), sitk.sitkUInt8)
    image.SetOrigin(origin)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    physical = np.array(image.TransformIndexToPhysicalPoint((2, 3, 4))) * (-1, -1, 1)  # LPS to RAS
    assert physical == pytest.approx(millimetres(geometry, (2, 3, 4)))
    again = Geometry.from_lps(geometry.shape, origin=origin, spacing=spacing, direction=direction)
    assert again.matches(geometry, tolerance=1e-9)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_marked_voxel_keeps_its_place_when_the_axes_turn(orientation):
    geometry = oblique()
    array = np.zeros((1, *geometry.shape))
    array[0, 1, 6, 3] = 1
    turned = Volume(array, geometry).oriented(orientation)
    assert turned.geometry.orientation == orientation
    (found,) = np.argwhere(turned.array[0])
    assert millimetres(turned.geometry, found) == pytest.approx(millimetres(geometry, (1, 6, 3)))


def test_resampling_keeps_the_outer_faces_of_the_volume():
    geometry = oblique()
    new = geometry.resampled((1.0, 1.0, 1.0))
    assert new.spacing_mm == pytest.approx((0.8 * 7 / 6, 1.1 * 9 / 10, 2.5 * 5 / 12))
    for corner in ((-0.5, -0.5, -0.5), None):
        here = corner or np.array(new.shape) - 0.5
        there = corner or np.array(geometry.shape) - 0.5
        assert millimetres(new, here) == pytest.approx(millimetres(geometry, there))


def test_a_sheared_grid_is_covered_by_its_straightened_one():
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[1, 2] = 1.0  # a gantry tilt: slices slide along y
    sheared = Geometry((10, 12, 8), affine)
    straight = sheared.straightened()
    assert not sheared.is_orthogonal
    assert straight.is_orthogonal
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in sheared.shape])).reshape(3, -1).T
    inside = (np.array([millimetres(sheared, c) for c in corners]) - straight.affine[:3, 3]) @ np.linalg.inv(
        straight.affine[:3, :3]
    ).T
    assert (inside > -0.5).all()
    assert (inside < np.array(straight.shape) - 0.5).all()


@pytest.mark.parametrize("broken", [np.full((4, 4), np.nan), np.zeros((4, 4)), np.eye(3)])
def test_a_broken_affine_is_refused(broken):
    with pytest.raises(GeometryError, match="E-AFFINE"):
        Geometry((4, 4, 4), broken)


def test_an_array_of_another_shape_is_refused():
    with pytest.raises(GeometryError, match="E-SHAPE"):
        Volume(np.zeros((1, 2, 2, 2)), Geometry.from_spacing((3, 2, 2), (1, 1, 1)))


def test_a_picture_has_two_axes_and_no_patient_orientation_to_turn():
    picture = Geometry.from_spacing((5, 6), (0.5, 0.5))
    assert picture.spacing_mm == (0.5, 0.5)
    assert Volume(np.zeros((3, 5, 6)), picture).oriented("RAS").array.shape == (3, 5, 6)


def test_a_picture_that_is_sheared_in_its_plane_is_covered_by_its_straightened_grid():
    affine = np.diag([1.0, 2.0, 1.0, 1.0])
    affine[0, 1] = 1.0
    sheared = Geometry((10, 12), affine)
    straight = sheared.straightened()
    assert not sheared.is_orthogonal
    assert straight.is_orthogonal
    assert straight.spatial_dims == 2
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in sheared.shape])).reshape(2, -1)
    world = affine[:2, :2] @ corners
    inside = np.linalg.solve(straight.affine[:2, :2], world - straight.affine[:2, 3:])
    assert (inside >= -0.5 - 1e-6).all()
    assert (inside <= np.array(straight.shape)[:, None] - 0.5 + 1e-6).all()


def test_the_thickness_axis_of_a_slice_of_a_tilted_scan_does_not_make_it_sheared():
    affine = np.eye(4)
    affine[:3, 2] = (0, 0.4, 2)
    assert Geometry((5, 6), affine).is_orthogonal
    assert not Geometry((5, 6, 7), affine).is_orthogonal


@pytest.mark.parametrize("row", [(0, 0.5, 0), (0, 0, 30)], ids=["tilted", "not at z = 0"])
def test_a_picture_that_two_coordinates_cannot_place_is_refused_rather_than_moved(row):
    affine = np.eye(4)
    affine[2, [0, 1, 3]] = row
    with pytest.raises(GeometryError, match=r"E-PLANE .*write \.nii\.gz"):
        Geometry((5, 6), affine).lps()


def test_grids_of_one_field_of_view_differ_in_their_voxels_alone():
    grid = oblique()
    assert grid.shares_field_of_view(grid.resampled((2, 2, 2)))
    assert not grid.shares_field_of_view(Geometry((*grid.shape[:2], grid.shape[2] - 1), grid.affine))
    assert not grid.shares_field_of_view(grid.oriented("RAS"))  # the same box, its axes turned
    assert not grid.shares_field_of_view(Geometry(grid.shape[:2], grid.affine))
