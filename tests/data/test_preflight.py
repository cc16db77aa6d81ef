"""Every kind of bad file, made for real."""

from __future__ import annotations

import gzip
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.data.headers import MAX_BYTES
from medseg.data.preflight import read_nifti, read_nifti_header
from medseg.data.volume_io import read_geometry, read_volume
from medseg.errors import DataError

SHAPE = (7, 6, 5)
VOXELS = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
PROMISED = 352 + VOXELS.nbytes

Edit = Callable[[nib.Nifti1Header], None]


def nifti(edit: Edit | None = None, voxels: np.ndarray = VOXELS, affine: np.ndarray | None = None) -> bytes:
    """A NIfTI file whose header was edited behind nibabel's back."""
    affine = np.diag([0.8, 0.8, 2.5, 1.0]) if affine is None else affine
    content = bytearray(nib.Nifti1Image(voxels, affine).to_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    header.set_sform(affine, code=1)
    if edit:
        edit(header)
    content[:348] = header.binaryblock
    return bytes(content)


def write(folder: Path, content: bytes, name: str = "scan.nii.gz") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def refusal(path: Path, **options: object) -> DataError:
    with pytest.raises(DataError) as caught:
        read_nifti(path, **options)  # type: ignore[arg-type]
    assert str(path) in str(caught.value)
    return caught.value


def test_a_sound_file_is_read_whole(tmp_path: Path) -> None:
    header, content = read_nifti(write(tmp_path, gzip.compress(nifti())))
    assert (header.shape, header.channels, header.scaling) == (SHAPE, 1, None)
    assert content.tobytes() == VOXELS.tobytes(order="F")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.nii.gz").error_id == "E-FILE"
    assert refusal(tmp_path).error_id == "E-FILE"


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, b"")).error_id == "E-NIFTI-EMPTY"


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("kept", [100, 352, 400, PROMISED - 1])
def test_a_truncated_file_is_refused_with_both_sizes(tmp_path: Path, name: str, kept: int) -> None:
    content = nifti()[:kept]
    error = refusal(write(tmp_path, gzip.compress(content) if name.endswith("gz") else content, name))
    assert error.error_id == "E-NIFTI-TRUNCATED"
    if kept >= 352:
        assert f"{PROMISED:,}" in error.message
        assert f"{kept:,}" in error.message


@pytest.mark.parametrize("lost", [1, 8, 50, 200, 60_000])
def test_a_gzip_stream_that_breaks_off_is_refused_with_both_sizes(tmp_path: Path, lost: int) -> None:
    voxels = np.random.default_rng(0).integers(-1000, 1000, (40, 30, 50)).astype(np.int16)
    content = gzip.compress(nifti(voxels=voxels))[:-lost]
    error = refusal(write(tmp_path, content))
    assert error.error_id == "E-NIFTI-TRUNCATED"
    there = len(zlib.decompressobj(wbits=31).decompress(content))
    promised = 352 + voxels.nbytes
    found = f"got {there:,};" if there < promised else "the checksum behind them is missing;"
    assert f"expected {promised:,} bytes, {found}" in error.message


@pytest.mark.parametrize("lost", [1, 8, 50, 200])
def test_a_tiny_gzip_stream_that_breaks_off_is_refused(tmp_path: Path, lost: int) -> None:
    assert refusal(write(tmp_path, gzip.compress(nifti())[:-lost])).error_id == "E-NIFTI-TRUNCATED"


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(nifti()))
    content[-8] ^= 1
    error = refusal(write(tmp_path, bytes(content)))
    assert error.error_id == "E-NIFTI-CRC"
    assert "copy the file again" in error.message


def test_no_flipped_bit_in_the_compressed_data_goes_unnoticed(tmp_path: Path) -> None:
    sound = gzip.compress(nifti(), mtime=0)
    for position in range(10, len(sound), 7):  # the first ten bytes are gzip's own header
        content = bytearray(sound)
        content[position] ^= 16
        refusal(write(tmp_path, bytes(content)))


def test_an_uncompressed_file_called_gz_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, content = read_nifti(write(tmp_path, nifti()))
    assert content.tobytes() == VOXELS.tobytes(order="F")
    assert "W-NIFTI-SUFFIX" in caplog.text


def test_a_compressed_file_called_nii_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, content = read_nifti(write(tmp_path, gzip.compress(nifti()), "scan.nii"))
    assert content.tobytes() == VOXELS.tobytes(order="F")
    assert "W-NIFTI-SUFFIX" in caplog.text


def test_a_web_page_is_refused_and_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in (b"<!DOCTYPE html><html>Please log in</html>", gzip.compress(b"<!DOCTYPE html><html></html>")):
        error = refusal(write(tmp_path, content))
        assert error.error_id == "E-NIFTI-MAGIC"
        assert "<!DOCTYPE html>" in error.message
    assert not caplog.messages  # that it is not compressed, contrary to its name, would be no comfort


def test_an_analyze_file_is_refused_for_it_knows_no_orientation(tmp_path: Path) -> None:
    def analyze(header: nib.Nifti1Header) -> None:
        header["magic"] = b""

    assert refusal(write(tmp_path, nifti(analyze), "scan.nii")).error_id == "E-NIFTI-MAGIC"


def test_bytes_behind_the_voxels_are_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, content = read_nifti(write(tmp_path, gzip.compress(nifti() + bytes(10))))
    assert content.tobytes() == VOXELS.tobytes(order="F")
    assert "W-NIFTI-TRAILING" in caplog.text


def dims(*values: int) -> Edit:
    def edit(header: nib.Nifti1Header) -> None:
        header["dim"] = [len(values), *values, *[1] * (7 - len(values))]

    return edit


def test_a_header_of_30000_cubed_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, gzip.compress(nifti(dims(30000, 30000, 30000)))))
    assert error.error_id == "E-SIZE"


def test_a_size_the_compressed_file_cannot_hold_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    big = (2000, 1500, 1000)
    assert 2 * np.prod(big) < MAX_BYTES
    error = refusal(write(tmp_path, gzip.compress(nifti(dims(*big)))))
    assert error.error_id == "E-NIFTI-TRUNCATED"
    assert "cannot hold" in error.message


@pytest.mark.parametrize("shape", [(0, 6, 5), (7, 6, 0), (7, -6, 5), (7, 6, 5, 0)])
def test_an_axis_without_voxels_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert refusal(write(tmp_path, gzip.compress(nifti(dims(*shape))))).error_id == "E-DIMS"


def test_two_axes_behind_space_are_refused(tmp_path: Path) -> None:
    voxels = np.zeros((3, 3, 3, 2, 2), np.int16)
    assert refusal(write(tmp_path, gzip.compress(nifti(voxels=voxels)))).error_id == "E-DIMS"


def test_a_time_axis_of_one_is_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    volume = read_volume(write(tmp_path, gzip.compress(nifti(voxels=VOXELS[..., None]))))
    np.testing.assert_array_equal(volume.array[0], VOXELS)
    assert "W-NIFTI-TIME" in caplog.text


@pytest.mark.parametrize(
    "voxels",
    [np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), np.zeros(SHAPE, np.complex64)],
    ids=["RGB", "complex"],
)
def test_voxels_that_are_not_one_number_are_refused(tmp_path: Path, voxels: np.ndarray) -> None:
    assert refusal(write(tmp_path, gzip.compress(nifti(voxels=voxels)))).error_id == "E-DTYPE"


def test_an_unknown_data_type_is_refused(tmp_path: Path) -> None:
    def unknown(header: nib.Nifti1Header) -> None:
        header["datatype"] = 777

    assert refusal(write(tmp_path, gzip.compress(nifti(unknown)))).error_id == "E-NIFTI-HEADER"


@pytest.mark.parametrize("offset", [0, 100, 352.5, np.nan, 1e12])
def test_an_impossible_offset_is_refused(tmp_path: Path, offset: float) -> None:
    def edit(header: nib.Nifti1Header) -> None:
        header["vox_offset"] = offset

    assert refusal(write(tmp_path, gzip.compress(nifti(edit)))).error_id == "E-NIFTI-HEADER"


@pytest.mark.parametrize("slope", [0, np.nan, np.inf])
def test_a_slope_of_nothing_means_values_as_stored(
    tmp_path: Path, slope: float, caplog: pytest.LogCaptureFixture
) -> None:
    def edit(header: nib.Nifti1Header) -> None:
        header["scl_slope"] = slope

    volume = read_volume(write(tmp_path, gzip.compress(nifti(edit))))
    np.testing.assert_array_equal(volume.array[0], VOXELS)
    assert "W-NIFTI-SLOPE" in caplog.text


def without_forms(header: nib.Nifti1Header) -> None:
    header["sform_code"] = header["qform_code"] = 0


def test_a_file_without_orientation_is_refused_unless_a_spacing_is_assumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, gzip.compress(nifti(without_forms)))
    error = refusal(path)
    assert error.error_id == "E-NO-GEOMETRY"
    assert "0.8, 0.8, 2.5" in error.message
    assert read_geometry(path, assume_spacing_mm=(1, 2, 3)).spacing_mm == (1, 2, 3)
    assert "W-ASSUMED-SPACING" in caplog.text


def test_an_assumed_spacing_does_not_overrule_a_stated_one(tmp_path: Path) -> None:
    header = read_nifti_header(write(tmp_path, gzip.compress(nifti())), assume_spacing_mm=(1, 2, 3))
    np.testing.assert_allclose(header.geometry.spacing_mm, (0.8, 0.8, 2.5), atol=1e-6)


def test_the_sform_counts_where_the_qform_disagrees_and_the_distance_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def move(header: nib.Nifti1Header) -> None:
        moved = np.diag([0.8, 0.8, 2.5, 1.0])
        moved[:3, 3] = (3, 0, 4)  # 5 mm away
        header.set_qform(moved, code=1)

    geometry = read_geometry(write(tmp_path, gzip.compress(nifti(move))))
    np.testing.assert_allclose(geometry.affine, np.diag([0.8, 0.8, 2.5, 1.0]), atol=1e-6)
    assert "W-NIFTI-FORMS" in caplog.text
    assert "5.00 mm" in caplog.text


def test_forms_that_agree_raise_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    affine = np.array([[-0.7, 0.1, 0.2, 120], [0.1, -0.69, 0.3, 90], [0.05, 0.07, 2.4, -300], [0, 0, 0, 1.0]])
    u, _, vt = np.linalg.svd(affine[:3, :3])
    affine[:3, :3] = u @ vt * [0.7, 0.7, 2.5]

    def both(header: nib.Nifti1Header) -> None:
        header.set_qform(affine, code=1)

    with caplog.at_level(logging.WARNING):
        read_geometry(write(tmp_path, gzip.compress(nifti(both, affine=affine))))
    assert not caplog.records


def sform(matrix: np.ndarray) -> Edit:
    def edit(header: nib.Nifti1Header) -> None:
        for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
            header[name] = matrix[row]

    return edit


@pytest.mark.parametrize("diagonal", [(np.nan, 1, 1), (0, 1, 1), (np.inf, 1, 1)])
def test_a_singular_or_nan_affine_is_refused(tmp_path: Path, diagonal: tuple[float, ...]) -> None:
    assert refusal(write(tmp_path, gzip.compress(nifti(sform(np.diag([*diagonal, 1.0])))))).error_id == "E-AFFINE"


def test_a_qform_that_is_no_rotation_is_refused(tmp_path: Path) -> None:
    def broken(header: nib.Nifti1Header) -> None:
        header["sform_code"], header["qform_code"] = 0, 1
        header["quatern_b"] = 2.0

    assert refusal(write(tmp_path, gzip.compress(nifti(broken)))).error_id == "E-AFFINE"


@pytest.mark.parametrize("spacing", [0.0008, 30.0, 800.0])
def test_a_spacing_no_scanner_makes_is_refused(tmp_path: Path, spacing: float) -> None:
    error = refusal(write(tmp_path, gzip.compress(nifti(sform(np.diag([spacing, 1, 1, 1]))))))
    assert error.error_id == "E-SPACING"
    assert f"{spacing:g}" in error.message


@pytest.mark.parametrize(("unit", "name"), [("meter", "metres"), ("micron", "micrometres")])
@pytest.mark.parametrize("spacing", [0.001, 0.5, 100])
def test_another_unit_than_the_millimetre_is_refused_whatever_the_spacing(
    tmp_path: Path, unit: str, name: str, spacing: float
) -> None:
    def spoil(header: nib.Nifti1Header) -> None:
        sform(np.diag([spacing, spacing, spacing, 1]))(header)
        header.set_xyzt_units(unit)

    error = refusal(write(tmp_path, gzip.compress(nifti(spoil))))
    assert error.error_id == "E-SPACING"
    assert f"({spacing:g}, {spacing:g}, {spacing:g}), and the header says {name}; expected mm" in error.message


def test_a_sheared_affine_is_kept_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sheared = np.array([[1, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    geometry = read_geometry(write(tmp_path, gzip.compress(nifti(sform(sheared)))))
    np.testing.assert_allclose(geometry.affine, sheared, atol=1e-6)
    assert "W-SHEARED" in caplog.text


def test_big_endian_and_nifti2_are_read(tmp_path: Path) -> None:
    affine = np.diag([0.8, 0.8, 2.5, 1.0])
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nib.Nifti1Image(VOXELS, affine, header=header).to_filename(tmp_path / "big.nii.gz")
    assert gzip.decompress((tmp_path / "big.nii.gz").read_bytes())[:4] == struct.pack(">i", 348)
    nib.Nifti2Image(VOXELS, affine).to_filename(tmp_path / "second.nii")
    for name in ("big.nii.gz", "second.nii"):
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.array[0], VOXELS)
        assert volume.array.dtype == np.dtype("=i2")
        np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-6)
