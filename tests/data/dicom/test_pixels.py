from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from medseg.data.dicom.folder import find_series, read_dicom, read_series
from medseg.data.dicom.headers import read_frames
from medseg.data.dicom.pixels import read_frame, read_stack
from medseg.errors import DataError

Write = Callable[..., Path]

WITHOUT_SLOPE = {
    "CT": {"RescaleSlope": None},  # of the two that a CT is made with
    "MR": {"RescaleIntercept": -1024},
    "PT": {"RescaleIntercept": -1024},
}
STORED = np.random.default_rng(0).integers(0, 4000, (3, 4)).astype(np.uint16)


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    """One slice (J, I) and the ids of what was noted."""
    frames = read_frames(path)
    assert not isinstance(frames, str)
    voxels, notes = read_stack(frames)
    return voxels[0], [note.split()[0] for note in notes]


def rewrite(path: Path, change: Callable[[Dataset], object]) -> Path:
    file = pydicom.dcmread(path)
    change(file)
    file.save_as(path)
    return path


def compress(path: Path, syntax: UID, stream: bytes) -> Path:
    """Put a compressed stream in the place of the pixels."""

    def change(file: Dataset) -> None:
        file.file_meta.TransferSyntaxUID = syntax
        file.PixelData = encapsulate([stream])
        file["PixelData"].is_undefined_length = True

    return rewrite(path, change)


def jpeg2000(stored: np.ndarray) -> bytes:
    """By Pillow, losslessly."""
    stream = io.BytesIO()
    Image.fromarray(stored).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
    return stream.getvalue()


def test_integers_that_fit_stay_int16_and_others_become_float32(write_slice: Write) -> None:
    voxels, notes = read(write_slice("a", 0, STORED, RescaleSlope=2, RescaleIntercept=-1000))
    assert (voxels.dtype, notes) == (np.int16, [])
    np.testing.assert_array_equal(voxels, STORED.astype(int) * 2 - 1000)
    voxels, _ = read(write_slice("b", 0, STORED, RescaleSlope=0.5, RescaleIntercept=0))
    assert voxels.dtype == np.float32
    np.testing.assert_array_equal(voxels, STORED * np.float32(0.5))
    voxels, _ = read(write_slice("c", 0, STORED + np.uint16(60000)))
    assert voxels.dtype == np.float32
    np.testing.assert_array_equal(voxels, STORED.astype(int) + 60000)


def test_each_slice_has_its_own_rescale(tmp_path: Path, write_slice: Write) -> None:
    slopes = (1, 0.00004864194138, 3.7)
    for z, slope in enumerate(slopes):
        write_slice(f"{z}", 2 * z, STORED, modality="PT", RescaleSlope=slope, RescaleIntercept=0)
    volume = read_dicom(tmp_path)
    expected = np.stack([STORED.T.astype(np.float64) * slope for slope in slopes], axis=-1)
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array[0], expected, rtol=1e-7)


def test_a_ct_without_rescale_and_values_that_are_no_hounsfield_units_are_noted(write_slice: Write) -> None:
    none = {"RescaleSlope": None, "RescaleIntercept": None}
    signed = (STORED.astype(np.int16) - 1024).astype(np.int16)
    assert read(write_slice("a", 0, STORED, modality="CT"))[1] == []
    assert read(write_slice("b", 0, signed, modality="CT", **none))[1] == ["W-DICOM-RESCALE"]
    assert read(write_slice("c", 0, STORED, modality="CT", **none))[1] == ["W-DICOM-RESCALE", "W-DICOM-HU"]
    wrong_sign = signed.view(np.uint16)
    assert read(write_slice("d", 0, wrong_sign, modality="CT", RescaleIntercept=0))[1] == ["W-DICOM-HU"]
    assert read(write_slice("e", 0, STORED, modality="CT", RescaleSlope=0))[1] == ["W-DICOM-RESCALE", "W-DICOM-HU"]


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_an_intercept_without_a_slope_counts_and_is_told(write_slice: Write, modality: str) -> None:
    voxels, notes = read(write_slice("a", 0, STORED, modality=modality, **WITHOUT_SLOPE[modality]))
    np.testing.assert_array_equal(voxels, STORED.astype(int) - 1024)
    assert notes == ["W-DICOM-RESCALE"]


def test_monochrome1_is_turned_round_but_hounsfield_units_and_uptake_are_not(write_slice: Write) -> None:
    inverse = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    voxels, notes = read(write_slice("a", 0, STORED, **inverse))
    assert notes == ["W-DICOM-INVERTED"]
    np.testing.assert_array_equal(voxels, 4095 - STORED.astype(int))
    for modality in ("CT", "PT"):
        values = {"RescaleSlope": 1, "RescaleIntercept": -1024}
        voxels, notes = read(write_slice(modality, 0, STORED, modality=modality, **inverse, **values))
        assert notes == []
        np.testing.assert_array_equal(voxels, STORED.astype(int) - 1024)


def test_bits_that_are_not_stored_count_for_nothing(write_slice: Write) -> None:
    overlay = STORED | np.uint16(0xA000)
    voxels, _ = read(write_slice("a", 0, overlay, BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(voxels, STORED)
    voxels, _ = read(write_slice("b", 0, STORED << np.uint16(4), BitsStored=12, HighBit=15))
    np.testing.assert_array_equal(voxels, STORED)
    signed = (STORED.astype(np.int16) - 2000).astype(np.int16)
    twelve = signed.view(np.uint16) & np.uint16(0x0FFF)  # the sign stands in bit 11
    voxels, _ = read(write_slice("c", 0, twelve, BitsStored=12, HighBit=11, PixelRepresentation=1))
    np.testing.assert_array_equal(voxels, signed)


def test_8_and_32_bit_pixels_are_read(write_slice: Write) -> None:
    voxels, _ = read(write_slice("a", 0, STORED.astype(np.uint8)))
    np.testing.assert_array_equal(voxels, STORED.astype(np.uint8))
    voxels, _ = read(write_slice("b", 0, STORED.astype(np.int32) - 100_000))
    np.testing.assert_array_equal(voxels, STORED.astype(np.int32) - 100_000)


def test_big_endian_and_deflated_files_are_read(tmp_path: Path, write_slice: Write) -> None:
    path = write_slice("big", 0, STORED)
    file = pydicom.dcmread(path)
    file.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    file.PixelData = STORED.astype(">u2").tobytes()
    pydicom.dcmwrite(path, file, implicit_vr=False, little_endian=False)
    np.testing.assert_array_equal(read(path)[0], STORED)
    path = write_slice("deflated", 0, STORED)
    rewrite(path, lambda file: setattr(file.file_meta, "TransferSyntaxUID", UID("1.2.840.10008.1.2.1.99")))
    np.testing.assert_array_equal(read(path)[0], STORED)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 30])
    assert read_frames(path) == "damaged DICOM (error)"  # zlib's


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
@pytest.mark.parametrize("signed", [False, True])
def test_what_pydicom_compressed_is_read_exactly(write_slice: Write, syntax: UID, signed: bool) -> None:
    smooth = np.add.outer(
        np.arange(32), 7 * np.arange(40)
    )  # tiny noise grows when compressed, which the encoder refuses
    stored = (smooth - 150).astype(np.int16) if signed else smooth.astype(np.uint16)
    path = write_slice("a", 0, stored, RescaleSlope=3, RescaleIntercept=-7)
    rewrite(path, lambda file: file.compress(syntax))
    np.testing.assert_array_equal(read(path)[0], stored.astype(int) * 3 - 7)


def test_a_jpeg2000_stream_is_read_exactly_and_rescaled_once(write_slice: Write) -> None:
    stored = np.random.default_rng(2).integers(0, 4000, (32, 40)).astype(np.uint16)
    path = write_slice("a", 0, stored, RescaleSlope=2, RescaleIntercept=-1000)
    voxels, _ = read(compress(path, JPEG2000Lossless, jpeg2000(stored)))
    np.testing.assert_array_equal(voxels, stored.astype(int) * 2 - 1000)


def test_a_sign_that_the_stream_does_not_know_is_put_right(write_slice: Write) -> None:
    signed = np.random.default_rng(3).integers(-2000, 2000, (32, 40)).astype(np.int16)
    path = write_slice("a", 0, signed)
    voxels, _ = read(compress(path, JPEG2000Lossless, jpeg2000(signed.view(np.uint16))))
    np.testing.assert_array_equal(voxels, signed)


def test_a_compressed_stream_without_its_end_is_refused(write_slice: Write) -> None:
    stored = np.random.default_rng(2).integers(0, 4000, (32, 40)).astype(np.uint16)
    stream = jpeg2000(stored)
    path = compress(write_slice("a", 0, stored), JPEG2000Lossless, stream[: len(stream) // 2])
    with pytest.raises(DataError, match="E-DICOM-TRUNCATED"):
        read(path)


def test_a_file_cut_within_its_pixels_is_known_without_decoding(tmp_path: Path, write_slice: Write) -> None:
    stored = np.random.default_rng(2).integers(0, 4000, (32, 40)).astype(np.uint16)
    plain = write_slice("plain", 0, stored)
    packed = compress(write_slice("packed", 2, stored), JPEG2000Lossless, jpeg2000(stored))
    for path in (plain, packed):
        path.write_bytes(path.read_bytes()[:-300])
    for series in find_series(tmp_path).series:
        assert [problem.error_id for problem in series.problems] == ["E-DICOM-TRUNCATED"]
        with pytest.raises(DataError, match=r"E-DICOM-TRUNCATED .*and 1 more files"):
            read_series(series)


def test_nonsense_in_the_place_of_a_stream_is_refused_with_the_file(write_slice: Write) -> None:
    nonsense = np.random.default_rng(4).bytes(200) + b"\xff\xd9"
    for number, syntax in enumerate((JPEG2000Lossless, JPEGLSNearLossless, RLELossless)):
        path = compress(write_slice(f"{number}", 0, STORED), syntax, nonsense)
        with pytest.raises(DataError, match=rf"E-DICOM-PIXELS .*/{number}: pixels of frame 0"):
            read(path)


@pytest.mark.parametrize("syntax", [HTJ2KLossless, UID("1.2.840.10008.1.2.4.102"), UID("1.3.6.1.4.1.99.1")])
def test_an_unknown_compression_is_refused_by_its_name(tmp_path: Path, write_slice: Write, syntax: UID) -> None:
    compress(write_slice("a", 0, STORED), syntax, b"0" * 64)
    with pytest.raises(DataError, match=rf"E-DICOM-COMPRESSION .*{syntax}"):
        read_dicom(tmp_path)


def test_a_modality_table_takes_the_place_of_a_rescale(write_slice: Write) -> None:
    stored = np.arange(12, dtype=np.uint16).reshape(3, 4)
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [12, 0, 16], "US"
    table.LUTData = (np.arange(12, dtype=np.uint16) ** 2).tobytes()
    voxels, _ = read(write_slice("a", 0, stored, ModalityLUTSequence=[table]))
    np.testing.assert_array_equal(voxels, stored.astype(int) ** 2)


def test_zlib_names_its_error_as_the_test_above_expects() -> None:
    assert zlib.error.__name__ == "error"


@pytest.mark.real_data
@pytest.mark.parametrize(
    "name", ["compressed", "compressed_rle", "compressed_jpegls", "compressed_j2k", "compressed_jpeg"]
)
def test_every_compression_of_one_scan_gives_its_reference(data_dir: Path, name: str) -> None:
    import nibabel as nib

    folder = data_dir / "dicom_zoo" / "dicom2nifti" / "generic" / name
    image = nib.load(folder / "001_ground_truth.nii.gz")
    volume = read_dicom(folder / "001")
    to_ours = np.linalg.inv(volume.geometry.affine) @ image.affine
    index = to_ours[:3] @ np.vstack([np.indices(image.shape).reshape(3, -1), np.ones(np.prod(image.shape))])
    np.testing.assert_array_equal(volume.array[0][tuple(np.rint(index).astype(int))], np.asarray(image.dataobj).ravel())


@pytest.mark.real_data
def test_nine_encodings_of_one_picture_give_the_same_pixels(data_dir: Path) -> None:
    pictures = []
    for path in sorted((data_dir / "dicom_zoo" / "mr_mosaic_transfer_syntaxes").iterdir()):
        (frame,) = read_frames(path)  # a mosaic, but its pixels are there
        pictures.append(read_frame(frame))
    assert len(pictures) == 9
    for other in pictures[1:]:
        np.testing.assert_array_equal(pictures[0], other)


@pytest.mark.real_data
def test_frames_of_every_encoding_are_the_same(data_dir: Path) -> None:
    folder = data_dir / "dicom_zoo" / "pydicom_data"
    first = pydicom.dcmread(folder / "emri_small.dcm").pixel_array
    for kind in ("big_endian", "RLE", "jpeg_2k_lossless", "jpeg_ls_lossless"):
        ((frame,)) = read_frames(folder / f"emri_small_{kind}.dcm")
        np.testing.assert_array_equal(read_frame(frame), first[0])
