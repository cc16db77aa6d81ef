"""Pictures: against Pillow's own arrays; bad files as they come; what is written is what is read."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, PngImagePlugin

from medseg.data import picture
from medseg.data.picture import read_mask, read_picture, write_picture
from medseg.data.volume_io import read_geometry, read_label, read_volume, write_volume
from medseg.errors import DataError
from medseg.geometry import Geometry, Volume

Pixels = npt.NDArray[Any]
RANDOM = np.random.default_rng(0)
GRAY = RANDOM.integers(0, 256, (23, 31), dtype=np.uint8)  # 23 rows, 31 columns
RGB = RANDOM.integers(0, 256, (23, 31, 3), dtype=np.uint8)
MASK = RANDOM.integers(0, 4, (23, 31), dtype=np.uint8)


def saved(path: Path, pixels: Pixels, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def saved_values(path: Path) -> Pixels:
    """What an uncompressed TIFF of one strip stores, from its bytes."""
    with Image.open(path) as image:
        offset, bits = image.tag_v2[273][0], image.tag_v2[258][0]
        return np.frombuffer(path.read_bytes(), f"<u{bits // 8}", GRAY.size, offset).reshape(GRAY.shape)


def with_alpha(pixels: Pixels, alpha: Pixels | int) -> Pixels:
    return np.dstack([pixels, np.broadcast_to(np.uint8(alpha), pixels.shape[:2])])


def png(width: int, height: int, bits: int, color: int, rows: bytes) -> bytes:
    """A PNG by hand: `color` 0 gray, 2 RGB; `rows` with the filter byte in front of each."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def refused(path: Path, error_id: str, *, as_label: bool = False) -> None:
    with pytest.raises(DataError) as caught:
        (read_mask if as_label else read_picture)(path)
    assert caught.value.error_id == error_id, caught.value
    assert str(path) in str(caught.value)


# --- images


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_lowest_value_is_white_is_turned_round_in_8_and_in_16_bits(
    tmp_path: Path, dtype: type[np.unsignedinteger[Any]]
) -> None:
    largest = np.iinfo(dtype).max
    pixels = GRAY.astype(dtype) * (largest // 255)
    path = saved(tmp_path / "a.tif", pixels, tiffinfo={262: 0})
    np.testing.assert_array_equal(read_picture(path).array[0], (largest - saved_values(path)).T)
    white = np.where(MASK > 1, largest, 0).astype(dtype)
    mask = saved(tmp_path / "mask.tif", white, tiffinfo={262: 0})
    np.testing.assert_array_equal(read_mask(mask).array[0], (saved_values(mask) == 0).T)


def test_fractions_whose_lowest_is_white_are_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path / "a.tif", GRAY.astype(np.float32), tiffinfo={262: 0}), "E-PICTURE-MODE")


@pytest.mark.parametrize("suffix", ["png", "tif", "TIFF"])
def test_the_first_axis_runs_along_the_columns_and_the_second_down_the_rows(tmp_path: Path, suffix: str) -> None:
    volume = read_volume(saved(tmp_path / f"a.{suffix}", GRAY))
    assert volume.array.shape == (1, 31, 23) and volume.array.dtype == np.uint8
    assert all(volume.array[0, c, r] == GRAY[r, c] for r, c in np.ndindex(GRAY.shape))
    assert volume.geometry.matches(Geometry.from_spacing((31, 23), (1.0, 1.0)))


def test_colors_become_three_channels(tmp_path: Path) -> None:
    for path in (saved(tmp_path / "a.png", RGB), saved(tmp_path / "a.tif", RGB, compression="tiff_lzw")):
        np.testing.assert_array_equal(read_picture(path).array, RGB.transpose(2, 1, 0))


def test_a_jpeg_is_what_pillow_decodes(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpeg", RGB, quality=95)
    np.testing.assert_array_equal(read_volume(path).array, np.asarray(Image.open(path)).transpose(2, 1, 0))


@pytest.mark.parametrize("big_endian", [False, True])
def test_gray_of_16_bits_is_kept_whole(tmp_path: Path, big_endian: bool) -> None:
    deep = RANDOM.integers(0, 65_536, (5, 7), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png(7, 5, 16, 0, b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)))
    Image.frombytes("I;16B" if big_endian else "I;16", (7, 5), deep.astype(">u2" if big_endian else "<u2")).save(
        tmp_path / "a.tif"
    )
    for name in ("a.png", "a.tif"):
        array = read_picture(tmp_path / name).array
        assert array.dtype == np.uint16 and array.dtype.isnative
        np.testing.assert_array_equal(array[0], deep.T)


def test_a_tiff_of_floats_keeps_them(tmp_path: Path) -> None:
    values = RANDOM.normal(size=(5, 7)).astype(np.float32)
    np.testing.assert_array_equal(read_volume(saved(tmp_path / "a.tif", values)).array[0], values.T)


def test_a_picture_with_a_palette_becomes_rgb(tmp_path: Path) -> None:
    indexed = Image.fromarray(MASK).convert("P")
    indexed.putpalette([9, 8, 7, 255, 0, 0, 0, 255, 0, 1, 2, 3])
    indexed.save(tmp_path / "a.png")
    expected = np.array([[9, 8, 7], [255, 0, 0], [0, 255, 0], [1, 2, 3]], np.uint8)[MASK]
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png").array, expected.transpose(2, 1, 0))


@pytest.fixture
def unsaid() -> None:
    picture._say_alpha_is_dropped.cache_clear()


@pytest.mark.usefixtures("unsaid")
@pytest.mark.parametrize("alpha", [255, 0, 77])
def test_transparency_that_is_the_same_everywhere_is_dropped_and_said_once(
    tmp_path: Path, alpha: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="medseg"):
        for name in ("a.png", "b.png"):
            array = read_picture(saved(tmp_path / name, with_alpha(RGB, alpha))).array
            np.testing.assert_array_equal(array, RGB.transpose(2, 1, 0))
        gray = read_picture(saved(tmp_path / "c.png", with_alpha(GRAY[..., None], alpha)))
        np.testing.assert_array_equal(gray.array[0], GRAY.T)
    assert caplog.text.count("W-PICTURE-ALPHA") == 1


def test_transparency_that_varies_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path / "a.png", with_alpha(RGB, GRAY)), "E-PICTURE-ALPHA")
    refused(saved(tmp_path / "b.png", with_alpha(GRAY[..., None], GRAY)), "E-PICTURE-ALPHA")
    color = tuple(int(value) for value in RGB[0, 0])
    refused(saved(tmp_path / "c.png", RGB, transparency=color), "E-PICTURE-ALPHA")
    indexed = Image.fromarray(MASK).convert("P")
    indexed.save(tmp_path / "d.png", transparency=0)
    refused(tmp_path / "d.png", "E-PICTURE-ALPHA")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_that_is_to_be_turned_is_refused_rather_than_turned_or_not(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a.{suffix}", RGB, exif=exif)
    if orientation == 1:
        assert read_picture(path).array.shape == (3, 31, 23)
    else:
        refused(path, "E-PICTURE-ORIENTATION")


def test_colors_of_16_bits_are_refused_rather_than_cut_to_8(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1, 1, 16, 2, b"\0" + bytes(range(6))))
    refused(tmp_path / "a.png", "E-PICTURE-DEPTH")
    (tmp_path / "b.png").write_bytes(png(1, 1, 16, 4, b"\0" + bytes(range(4))))
    refused(tmp_path / "b.png", "E-PICTURE-DEPTH")


def test_cmyk_is_refused(tmp_path: Path) -> None:
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "a.jpg")
    refused(tmp_path / "a.jpg", "E-PICTURE-MODE")


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_several_pages_are_refused(tmp_path: Path, suffix: str) -> None:
    pages = [Image.fromarray(GRAY + np.uint8(n)) for n in range(3)]
    pages[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pages[1:])
    refused(tmp_path / f"a.{suffix}", "E-PICTURE-PAGES")
    with pytest.raises(DataError, match="holds 3 pages"):
        read_geometry(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("edge", [9_500, 20_000, 2_000_000])
def test_a_decompression_bomb_is_refused_before_it_unfolds(tmp_path: Path, edge: int) -> None:
    (tmp_path / "a.png").write_bytes(png(edge, edge, 8, 0, b"\0" * 1000))
    refused(tmp_path / "a.png", "E-PICTURE-SIZE")
    with pytest.raises(DataError, match="E-PICTURE-SIZE"):
        read_geometry(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["rgb.png", "gray.png", "deep.png", "q.jpg", "raw.tif", "lzw.tif", "zip.tif"])
def test_a_truncated_picture_is_never_read_as_something_else(tmp_path: Path, name: str) -> None:
    smooth = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8)
    pixels, options = {
        "rgb.png": (RGB, {}),
        "gray.png": (smooth, {}),
        "deep.png": (GRAY.astype(np.uint16) * 256, {}),
        "q.jpg": (np.dstack([smooth] * 3), {}),
        "raw.tif": (GRAY, {}),
        "lzw.tif": (RGB, {"compression": "tiff_lzw"}),
        "zip.tif": (smooth, {"compression": "tiff_adobe_deflate"}),
    }[name]
    path = saved(tmp_path / name, pixels, **options)
    whole, expected = path.read_bytes(), read_picture(path).array
    kept = 0
    for length in {*range(0, len(whole), max(1, len(whole) // 60)), *range(len(whole) - 30, len(whole))}:
        path.write_bytes(whole[:length])
        try:
            found = read_picture(path).array
        except DataError as error:
            assert error.error_id in ("E-PICTURE-UNREADABLE", "E-NIFTI-EMPTY"), error
        else:
            np.testing.assert_array_equal(found, expected)
            kept += 1
    assert kept < 15, "what was cut off cannot have been without meaning so often"


def test_a_damaged_png_is_never_read_as_something_else(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", RGB)
    whole, expected = path.read_bytes(), read_picture(path).array
    for place in RANDOM.integers(0, len(whole), 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            np.testing.assert_array_equal(read_picture(path).array, expected)
        except DataError as error:
            assert error.error_id == "E-PICTURE-UNREADABLE", error


def test_other_files_are_refused_whatever_their_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<html>not found</html>")
    refused(tmp_path / "a.png", "E-PICTURE-UNREADABLE")
    Image.fromarray(GRAY).save(tmp_path / "b.gif")
    (tmp_path / "b.gif").rename(tmp_path / "b.png")
    refused(tmp_path / "b.png", "E-PICTURE-UNREADABLE")
    refused(tmp_path / "c.png", "E-FILE")
    (tmp_path / "d.png").mkdir()
    refused(tmp_path / "d.png", "E-FILE")


def test_a_spacing_is_taken_where_it_is_given(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", GRAY)
    assert read_volume(path, assume_spacing_mm=(0.5, 0.25)).geometry.spacing_mm == (0.5, 0.25)
    assert read_label(path, assume_spacing_mm=(0.5, 0.25)).geometry.spacing_mm == (0.5, 0.25)
    assert read_geometry(path, assume_spacing_mm=(0.5, 0.25)).spacing_mm == (0.5, 0.25)
    with pytest.raises(DataError, match="E-SPATIAL-DIMS"):
        read_volume(path, assume_spacing_mm=(1.0, 1.0, 1.0))


# --- label maps


@pytest.mark.parametrize("white", [255, 65_535])
def test_a_black_and_white_mask_becomes_0_and_1(tmp_path: Path, white: int) -> None:
    black_and_white = ((MASK > 0) * white).astype(np.uint8 if white == 255 else np.uint16)
    masks = [saved(tmp_path / "a.png", black_and_white), saved(tmp_path / "a.tif", black_and_white)]
    if white == 255:
        masks.append(saved(tmp_path / "rgb.png", np.dstack([black_and_white] * 3)))
        masks.append(saved(tmp_path / "rgba.png", np.dstack([*[black_and_white] * 3, np.full_like(MASK, 255)])))
        masks.append(saved(tmp_path / "bits.png", MASK > 0))
    for path in masks:
        label = read_label(path)
        assert label.array.dtype == np.uint8
        np.testing.assert_array_equal(label.array[0], (MASK > 0).T)


def test_a_mask_with_other_values_is_left_alone(tmp_path: Path) -> None:
    for pixels in (MASK, MASK * np.uint8(85), MASK.astype(np.uint16) * 300, MASK * np.uint8(0), MASK // 3):
        np.testing.assert_array_equal(read_label(saved(tmp_path / "a.png", pixels)).array[0], pixels.T)


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits_keep_their_values(tmp_path: Path, bits: int) -> None:
    rows = b"\0" + bytes([0b00011011]) if bits == 2 else b"\0" + bytes([0x01, 0x2F])
    (tmp_path / "a.png").write_bytes(png(4, 1, bits, 0, rows))
    assert read_mask(tmp_path / "a.png").array.ravel().tolist() == ([0, 1, 2, 3] if bits == 2 else [0, 1, 2, 15])


def test_indices_of_a_palette_are_labels_whatever_the_colors(tmp_path: Path) -> None:
    for values in (MASK, MASK // 2 * 255):
        indexed = Image.frombytes("P", MASK.shape[::-1], values.astype(np.uint8).tobytes())
        indexed.putpalette([n % 256 for n in range(300, 300 + 768)])
        indexed.save(tmp_path / "a.png", transparency=0)
        np.testing.assert_array_equal(read_label(tmp_path / "a.png").array[0], values.T)


def test_a_label_map_in_colors_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path / "a.png", RGB), "E-PICTURE-COLORS", as_label=True)


def test_a_label_map_as_jpeg_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", (MASK > 0) * np.uint8(255))
    refused(path, "E-PICTURE-LOSSY", as_label=True)
    path.rename(tmp_path / "b.png")
    refused(tmp_path / "b.png", "E-PICTURE-LOSSY", as_label=True)


# --- writing


def of(array: Pixels) -> Volume:
    return Volume(array, Geometry.from_spacing(array.shape[1:], (1.0, 1.0)))


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (255,), (0,), (0, 7, 255), (0, 256), (0, 65_535), (3, 40_000)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint16])
def test_a_written_label_map_is_read_as_it_was(tmp_path: Path, values: tuple[int, ...], dtype: type) -> None:
    if max(values) > np.iinfo(dtype).max:
        return
    label = of(RANDOM.choice(values, (1, 31, 23)).astype(dtype))
    write_volume(tmp_path / "a.png", label)
    found = read_label(tmp_path / "a.png")
    np.testing.assert_array_equal(found.array, label.array)
    assert found.geometry.matches(label.geometry)
    stored = np.asarray(Image.open(tmp_path / "a.png"))  # as any other program sees it
    np.testing.assert_array_equal(stored.T, label.array[0])
    assert stored.dtype == (np.uint8 if max(values) <= 255 else np.uint16)


def test_a_written_image_is_read_as_it_was(tmp_path: Path) -> None:
    for array in (RGB.transpose(2, 1, 0), GRAY.T[None], (GRAY.T[None] > 99)):
        write_volume(tmp_path / "a.png", of(array))
        np.testing.assert_array_equal(read_volume(tmp_path / "a.png").array, array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((1, 4, 5), np.float32),
        np.full((1, 4, 5), -1, np.int16),
        np.full((1, 4, 5), 65_536, np.int32),
        np.full((3, 4, 5), 256, np.int32),
        np.zeros((2, 4, 5), np.uint8),
        np.zeros((1, 4, 5, 6), np.uint8),
    ],
)
def test_what_a_png_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path, array: Pixels) -> None:
    volume = Volume(array, Geometry.from_spacing(array.shape[1:], [1.0] * (array.ndim - 1)))
    with pytest.raises(DataError, match="E-PICTURE-WRITE"):
        write_picture(tmp_path / "a.png", volume)
    assert list(tmp_path.iterdir()) == []


def test_only_png_is_written(tmp_path: Path) -> None:
    for suffix in ("jpg", "tif"):
        with pytest.raises(DataError, match="E-SUFFIX"):
            write_volume(tmp_path / f"a.{suffix}", of(GRAY.T[None]))


def test_a_text_of_another_program_does_not_make_a_mask_ours(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("medseg", "something else")
    stream = io.BytesIO()
    Image.fromarray((MASK > 0) * np.uint8(255)).save(stream, "PNG", pnginfo=text)
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    assert read_mask(tmp_path / "a.png").array.max() == 1


@pytest.mark.real_data
def test_real_pictures_and_masks_pair(data_dir: Path) -> None:
    for path in sorted((data_dir / "nuclei" / "images").iterdir())[::45]:
        image, label = read_volume(path), read_label(data_dir / "nuclei" / "masks" / path.name)
        np.testing.assert_array_equal(image.array, np.asarray(Image.open(path))[..., :3].transpose(2, 1, 0))
        assert image.geometry.matches(label.geometry)
        assert set(np.unique(label.array)) == {0, 1}
