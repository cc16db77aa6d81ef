from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medseg.data.checks import check_label_values, check_not_constant, check_pair, value_ranges
from medseg.data.volume_io import read_geometry, read_label, read_volume, write_volume
from medseg.errors import DataError, GeometryError
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels

SHAPE = (7, 6, 5)
VOXELS = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)


def oblique() -> np.ndarray:
    """An LPS scan, turned by 20° about two axes, with a spacing of its own along each axis."""
    cos, sin = np.cos(np.radians(20)), np.sin(np.radians(20))
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.7, -0.8, 2.5])
    affine[:3, 3] = (120.5, 80.25, -333.125)
    return affine


SHEARED = np.array([[1, 0, 0, 5], [0, 1, 0.3, -7], [0, 0, 2, 9], [0, 0, 0, 1.0]])


def volume(voxels: np.ndarray = VOXELS, affine: np.ndarray | None = None) -> Volume:
    array = voxels[None] if voxels.ndim == 3 else voxels
    return Volume(array, Geometry(array.shape[1:], oblique() if affine is None else affine))


def save(path: Path, voxels: np.ndarray, *, slope: float = 1, inter: float = 0) -> Path:
    """A NIfTI file by nibabel, with this scaling."""
    image = nib.Nifti1Image(voxels, oblique())
    image.header.set_slope_inter(slope, inter)
    image.to_filename(path)
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "A.NII.GZ"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_writing_and_reading_keeps_voxels_type_and_grid(tmp_path: Path, name: str, dtype: type) -> None:
    written = volume(np.abs(VOXELS // 4).astype(dtype))
    write_volume(tmp_path / name, written)
    read = read_volume(tmp_path / name)
    assert read.array.dtype == dtype
    np.testing.assert_array_equal(read.array, written.array)
    # NIfTI keeps float32: 333.125 mm to 3e-5 mm
    np.testing.assert_allclose(read.geometry.affine, written.geometry.affine, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(read_geometry(tmp_path / name).affine, read.geometry.affine)
    assert read_geometry(tmp_path / name).shape == SHAPE


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_channels_and_axis_orders_survive(tmp_path: Path, name: str) -> None:
    array = np.random.default_rng(1).random((3, *SHAPE)).astype(np.float32)
    for given in (array, np.asfortranarray(array), array[:, ::-1].copy()[:, ::-1]):
        write_volume(tmp_path / name, volume(given))
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, array)
    assert read_geometry(tmp_path / name).shape == SHAPE


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_a_picture_keeps_its_two_axes(tmp_path: Path, name: str) -> None:
    picture = Volume(VOXELS[None, :, :, 0], Geometry.from_spacing((7, 6), (0.5, 0.75)))
    write_volume(tmp_path / name, picture)
    read = read_volume(tmp_path / name)
    np.testing.assert_array_equal(read.array, picture.array)
    assert read.geometry.spacing_mm == (0.5, 0.75)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nibabel_and_itk_see_what_was_written(tmp_path: Path, name: str) -> None:
    write_volume(tmp_path / name, volume())
    by_nibabel = nib.load(tmp_path / name)
    np.testing.assert_array_equal(np.asarray(by_nibabel.dataobj), VOXELS)
    np.testing.assert_allclose(by_nibabel.get_qform(), oblique(), atol=1e-4)
    np.testing.assert_allclose(by_nibabel.get_sform(), oblique(), atol=1e-4)
    assert by_nibabel.header["sform_code"] == by_nibabel.header["qform_code"] == 1
    by_itk = sitk.ReadImage(str(tmp_path / name))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(by_itk).transpose(), VOXELS)
    left, posterior, superior = by_itk.TransformIndexToPhysicalPoint((6, 5, 4))
    np.testing.assert_allclose((oblique() @ [6, 5, 4, 1])[:3], (-left, -posterior, superior), atol=1e-3)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_itk_formats_state_the_same_place_as_itk(tmp_path: Path, name: str) -> None:
    image = sitk.GetImageFromArray(VOXELS.transpose())
    image.SetDirection((oblique()[:3, :3] / [0.7, 0.8, 2.5]).ravel().tolist())
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((10.0, -20.0, 30.0))
    sitk.WriteImage(image, str(tmp_path / name))
    read = read_volume(tmp_path / name)
    np.testing.assert_array_equal(read.array[0], VOXELS)
    x, y, z = image.TransformIndexToPhysicalPoint((6, 5, 4))
    np.testing.assert_allclose((read.geometry.affine @ [6, 5, 4, 1])[:3], (-x, -y, z), atol=1e-6)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_a_sheared_grid_survives_and_nifti_leaves_the_qform_out(tmp_path: Path, name: str) -> None:
    write_volume(tmp_path / name, volume(affine=SHEARED))
    np.testing.assert_allclose(read_volume(tmp_path / name).geometry.affine, SHEARED, atol=1e-6)
    if name.endswith("gz"):
        assert nib.load(tmp_path / name).header["qform_code"] == 0


def test_booleans_and_half_floats_are_written_as_types_the_formats_know(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii.gz", volume(VOXELS > 0))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").array[0], (VOXELS > 0).astype(np.uint8))
    write_volume(tmp_path / "a.nii.gz", volume(VOXELS.astype(np.float16)))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").array[0], VOXELS.astype(np.float32))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_volume(tmp_path / name, volume())
    before = (tmp_path / name).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_volume(tmp_path / name, volume(VOXELS + 1))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before


def test_unknown_suffixes_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.img").touch()
    with pytest.raises(DataError, match=r"E-SUFFIX.*\.nii\.gz, \.nii, \.nrrd, \.mha, \.mhd"):
        read_volume(tmp_path / "a.img")
    with pytest.raises(DataError, match="E-SUFFIX"):
        write_volume(tmp_path / "a.mhd", volume())


def test_slope_and_intercept_are_applied_as_nibabel_does(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", VOXELS, slope=0.5, inter=-1024)
    read = read_volume(path)
    assert read.array.dtype == np.float32
    np.testing.assert_allclose(read.array[0], nib.load(path).get_fdata(), rtol=1e-6)


def test_four_dimensional_files_become_channels_or_the_selected_volume(tmp_path: Path) -> None:
    voxels = np.random.default_rng(2).integers(0, 100, (*SHAPE, 2)).astype(np.int16)
    path = save(tmp_path / "a.nii.gz", voxels)
    np.testing.assert_array_equal(read_volume(path).array, np.moveaxis(voxels, -1, 0))
    np.testing.assert_array_equal(read_volume(path, select_volume=1).array, voxels[None, ..., 1])
    with pytest.raises(DataError, match=r"E-SELECT-VOLUME.*0-1, not 2"):
        read_volume(path, select_volume=2)
    with pytest.raises(DataError, match="E-LABEL-CHANNELS"):
        read_label(path)


def test_four_dimensional_metaimages_become_channels(tmp_path: Path) -> None:
    voxels = np.random.default_rng(2).integers(0, 100, (2, *SHAPE)).astype(np.int16)
    image = sitk.GetImageFromArray(voxels.transpose(0, 3, 2, 1), isVector=False)
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.mha").array, voxels)


def test_a_few_nan_voxels_are_filled_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    voxels = np.random.default_rng(3).random((20, 20, 20)).astype(np.float32)
    voxels[0, 0, :3] = np.nan
    voxels[0, 1, 0] = -np.inf
    read = read_volume(save(tmp_path / "a.nii.gz", voxels))
    lowest = voxels[np.isfinite(voxels)].min()
    np.testing.assert_array_equal(read.array[0], np.where(np.isfinite(voxels), voxels, lowest))
    assert "W-NOT-FINITE" in caplog.text
    assert "4 voxels" in caplog.text


def test_many_nan_voxels_are_refused(tmp_path: Path) -> None:
    voxels = np.ones((20, 20, 20), np.float32)
    voxels[0, 0, :9] = np.nan
    with pytest.raises(DataError, match=r"E-NOT-FINITE.*9 of 8,000"):
        read_volume(save(tmp_path / "a.nii.gz", voxels))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [((0, 255), np.uint8), ((0, 256), np.int16), ((-1, 3), np.int16), ((0, 40000), np.int32)],
)
def test_labels_take_the_smallest_type_that_holds_them(tmp_path: Path, values: tuple[int, int], dtype: type) -> None:
    voxels = np.resize(values, SHAPE).astype(np.float32)
    read = read_label(save(tmp_path / "a.nii.gz", voxels))
    assert read.array.dtype == dtype
    np.testing.assert_array_equal(read.array[0], voxels)


def test_labels_that_are_all_but_integers_are_rounded_and_others_refused(tmp_path: Path) -> None:
    voxels = np.resize([0, 1, 2], SHAPE).astype(np.float32)
    read = read_label(save(tmp_path / "a.nii.gz", voxels + 5e-5))
    np.testing.assert_array_equal(read.array[0], voxels)
    voxels[0, 0, 0] = 0.5
    with pytest.raises(DataError, match=r"E-LABEL-VALUES.*1 voxels.*0\.5"):
        read_label(save(tmp_path / "a.nii.gz", voxels))
    voxels[0, 0, 0] = np.nan
    with pytest.raises(DataError, match=r"E-LABEL-VALUES.*nan"):
        read_label(save(tmp_path / "a.nii.gz", voxels))


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_damaged_itk_files_are_refused(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(4).integers(0, 999, SHAPE).astype(np.int16)
    write_volume(tmp_path / name, volume(noise))
    whole = (tmp_path / name).read_bytes()
    for content, error_id in ((whole[:-100], "E-UNREADABLE"), (b"<html>", "E-UNREADABLE"), (b"", "E-NIFTI-EMPTY")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=error_id):
            read_volume(tmp_path / name)


def test_hostile_and_complex_itk_files_are_refused(tmp_path: Path) -> None:
    header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 30000 30000 30000\nencoding: raw\nendian: little\n\n"
    (tmp_path / "bomb.nrrd").write_text(header)
    with pytest.raises(DataError, match="E-SIZE"):
        read_volume(tmp_path / "bomb.nrrd")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros(SHAPE, np.complex64)), str(tmp_path / "a.nrrd"))
    with pytest.raises(DataError, match="E-DTYPE"):
        read_volume(tmp_path / "a.nrrd")


def test_a_label_of_another_shape_is_refused_with_both_shapes() -> None:
    with pytest.raises(GeometryError, match=r"E-PAIR-SHAPE case_1: .*\(7, 6, 5\).*\(7, 6, 4\)"):
        check_pair(volume(), volume(VOXELS[..., 1:]), "case_1")


def test_a_label_elsewhere_is_refused_with_the_distance() -> None:
    moved = oblique()
    moved[:3, 3] += (0, 3, 4)
    check_pair(volume(), volume(affine=oblique() + 1e-4), "case_1")
    with pytest.raises(GeometryError, match=r"E-PAIR-AFFINE case_1: .* 5 mm"):
        check_pair(volume(), volume(affine=moved), "case_1")


def test_an_image_that_shows_nothing_is_refused() -> None:
    check_not_constant(value_ranges(volume()), "case_1", is_picture=False)
    with pytest.raises(DataError, match="E-CONSTANT case_1: every voxel of channel 1 is 3"):
        ranges = value_ranges(volume(np.stack([VOXELS, np.full(SHAPE, 3, np.int16)])))
        check_not_constant(ranges, "case_1", is_picture=False)


def test_undeclared_labels_are_refused_and_the_ignore_label_is_not() -> None:
    labels = Labels({0: "background", 1: "liver"}, ignore_label=255)
    check_label_values(np.array([0, 1, 255]), labels)
    with pytest.raises(DataError, match="E-LABEL-UNDECLARED case_1: holds label 2, 7, but declared are 0, 1, 255"):
        check_label_values(np.array([0, 2, 7, 255]), labels, "case_1")


REAL = ["hippocampus", "sarcoma_petct", "liver_lits11", "liver_ct", "totalseg_examples", "spleen_ct", "prostate_mha"]


@pytest.mark.real_data
@pytest.mark.parametrize("folder", REAL)
def test_real_scans_are_read_as_nibabel_and_itk_read_them(data_dir: Path, folder: str) -> None:
    files = sorted(f for s in ("nii.gz", "nii", "mha", "nrrd") for f in (data_dir / folder).rglob(f"*.{s}"))
    labels = [file for file in files if "labelsTr" in file.parts]
    chosen = [*files[:4], *labels[:3]]
    assert chosen
    for file in chosen:
        read = read_volume(file)
        if ".nii" in file.name:
            image = nib.load(file)
            expected, affine = image.get_fdata(dtype=np.float32), image.affine
            expected = np.moveaxis(expected, -1, 0) if expected.ndim == 4 else expected[None]
        else:
            by_itk = sitk.ReadImage(str(file))
            expected = sitk.GetArrayFromImage(by_itk).transpose()[None]
            affine = Geometry.from_lps(
                by_itk.GetSize(),
                origin=by_itk.GetOrigin(),
                spacing=by_itk.GetSpacing(),
                direction=by_itk.GetDirection(),
            ).affine
        np.testing.assert_allclose(read.array, expected, rtol=1e-6)
        np.testing.assert_allclose(read.geometry.affine, affine, atol=1e-5)


@pytest.mark.real_data
@pytest.mark.parametrize("case", ["hippocampus_003", "hippocampus_243"])
def test_real_labels_stored_as_floats_are_read_as_integers(data_dir: Path, case: str) -> None:
    file = data_dir / "hippocampus" / "labelsTr" / f"{case}.nii.gz"
    assert nib.load(file).get_data_dtype().kind == "f"
    label = read_label(file)
    assert label.array.dtype == np.uint8
    assert set(np.unique(label.array)) == {0, 1, 2}


@pytest.mark.real_data
def test_real_labels_with_a_qform_alone_fit_their_images(data_dir: Path) -> None:
    for file in sorted((data_dir / "sarcoma_petct" / "labelsTr").glob("*.nii.gz"))[:5]:
        assert nib.load(file).header["sform_code"] == 0
        check_pair(read_volume(file.parents[1] / "imagesTr" / file.name), read_label(file), file.name)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_voxels_of_a_compressed_metaimage_are_refused(tmp_path: Path, damage: str) -> None:
    """ITK says so on stderr at most, and returns noise."""
    path = tmp_path / "a.mha"
    noise = np.random.default_rng(0).normal(0, 100, (1, 30, 30, 30)).astype(np.int16)
    write_volume(path, Volume(noise, Geometry.from_spacing((30, 30, 30), (1, 1, 1))))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content if damage == "flip" else content[:-100])
    with pytest.raises(DataError, match="E-UNREADABLE"):
        read_volume(path)
