from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from medseg.data.dicom.mask_stack import read_mask_stack
from medseg.errors import DataError
from medseg.geometry import Geometry

COLUMNS, ROWS, SLICES = 7, 5, 12
GRID = Geometry.from_spacing((COLUMNS, ROWS, SLICES), (0.7, 0.7, 2.0))
FILES = [Path(f"series/IM{number}.dcm") for number in range(SLICES)][::-1]  # by name downward along K
VOXELS = np.random.default_rng(0).integers(0, 2, (COLUMNS, ROWS, SLICES)).astype(np.uint8)


def save(folder: Path, voxels: np.ndarray = VOXELS, mode: str = "L") -> Path:
    """Pictures of the slices: mask_0 of the file IM0, which is the last slice, and so on."""
    folder.mkdir(exist_ok=True)
    for number in range(voxels.shape[2]):
        pixels = np.ascontiguousarray(voxels[:, :, SLICES - 1 - number].T)  # (rows, columns)
        picture = Image.fromarray(pixels)
        if mode == "P":
            picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [9] * 759)
        elif mode != "L":
            picture = picture.convert(mode)
        picture.save(folder / f"mask_{number}.png")  # as text, 10 comes before 2
    return folder


def read(folder: Path) -> np.ndarray:
    volume = read_mask_stack(folder, FILES, grid=GRID)
    assert volume.geometry is GRID
    assert volume.array.dtype == np.uint8
    return volume.array[0]


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA"])
def test_white_becomes_1_on_the_slice_whose_file_has_the_same_rank_by_name(tmp_path: Path, mode: str) -> None:
    np.testing.assert_array_equal(read(save(tmp_path / "masks", VOXELS * 255, mode)), VOXELS)


def test_other_files_in_the_folder_do_not_count(tmp_path: Path) -> None:
    folder = save(tmp_path / "masks", VOXELS * 255)
    (folder / "Thumbs.db").write_bytes(b"")
    (folder / "._mask_1.png").write_bytes(b"what a Mac leaves behind")
    np.testing.assert_array_equal(read(folder), VOXELS)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_several_values_are_kept(tmp_path: Path, mode: str) -> None:
    several = VOXELS + (np.arange(ROWS) > 2)[:, None].astype(np.uint8)
    np.testing.assert_array_equal(read(save(tmp_path / "masks", several, mode)), several)
    if mode == "L":
        np.testing.assert_array_equal(read(save(tmp_path / "masks", several * 100)), several * 100)
        np.testing.assert_array_equal(read(save(tmp_path / "masks", np.where(several > 1, 255, several))).max(), 255)


def test_pictures_without_a_white_pixel_are_background(tmp_path: Path) -> None:
    assert not read(save(tmp_path / "masks", VOXELS * 0)).any()


def test_another_number_of_pictures_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "masks")
    (folder / "mask_3.png").unlink()
    with pytest.raises(DataError, match=r"E-MASKS-COUNT .*masks: 11 PNG files for 12 slices"):
        read(folder)
    with pytest.raises(DataError, match=r"E-MASKS-COUNT .*0 PNG files"):
        read(tmp_path / "absent")


def test_a_picture_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "masks")
    Image.fromarray(np.zeros((COLUMNS, ROWS), np.uint8)).save(folder / "mask_3.png")  # turned
    with pytest.raises(DataError, match=r"E-MASKS-SIZE .*mask_3.png: 7 rows × 5 columns; the slices have 5 × 7"):
        read(folder)


@pytest.mark.parametrize("kind", ["colours", "glass", "16 bit", "text", "cut"])
def test_what_is_no_label_picture_is_refused(tmp_path: Path, kind: str) -> None:
    folder = save(tmp_path / "masks")
    path = folder / "mask_3.png"
    pixels = np.random.default_rng(1).integers(0, 255, (ROWS, COLUMNS, 4)).astype(np.uint8)
    if kind == "colours":
        Image.fromarray(pixels[..., :3]).save(path)
    elif kind == "glass":
        pixels[..., :3] = 255
        Image.fromarray(pixels).save(path)
    elif kind == "16 bit":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 100).save(path)
    elif kind == "text":
        path.write_text("<html>404</html>")
    else:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"E-MASKS-PICTURE .*mask_3.png"):
        read(folder)


@pytest.mark.real_data
def test_a_real_liver_lies_on_the_liver_of_its_series(data_dir: Path) -> None:
    folder = data_dir / "dicom_ct_liver"
    slices = {path: pydicom.dcmread(path) for path in (folder / "DICOM_anon").glob("*.dcm")}
    files = sorted(slices, key=lambda path: float(slices[path].ImagePositionPatient[2]))  # upward
    first, second = slices[files[0]], slices[files[1]]
    step = np.subtract(second.ImagePositionPatient, first.ImagePositionPatient)
    assert first.ImageOrientationPatient == [1, 0, 0, 0, 1, 0]
    grid = Geometry.from_lps(
        (first.Columns, first.Rows, len(files)),
        origin=first.ImagePositionPatient,
        spacing=(*map(float, first.PixelSpacing), float(step[2])),
        direction=np.eye(3).ravel(),
    )
    mask = read_mask_stack(folder / "Ground", files, grid=grid).array[0] > 0

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
