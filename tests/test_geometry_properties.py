"""What holds for any grid: wherever its axes point, a voxel stays at its millimetres, on the way in and back.

Grids are drawn in all 48 orientations, right- and left-handed, straight, oblique and sheared, with axes
of a single voxel. Oracles are brute force in float64, nibabel and SimpleITK.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from medseg.data.resample import resample_image, resample_label
from medseg.data.transforms import OrientVolumed, geometry_of, meta_tensor, preprocess
from medseg.data.volume_io import read_geometry, read_volume, write_volume
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.model import Intensity, Preprocessing

from .inference.whole import restore

SIGNED_PERMUTATIONS = [
    np.eye(3)[:, order] * signs
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
ORIENTATIONS = [
    "".join(code) for codes in itertools.permutations(("LR", "PA", "IS")) for code in itertools.product(*codes)
]
MANY = settings(
    max_examples=200,
    derandomize=True,  # the same examples everywhere
    deadline=None,  # a busy machine is not a defect
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def grids(draw: st.DrawFn, kinds: str = "straight oblique sheared", sides: tuple[int, int] = (1, 6)) -> Geometry:
    """Any grid a scan may have: (I, J, K) voxels, spacings, orientation, handedness, turn and shear."""
    kind = draw(st.sampled_from(kinds.split()))
    shape = [draw(st.integers(*sides)) for _ in range(3)]
    spacing = [draw(st.floats(0.3, 5)) for _ in range(3)]
    axes = draw(st.sampled_from(SIGNED_PERMUTATIONS))
    if kind == "sheared":
        shear = np.eye(3)
        shear[np.triu_indices(3, 1)] = [draw(st.floats(-0.4, 0.4)) for _ in range(3)]
        assume(np.abs(shear - np.eye(3)).max() > 0.02)
        axes = axes @ shear
    if kind != "straight":
        axes = turned(*[draw(st.floats(-0.6, 0.6)) for _ in range(3)]) @ axes
    affine = np.eye(4)
    affine[:3, :3] = axes / np.linalg.norm(axes, axis=0) * spacing
    affine[:3, 3] = [draw(st.floats(-300, 300)) for _ in range(3)]
    return Geometry(tuple(shape), affine)


def turned(about_x: float, about_y: float, about_z: float) -> np.ndarray:
    """A rotation, by angles in radians."""
    turn = np.eye(3)
    for axis, angle in enumerate((about_x, about_y, about_z)):
        one, two = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[[one, two], [one, two]] = np.cos(angle)
        step[one, two], step[two, one] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    return turn


def voxels_of(grid: Geometry) -> np.ndarray:
    return np.indices(grid.shape).reshape(3, -1)


def millimetres(grid: Geometry, voxels: np.ndarray) -> np.ndarray:
    return grid.affine[:3, :3] @ voxels + grid.affine[:3, 3:]


def numbered(grid: Geometry, dtype: type = np.int16) -> Volume:
    """Each voxel holds a number of its own."""
    return Volume(np.arange(np.prod(grid.shape)).reshape(1, *grid.shape).astype(dtype), grid)


def check_same_places(array: np.ndarray, grid: Geometry, original: Volume) -> None:
    """Each voxel of `array` (I, J, K) holds what `original` holds at the same millimetres, and all are there."""
    assert array.shape == grid.shape
    assert array.size == original.array.size
    world = millimetres(grid, voxels_of(grid))
    at = np.linalg.solve(original.geometry.affine[:3, :3], world - original.geometry.affine[:3, 3:])
    nearest = np.rint(at).astype(int)
    np.testing.assert_allclose(millimetres(original.geometry, nearest), world, atol=1e-6)
    np.testing.assert_array_equal(array[tuple(voxels_of(grid))], original.array[0][tuple(nearest)])


def as_logits(label: np.ndarray, num_labels: int) -> torch.Tensor:
    """What a network that is sure of this label map (I, J, K) returns."""
    values = torch.arange(num_labels).view(-1, 1, 1, 1)
    return (torch.from_numpy(np.ascontiguousarray(label)).long()[None] == values).float()


def names(number: int) -> Labels:
    return Labels({value: f"label {value}" for value in range(number)})


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


@MANY
@given(grids(), st.sampled_from(ORIENTATIONS))
def test_turning_the_axes_leaves_every_voxel_at_its_millimetres(grid: Geometry, orientation: str) -> None:
    original = numbered(grid)
    view = original.oriented(orientation)
    check_same_places(view.array[0], view.geometry, original)
    by_transform = OrientVolumed(["image"], orientation)({"image": meta_tensor(original)})["image"]
    check_same_places(by_transform.numpy()[0], geometry_of(by_transform), original)
    assert geometry_of(by_transform).orientation == orientation


@MANY
@given(grids("straight oblique"))
def test_orientation_agrees_with_nibabel(grid: Geometry) -> None:
    original = numbered(grid)
    by_nibabel = nib.as_closest_canonical(nib.Nifti1Image(original.array[0], grid.affine))
    ours = original.oriented("RAS")
    np.testing.assert_array_equal(ours.array[0], by_nibabel.get_fdata())
    np.testing.assert_allclose(ours.geometry.affine, by_nibabel.affine, atol=1e-9)
    assert grid.orientation == "".join(nib.aff2axcodes(grid.affine))


@MANY
@given(grids(), st.sampled_from(ORIENTATIONS))
def test_there_and_back_every_voxel_is_itself_again(grid: Geometry, orientation: str) -> None:
    """A label a voxel, through the network's orientation and the way a prediction takes back: exact."""
    original = numbered(grid, np.uint8)
    oriented = OrientVolumed(["label"], orientation)({"label": meta_tensor(original)})["label"]
    number = max(2, original.array.size)
    restored, _ = restore(
        as_logits(oriented.numpy()[0], number),
        names(number),
        grid=geometry_of(oriented),
        source=grid,
        orientation=orientation,
    )
    assert restored.geometry is grid
    np.testing.assert_array_equal(restored.array, original.array)


@MANY
@given(grids("straight oblique"), st.sampled_from(ORIENTATIONS), st.booleans())
def test_a_label_map_at_its_own_spacing_returns_from_the_network_exactly(
    grid: Geometry, orientation: str, spacing_is_stated: bool
) -> None:
    """The functions that prediction uses, `preprocess` and `restore`, one the inverse of the other."""
    assume(np.prod(grid.shape) > 1)  # a single voxel shows nothing and is refused
    spacing_mm = grid.oriented(orientation).spacing_mm if spacing_is_stated else None
    label = Volume(numbered(grid).array.astype(np.uint8) % 4, grid)
    prepared = preprocess([numbered(grid)], label, preprocessing(orientation, spacing_mm))
    assert prepared.label is not None
    restored, _ = restore(
        as_logits(prepared.label[0], 4),
        names(4),
        grid=prepared.geometry,
        source=prepared.source,
        orientation=orientation,
    )
    np.testing.assert_array_equal(restored.array, label.array)
    np.testing.assert_array_equal(restored.geometry.affine, grid.affine)


def preprocessing(orientation: str, spacing_mm: tuple[float, ...] | None) -> Preprocessing:
    return Preprocessing(orientation=orientation, spacing_mm=spacing_mm, intensity=(Intensity(normalize="none"),))


def ellipsoid(grid: Geometry) -> np.ndarray:
    """As large as the field of view allows with two voxels to spare: its radii are (n / 2 - 2) voxels."""
    radii = np.array(grid.shape) / 2 - 2
    from_center = voxels_of(grid).T - (np.array(grid.shape) - 1) / 2
    return (((from_center / radii) ** 2).sum(1) < 1).reshape(grid.shape)


@MANY
@given(grids(sides=(16, 22)), st.sampled_from(ORIENTATIONS), st.lists(st.floats(0.5, 2), min_size=3, max_size=3))
def test_smooth_shapes_return_from_another_spacing_with_a_dice_of_at_least_85_hundredths(
    grid: Geometry, orientation: str, factors: list[float]
) -> None:
    """The bound for radii of six voxels and more, spacings of half to twice the scan's, and any shear drawn here.

    A network that is perfect on its own grid loses this much, along the whole surface a part of one of its
    voxels. Of 1,500 random draws the lowest was 0.876 (all axes at twice the spacing), the median 0.96. At the
    scan's own spacing or finer 0.99 holds, but for sheared scans (0.94), which are resampled twice.
    """
    assert dice_there_and_back(grid, orientation, factors) >= 0.85


@MANY
@given(
    grids("straight oblique", sides=(16, 22)),
    st.sampled_from(ORIENTATIONS),
    st.lists(st.floats(0.5, 1), min_size=3, max_size=3),
)
def test_smooth_shapes_return_from_a_finer_spacing_with_a_dice_of_at_least_99_hundredths(
    grid: Geometry, orientation: str, factors: list[float]
) -> None:
    assert dice_there_and_back(grid, orientation, factors) >= 0.99


def dice_there_and_back(grid: Geometry, orientation: str, factors: list[float]) -> float:
    """Of an ellipsoid that goes through the network's grid, its spacing `factors` times the scan's."""
    drawn = ellipsoid(grid)
    own = preprocessing(orientation, None).geometry(grid).spacing_mm
    spacing_mm = tuple(s * f for s, f in zip(own, factors, strict=True))
    label = Volume(drawn[None].astype(np.uint8), grid)
    prepared = preprocess([label], label, preprocessing(orientation, spacing_mm))
    assert prepared.label is not None
    logits = as_logits(prepared.label[0], 2)
    restored, _ = restore(logits, names(2), grid=prepared.geometry, source=prepared.source, orientation=orientation)
    return dice(restored.array[0] > 0, drawn)


@MANY
@given(grids(), st.lists(st.floats(0.3, 5), min_size=3, max_size=3))
def test_resampling_keeps_the_outer_faces_and_comes_as_close_to_the_spacing_as_whole_voxels_allow(
    grid: Geometry, spacing_mm: list[float]
) -> None:
    new = grid.resampled(spacing_mm)
    for corner in itertools.product((0, 1), repeat=3):  # which face along each axis
        here, there = (np.array(corner) * g.shape - 0.5 for g in (new, grid))
        np.testing.assert_allclose(millimetres(new, here[:, None]), millimetres(grid, there[:, None]), atol=1e-8)
    for old_n, new_n, old, wanted in zip(grid.shape, new.shape, grid.spacing_mm, spacing_mm, strict=True):
        assert abs(new_n - old_n * old / wanted) <= 0.5 + 1e-9 or new_n == 1
    assert grid.shares_field_of_view(new)
    moved = new.affine.copy()
    moved[:3, 3] += 0.01
    assert not grid.shares_field_of_view(Geometry(new.shape, moved))


@MANY
@given(grids(), st.lists(st.floats(0.3, 5), min_size=3, max_size=3))
def test_a_field_that_is_linear_in_millimetres_stays_that_field(grid: Geometry, spacing_mm: list[float]) -> None:
    """No interpolation may shift what it interpolates; between the scan's voxels, it is exact."""
    slope = np.array([1.0, 2.0, -1.0])
    image = (slope @ millimetres(grid, voxels_of(grid))).reshape(1, *grid.shape).astype(np.float32)
    for target in (grid.resampled(spacing_mm), preprocessing("RAS", tuple(spacing_mm)).geometry(grid)):
        result = resample_image(torch.from_numpy(image), grid, target).numpy()[0]
        world = millimetres(target, voxels_of(target))
        at = np.linalg.solve(grid.affine[:3, :3], world - grid.affine[:3, 3:])
        between = ((at >= 0) & (at <= np.array(grid.shape)[:, None] - 1)).all(0)
        np.testing.assert_allclose(result.ravel()[between], (slope @ world)[between], atol=0.01)


@MANY
@given(grids("sheared"))
def test_a_sheared_scan_lies_whole_within_its_straightened_grid(grid: Geometry) -> None:
    straight = grid.straightened()
    assert straight.is_orthogonal
    np.testing.assert_allclose(straight.spacing_mm, grid.spacing_mm)
    assert np.linalg.det(straight.affine) * np.linalg.det(grid.affine) > 0  # handedness stays
    corners = np.array(list(itertools.product(*[(-0.5, n - 0.5) for n in grid.shape]))).T
    at = np.linalg.solve(straight.affine[:3, :3], millimetres(grid, corners) - straight.affine[:3, 3:])
    low, high = at.min(1), at.max(1)
    assert (low >= -0.5 - 1e-5).all()
    assert (high <= np.array(straight.shape) - 0.5 + 1e-5).all()
    assert (np.array(straight.shape) < high - low + 1).all()  # and no voxel more than it needs


@MANY
@given(grids("sheared", sides=(3, 6)))
def test_no_label_at_the_rim_of_a_sheared_scan_is_lost(grid: Geometry) -> None:
    label = numbered(grid, np.uint8).array[0] % 2 + 1
    straight = resample_label(torch.from_numpy(label[None]), grid, grid.straightened())
    world = millimetres(grid.straightened(), voxels_of(grid.straightened()))
    at = np.linalg.solve(grid.affine[:3, :3], world - grid.affine[:3, 3:])
    within = ((at >= 0) & (at <= np.array(grid.shape)[:, None] - 1)).all(0)
    assert (straight.numpy().ravel()[within] > 0).all()


@MANY
@given(grids("straight oblique", sides=(2, 9)), st.sampled_from(ORIENTATIONS), st.sampled_from([0.5, 2.0, 4.0]))
@example(Geometry.from_spacing((21, 4, 4), (0.8, 1, 1)), "RAS", 2.0)  # 10.5 voxels, or a little more in float32
@example(Geometry((4, 5, 6), np.pad(turned(0, 0, np.pi / 4), (0, 1)) + np.diag([0, 0, 0, 1.0])), "RAS", 2.0)
def test_image_and_label_stay_on_one_grid_though_their_files_round_differently(
    grid: Geometry, orientation: str, factor: float
) -> None:
    """NIfTI keeps float32, NRRD all digits: what is decided by a hair must be decided for both at once."""
    rounded = Geometry(grid.shape, grid.affine.astype(np.float32))
    assume(grid.matches(rounded))
    spacing_mm = tuple(factor * s for s in grid.oriented(orientation).spacing_mm)
    label = numbered(grid).array % 3
    exact, other = (
        preprocess([numbered(grid)], Volume(label, g), preprocessing(orientation, spacing_mm)) for g in (grid, rounded)
    )
    assert exact.label is not None
    assert other.label is not None
    assert other.label.shape[1:] == other.image.shape[1:] == other.geometry.shape
    np.testing.assert_array_equal(other.label, exact.label)


@MANY
@given(grids())
def test_to_lps_and_back_is_the_same_grid_and_itk_agrees_where_it_lies(grid: Geometry) -> None:
    origin, spacing, direction = grid.lps()
    again = Geometry.from_lps(grid.shape, origin=origin, spacing=spacing, direction=direction)
    assert again.matches(grid, tolerance=1e-9)
    image = sitk.Image(list(grid.shape), sitk.sitkUInt8)
    image.SetOrigin(origin)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    check_itk_places(image, grid, atol=1e-9)


def check_itk_places(image: sitk.Image, grid: Geometry, *, atol: float) -> None:
    """ITK puts the corner voxels of its image where they are."""
    assert image.GetSize() == grid.shape
    for corner in itertools.product(*[(0, n - 1) for n in grid.shape]):
        left, posterior, superior = image.TransformIndexToPhysicalPoint(corner)
        found = (-left, -posterior, superior)
        np.testing.assert_allclose(found, millimetres(grid, np.array(corner)[:, None])[:, 0], atol=atol)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all examples: each overwrites the last one's files, which need not outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield tmp_path_factory.mktemp("properties")


@MANY
@given(grids(), st.sampled_from([".nii", ".nii.gz", ".nrrd", ".mha"]))
def test_a_written_file_holds_every_voxel_at_its_millimetres(folder: Path, grid: Geometry, suffix: str) -> None:
    # Each kind has a name of its own: asked for a.nii.gz beside an a.nii, ITK takes the voxels of a.nii
    original, path = numbered(grid), folder / f"a{suffix.replace('.', '_')}{suffix}"
    write_volume(path, original)
    read = read_volume(path)
    np.testing.assert_array_equal(read.array, original.array)
    assert read.geometry.matches(grid, tolerance=1e-4)  # NIfTI keeps seven digits of up to 300 mm
    if suffix.startswith(".nii"):
        by_nibabel = nib.load(path)
        np.testing.assert_array_equal(by_nibabel.get_fdata(), original.array[0])
        np.testing.assert_allclose(by_nibabel.affine, grid.affine, atol=1e-4)
        if by_nibabel.header["qform_code"]:  # other programs may prefer it to the sform
            np.testing.assert_allclose(by_nibabel.get_qform(), grid.affine, atol=1e-3)
    if suffix.startswith(".nii") and not grid.is_orthogonal:
        assert by_nibabel.header["qform_code"] == 0  # a quaternion would say something else
        with pytest.raises(RuntimeError, match="orthonormal"):
            sitk.ReadImage(str(path))  # ITK's reader refuses: loud, not wrong
        return
    by_itk = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(by_itk).transpose(), original.array[0])
    check_itk_places(by_itk, grid, atol=1e-2 if suffix.startswith(".nii") else 1e-6)


@MANY
@given(
    grids(),
    st.sampled_from([".nii", ".nii.gz"]),
    st.sampled_from(["sform", "qform", "both"]),
    st.sampled_from([np.uint8, np.int16, np.uint16, np.float32, np.float64]),
    st.sampled_from([None, (0.5, -1024.0), (2.0, 3.0)]),
)
def test_reading_gives_nibabels_values_at_nibabels_millimetres(
    folder: Path,
    grid: Geometry,
    suffix: str,
    forms: str,
    dtype: type,
    scaling: tuple[float, float] | None,
) -> None:
    assume(forms == "sform" or grid.is_orthogonal)  # a quaternion cannot say shear
    image = nib.Nifti1Image(numbered(grid, dtype).array[0], grid.affine)
    image.set_sform(grid.affine, code=0 if forms == "qform" else 1)
    image.set_qform(grid.affine, code=0 if forms == "sform" else 1, strip_shears=True)
    image.header.set_slope_inter(*(scaling or (1, 0)))
    path = folder / f"b{suffix}"
    image.to_filename(path)
    expected, read = nib.load(path), read_volume(path)
    np.testing.assert_allclose(read.array[0], expected.get_fdata(), rtol=1e-6)
    np.testing.assert_allclose(read.geometry.affine, expected.affine, atol=1e-9)
    np.testing.assert_array_equal(read_geometry(path).affine, read.geometry.affine)
