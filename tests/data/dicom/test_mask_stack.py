from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from medseg.data.dicom.folder import find_one
from medseg.data.dicom.mask_stack import read_mask_stack
from medseg.data.volume_io import read_volume
from medseg.errors import DataError

from ...dicom_files import make_enhanced, make_slice, save

COLUMNS, ROWS, SLICES = 7, 5, 12
VOXELS = np.random.default_rng(0).integers(0, 2, (COLUMNS, ROWS, SLICES)).astype(np.uint8)


def downward(number: int) -> str:
    return f"IM{SLICES - 1 - number}.dcm"


def write_series(folder: Path, name: Callable[[int], str] = downward, *, dz: float = 2.0) -> Path:
    """A series whose file names run downward along the slices; as text, 10 comes before 2."""
    for k in range(SLICES):
        save(make_slice(dz * k, np.full((ROWS, COLUMNS), 100 * k, np.uint16)), folder / name(k))
    return folder


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("scan") / "series")


def save_masks(folder: Path, voxels: np.ndarray = VOXELS, mode: str = "L") -> Path:
    """Pictures of the slices: mask_0 of the file IM0, which is the last slice, and so on."""
    folder.mkdir(exist_ok=True)
    for number in range(voxels.shape[2]):
        pixels = np.ascontiguousarray(voxels[:, :, voxels.shape[2] - 1 - number].T)  # (rows, columns)
        picture = Image.fromarray(pixels)
        if mode == "P":
            picture.putpalette([0, 0, 0, 255, 255, 255, 0, 255, 0] + [9] * 759)  # 1 looks white, 2 green
        elif mode != "L":
            picture = picture.convert(mode)
        picture.save(folder / f"mask_{number}.png")  # as text, 10 comes before 2
    return folder


def read(folder: Path, series: Path) -> np.ndarray:
    found = find_one(series)
    volume = read_mask_stack(folder, found)
    assert volume.geometry is found.grid
    return volume.array[0]


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA"])
def test_white_becomes_1_on_the_slice_whose_file_has_the_same_rank_by_name(
    series: Path, tmp_path: Path, mode: str
) -> None:
    array = read(save_masks(tmp_path / "masks", VOXELS * 255, mode), series)
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, VOXELS)


def test_other_files_in_the_folder_do_not_count(series: Path, tmp_path: Path) -> None:
    folder = save_masks(tmp_path / "masks", VOXELS * 255)
    (folder / "Thumbs.db").write_bytes(b"")
    (folder / "._mask_1.png").write_bytes(b"what a Mac leaves behind")
    np.testing.assert_array_equal(read(folder, series), VOXELS)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_several_values_are_kept(series: Path, tmp_path: Path, mode: str) -> None:
    several = VOXELS + (np.arange(ROWS) > 2)[:, None].astype(np.uint8)
    np.testing.assert_array_equal(read(save_masks(tmp_path / "masks", several, mode), series), several)
    if mode == "L":
        np.testing.assert_array_equal(read(save_masks(tmp_path / "masks", several * 100), series), several * 100)


def test_pictures_without_a_white_pixel_are_background(series: Path, tmp_path: Path) -> None:
    assert not read(save_masks(tmp_path / "masks", VOXELS * 0), series).any()


def test_another_number_of_pictures_is_refused(series: Path, tmp_path: Path) -> None:
    folder = save_masks(tmp_path / "masks")
    (folder / "mask_3.png").unlink()
    with pytest.raises(DataError, match=r"E-MASKS-COUNT .*masks: 11 PNG files for 12 slices"):
        read(folder, series)
    with pytest.raises(DataError, match=r"E-MASKS-COUNT .*0 PNG files"):
        read(tmp_path / "absent", series)


def test_a_picture_of_another_size_is_refused(series: Path, tmp_path: Path) -> None:
    folder = save_masks(tmp_path / "masks")
    Image.fromarray(np.zeros((COLUMNS, ROWS), np.uint8)).save(folder / "mask_3.png")  # turned
    with pytest.raises(DataError, match=r"E-MASKS-SIZE .*mask_3.png: 7 rows × 5 columns; the slices have 5 × 7"):
        read(folder, series)


@pytest.mark.parametrize("ignored", [255, 65535])
def test_white_beside_other_values_stays_the_value_it_is(series: Path, tmp_path: Path, ignored: int) -> None:
    """An ignore label of 255 must not become label 1 on the slices that hold nothing else."""
    mixed = VOXELS.astype(np.uint8 if ignored == 255 else np.uint16)
    mixed[..., 3:5] *= ignored
    np.testing.assert_array_equal(read(save_masks(tmp_path / "masks", mixed), series), mixed)


def test_gray_of_few_bits_holds_its_values(series: Path, tmp_path: Path) -> None:
    folder = save_masks(tmp_path / "masks")
    for path in folder.iterdir():
        path.write_bytes(in_four_bits(np.array(Image.open(path)) * 3))  # Pillow reads 51
    np.testing.assert_array_equal(read(folder, series), VOXELS * 3)


def in_four_bits(pixels: np.ndarray) -> bytes:
    """A gray PNG of 4 bits a pixel, which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows, columns = pixels.shape
    padded = np.pad(pixels, ((0, 0), (0, columns % 2)))
    packed = padded[:, ::2] << 4 | padded[:, 1::2]
    lines = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", columns, rows, 4, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "error_id"),
    [
        ("colours", "E-PICTURE-COLORS"),
        ("glass", "E-PICTURE-ALPHA"),
        ("turned", "E-PICTURE-ORIENTATION"),
        ("text", "E-PICTURE-UNREADABLE"),
        ("cut", "E-PICTURE-UNREADABLE"),
    ],
)
def test_what_is_no_label_picture_is_refused(series: Path, tmp_path: Path, kind: str, error_id: str) -> None:
    folder = save_masks(tmp_path / "masks")
    path = folder / "mask_3.png"
    pixels = np.random.default_rng(1).integers(0, 255, (ROWS, COLUMNS, 4)).astype(np.uint8)
    if kind == "colours":
        Image.fromarray(pixels[..., :3]).save(path)
    elif kind == "glass":
        pixels[..., :3] = 255
        Image.fromarray(pixels).save(path)
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 3
        Image.open(path).save(path, exif=exif)
    elif kind == "text":
        path.write_text("<html>404</html>")
    else:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=rf"({error_id}) .*mask_3.png"):
        read(folder, series)


def lacking(series: Path, target: Path, *names: str) -> Path:
    shutil.copytree(series, target)
    for name in names:
        (target / name).unlink()
    return target


ORGAN = np.zeros_like(VOXELS)
ORGAN[1:4, 2:4, 7] = 1


def test_masks_of_the_files_that_are_there_lie_on_their_slices(
    series: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gapped = lacking(series, tmp_path / "series", "IM7.dcm", "IM2.dcm")  # slices 4 and 9
    masks = save_masks(tmp_path / "masks", np.delete(ORGAN, (4, 9), axis=2) * 255)
    array = read(masks, gapped)
    np.testing.assert_array_equal(array, ORGAN)
    assert array.shape == read_volume(gapped, allow_missing_slices=True).array.shape[1:]
    assert "W-MASKS-SLICES" in caplog.text
    assert "lacks 2 of 12 slices; those have no mask" in caplog.text


@pytest.mark.parametrize("name", [downward, "a{:02}.dcm".format])
def test_masks_of_the_whole_series_fit_one_that_lacks_slices(
    tmp_path: Path, name: Callable[[int], str], caplog: pytest.LogCaptureFixture
) -> None:
    gapped = lacking(write_series(tmp_path / "whole", name), tmp_path / "gapped", name(4), name(9))
    masks = save_masks(tmp_path / "masks", (ORGAN if name is downward else ORGAN[..., ::-1]) * 255)
    np.testing.assert_array_equal(read(masks, gapped), ORGAN)
    assert "masks are paired with all slices in their order" in caplog.text


def test_masks_of_a_whole_series_are_refused_where_names_do_not_say_which_is_missing(tmp_path: Path) -> None:
    def shuffled(k: int) -> str:
        return f"{k * 5 % SLICES}.dcm"

    whole = write_series(tmp_path / "whole", shuffled)
    masks = save_masks(tmp_path / "masks")
    assert read(masks, whole).any()
    with pytest.raises(DataError, match=r"E-MASKS-ORDER .*masks: 12 PNG files, and 11 slices"):
        read(masks, lacking(whole, tmp_path / "gapped", shuffled(4)))


def test_another_number_than_files_or_slices_is_refused(series: Path, tmp_path: Path) -> None:
    gapped = lacking(series, tmp_path / "series", "IM7.dcm", "IM2.dcm")
    with pytest.raises(
        DataError, match=r"E-MASKS-COUNT .*11 PNG files for 10 slices, or for all 12 slices, 2 of which"
    ):
        read(save_masks(tmp_path / "masks", VOXELS[..., 1:]), gapped)


def test_masks_of_slices_at_irregular_distances_are_refused(tmp_path: Path) -> None:
    for k, z in enumerate([0, 2, 4, 6.7, 8, 10]):
        save(make_slice(z, np.zeros((ROWS, COLUMNS), np.uint16)), tmp_path / "series" / f"{k}.dcm")
    with pytest.raises(DataError, match=r"E-MASKS-SLICES .*irregular"):
        read(save_masks(tmp_path / "masks", VOXELS[..., :6]), tmp_path / "series")


def test_files_of_one_name_in_two_folders_have_no_order(tmp_path: Path) -> None:
    def in_two(k: int) -> str:
        return f"DIR{k // 6}/{k % 6}.dcm"

    masks = save_masks(tmp_path / "masks", VOXELS[..., ::-1])
    with pytest.raises(DataError, match=r"E-MASKS-ORDER .*DIR.*put the series into one folder"):
        read(masks, write_series(tmp_path / "twice", in_two))
    np.testing.assert_array_equal(
        read(masks, write_series(tmp_path / "once", lambda k: f"DIR{k // 6}/{k}.dcm")), VOXELS
    )
    by_folder = write_series(tmp_path / "alone", lambda k: f"DIR{k}/image.dcm")  # as text, DIR10 comes before DIR2
    np.testing.assert_array_equal(read(masks, by_folder), VOXELS)


def test_masks_of_a_multi_frame_file_go_by_its_frames(tmp_path: Path) -> None:
    pixels = np.zeros((SLICES, ROWS, COLUMNS), np.uint16)
    groups = [
        {"PlanePositionSequence": {"ImagePositionPatient": [0, 0, 22.0 - 2 * k]}} for k in range(SLICES)
    ]  # downward
    save(make_enhanced(pixels, groups), tmp_path / "series" / "all.dcm")
    np.testing.assert_array_equal(read(save_masks(tmp_path / "masks"), tmp_path / "series"), VOXELS)


@pytest.mark.real_data
def test_a_real_liver_lies_on_the_liver_of_its_series(data_dir: Path) -> None:
    folder = data_dir / "dicom_ct_liver"
    slices = {path: pydicom.dcmread(path) for path in (folder / "DICOM_anon").glob("*.dcm")}
    files = sorted(slices, key=lambda path: float(slices[path].ImagePositionPatient[2]))  # upward
    first = slices[files[0]]
    volume = read_mask_stack(folder / "Ground", find_one(folder / "DICOM_anon"))
    mask, grid = volume.array[0] > 0, volume.geometry

    pixels = np.stack([slices[path].pixel_array.T for path in files], axis=2)
    hounsfield = pixels * float(first.RescaleSlope) + float(first.RescaleIntercept)
    assert 120 < hounsfield[mask].mean() < 160  # a liver in the portal venous phase
    assert hounsfield[mask].std() < 0.75 * hounsfield[mask[:, :, ::-1]].std()  # upside down it is a mixture

    published = nib.load(data_dir / "liver_ct" / "labelsTr" / "chaos_ct_03.nii.gz")
    liver = np.asarray(published.dataobj) == 1
    volume_ml = np.count_nonzero(mask) * grid.voxel_ml
    their_volume_ml = np.count_nonzero(liver) * abs(np.linalg.det(published.affine)) / 1000
    assert volume_ml == pytest.approx(their_volume_ml, rel=0.02)
    centroid = grid.affine[:3] @ [*np.argwhere(mask).mean(axis=0), 1]
    their_centroid = published.affine[:3] @ [*np.argwhere(liver).mean(axis=0), 1]
    assert np.linalg.norm(centroid - their_centroid) < 1


@pytest.mark.real_data
def test_real_masks_of_a_whole_series_fit_it_when_slices_are_lost(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "dicom_ct_liver"
    files = sorted((folder / "DICOM_anon").glob("*.dcm"))
    (tmp_path / "series").mkdir()
    for n, file in enumerate(files):
        if n not in (20, 21, 40):
            (tmp_path / "series" / file.name).symlink_to(file)
    whole = read_mask_stack(folder / "Ground", find_one(folder / "DICOM_anon"))
    gapped = read_mask_stack(folder / "Ground", find_one(tmp_path / "series"))
    assert whole.geometry.matches(gapped.geometry)
    np.testing.assert_array_equal(gapped.array, whole.array)
