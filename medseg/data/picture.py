"""PNG, JPEG and TIFF pictures ↔ Volume (C, I, J).

Axis I runs along a row (x, to the right), J along a column (y, downwards): the pixel in row r and column
c is voxel (c, r). Pictures state no size in the patient, so a voxel is 1 × 1 mm unless the reader is told
otherwise. Gray becomes one channel, RGB three, in the file's own numbers: 8 bits, 16 bits, or what a TIFF has.

A label map's pixels are label values, with two exceptions: where there is only black and white (0 and 255, or
0 and 65535 in 16 bits) white is label 1, and of a picture with a palette the indices are the labels,
whatever the colors. What `write_picture` writes says in the file that its values are labels as they stand.

Refused (`DataError`) or mended (a warning on the logger ``medseg``):

===================== ==================================================================
E-PICTURE-UNREADABLE  damaged, truncated, or no PNG, JPEG or TIFF
E-PICTURE-SIZE        more than `MAX_PIXELS`; refused before memory is taken
E-PICTURE-PAGES       several pages or an animation
E-PICTURE-ORIENTATION EXIF says that the picture is to be turned: nobody knows whether the mask was drawn
                      on the turned one, so neither is assumed
E-PICTURE-ALPHA       transparency that differs from pixel to pixel: what it stands on is not known
E-PICTURE-DEPTH       colors of 16 bits, of which Pillow would keep 8
E-PICTURE-MODE        CMYK and other kinds of color; fractions of which the lowest is white
E-PICTURE-LOSSY       a label map as JPEG, which smears its values
E-PICTURE-COLORS      a label map in colors
E-PICTURE-WRITE       a volume, or numbers that a PNG cannot hold
W-PICTURE-ALPHA       the same transparency everywhere, dropped; said once
===================== ==================================================================
"""

from __future__ import annotations

import functools
import io
import logging
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, PngImagePlugin

from medseg.data.preflight import open_checked
from medseg.errors import DataError, GeometryError
from medseg.files import write_atomically
from medseg.geometry import Geometry, Volume

Pixels = npt.NDArray[Any]

MAX_PIXELS = 89_478_485
"""Largest picture that is read (Pillow's own limit); more is a damaged header or a decompression bomb."""

_FORMATS = ("PNG", "JPEG", "TIFF")
_GRAY = ("L", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_TURNED = range(2, 9)  # EXIF's eight orientations but the first, which is upright
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # of TIFF
_LABELS_MARK = ("medseg", "label values as stored")  # a text within a PNG

# What Pillow raises where a file is damaged; Python's own warnings are among them where they are made errors.
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, UserWarning)
_DAMAGED_DATA = (struct.error, zlib.error)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def read_picture(path: Path, *, spacing_mm: Sequence[float] | None = None) -> Volume:
    """Read a picture as an image.

    Args:
        path: A PNG, JPEG or TIFF file.
        spacing_mm: Pixel size along I and J; None: 1 mm.

    Returns:
        (1, I, J) for gray, also of one bit; (3, I, J) for RGB and for pictures with a palette.

    Raises:
        DataError: See the table above.
    """
    where = str(path)
    with _opened(path) as picture:
        _check_pixels(picture, where)
        if picture.mode in ("P", "PA"):
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        pixels = _without_alpha(picture, where)  # (rows, columns[, 3])
    return _volume(pixels, spacing_mm, where)


def read_mask(path: Path, *, spacing_mm: Sequence[float] | None = None) -> Volume:
    """Read a picture as a label map.

    Args:
        path: A PNG or TIFF file.
        spacing_mm: Pixel size along I and J; None: 1 mm.

    Returns:
        Label values (1, I, J); how pixels become labels is told above.

    Raises:
        DataError: See the table above.
    """
    where = str(path)
    with _opened(path) as picture:
        if picture.format not in ("PNG", "TIFF"):
            raise DataError(
                "E-PICTURE-LOSSY",
                "a JPEG does not keep label values; threshold it once, look at the result and save that as PNG",
                where=where,
            )
        depth = re.fullmatch(r"L;([24])\w*", _raw_mode(picture))
        _check_pixels(picture, where)
        is_marked = picture.info.get(_LABELS_MARK[0]) == _LABELS_MARK[1]
        as_stored = is_marked or picture.mode in ("1", "P", "PA")
        if picture.mode == "PA":
            picture = picture.getchannel("P")
        pixels = np.asarray(picture) if picture.mode == "P" else _without_alpha(picture, where)
    if pixels.ndim == 3:
        pixels = _gray_of(pixels, where)
    if not as_stored:
        pixels = _black_and_white(pixels, fill=255 // (2 ** int(depth[1]) - 1) if depth else 1)
    return _volume(pixels, spacing_mm, where)


def read_picture_geometry(path: Path, *, spacing_mm: Sequence[float] | None = None) -> Geometry:
    """The grid of a picture, from its header alone.

    Raises:
        DataError: As `read_picture`, for what a header can tell.
    """
    with _opened(path) as picture:
        return _geometry(picture.size, spacing_mm, str(path))


def write_picture(path: Path, volume: Volume) -> None:
    """Write a picture or a label map as PNG; only a complete file is ever visible.

    Spacing and position are lost, as pictures have none.

    Args:
        path: Name that ends in .png, in a folder that exists.
        volume: (1, I, J) of whole numbers from 0 to 65535, 8 bits where that is enough; or (3, I, J) of
            whole numbers from 0 to 255, RGB.

    Raises:
        DataError: If it is anything else.
    """
    array = volume.array
    if volume.geometry.spatial_dims != 2 or len(array) not in (1, 3) or array.dtype.kind not in "iu":
        raise _unwritable(path, f"{array.dtype} voxels {array.shape} are neither one picture nor one label map")
    low, high = int(array.min()), int(array.max())
    largest = 255 if len(array) == 3 else 65_535
    if low < 0 or high > largest:
        raise _unwritable(path, f"values reach from {low} to {high}, a PNG's from 0 to {largest}")
    pixels = array.astype(np.uint8 if high <= 255 else np.uint16).transpose()  # (J, I, C)
    text = PngImagePlugin.PngInfo()
    if len(array) == 1:
        pixels = pixels[..., 0]
        text.add_text(*_LABELS_MARK)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", pnginfo=text)
    write_atomically(path, stream.getvalue())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture whose header was checked; whatever Pillow raises within is the file's fault."""
    open_checked(path).close()
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise _too_large(path, f"{picture.width:,} × {picture.height:,} pixels")
            _check_pages(picture, str(path))
            yield picture
    except (DataError, GeometryError):
        raise
    except _TOO_LARGE as error:
        raise _too_large(path, str(error)) from None
    except (*_DAMAGED, *_DAMAGED_DATA) as error:
        raise DataError(
            "E-PICTURE-UNREADABLE",
            f"is not a whole PNG, JPEG or TIFF file ({error}); copy it again from its source",
            where=str(path),
        ) from None


def _check_pages(picture: Image.Image, where: str) -> None:
    # A JPEG's further frames are previews that cameras add; the first is the picture.
    pages = getattr(picture, "n_frames", 1) if picture.format in ("PNG", "TIFF") else 1
    if pages > 1:
        raise DataError(
            "E-PICTURE-PAGES",
            f"holds {pages} pages; expected one picture: save the page that is meant, or make the stack a "
            "NIfTI file with its spacing",
            where=where,
        )


def _check_pixels(picture: Image.Image, where: str) -> None:
    """Refuse what would be read as something else than it is, then read the pixels."""
    raw_mode = _raw_mode(picture)
    if picture.format == "PNG":  # of pixels, Pillow compares no checksum but when asked
        with Image.open(where, formats=("PNG",)) as again:
            again.verify()
    orientation = picture.getexif().get(ExifTags.Base.Orientation)
    if orientation in _TURNED:
        raise DataError(
            "E-PICTURE-ORIENTATION",
            f"EXIF orientation {orientation}: viewers turn the picture, its pixels lie otherwise. Save it upright "
            "(e.g. with `exiftran -a` or `mogrify -auto-orient`), and see that its mask fits",
            where=where,
        )
    if ";16" in raw_mode and not picture.mode.startswith("I"):
        raise DataError(
            "E-PICTURE-DEPTH",
            "colors, or gray with transparency, of 16 bits, of which 8 would be lost; save 8 bits, or one gray picture a channel",
            where=where,
        )
    if picture.mode not in (*_GRAY, "1", "P", "PA", "LA", "RGB", "RGBA"):
        raise DataError("E-PICTURE-MODE", f"{picture.mode} pixels; expected gray or RGB: convert it", where=where)
    if picture.mode == "F" and _white_is_zero(picture):
        raise DataError(
            "E-PICTURE-MODE", "fractions of which the lowest is white; save them with black the lowest", where=where
        )
    picture.load()


def _white_is_zero(picture: Image.Image) -> bool:
    """Whether a TIFF says that its lowest value is white; Pillow turns 8 bits round, but no others."""
    return getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _raw_mode(picture: Image.Image) -> str:
    """How the file stores its pixels, in Pillow's words; known until they are read."""
    tiles = getattr(picture, "tile", ())
    if not tiles:
        return ""
    arguments = tiles[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _without_alpha(picture: Image.Image, where: str) -> Pixels:
    """Pixels (rows, columns) or (rows, columns, 3)."""
    if picture.has_transparency_data and picture.mode in ("L", "RGB"):  # one color declared transparent
        picture = picture.convert({"L": "LA", "RGB": "RGBA"}[picture.mode])
    pixels: Pixels = np.asarray(picture)
    if picture.mode.startswith("I;16") and _white_is_zero(picture):
        pixels = 65_535 - pixels
    if picture.mode not in ("LA", "RGBA"):
        return pixels
    low, high = int(pixels[..., -1].min()), int(pixels[..., -1].max())
    if low != high:
        raise DataError(
            "E-PICTURE-ALPHA",
            f"transparency from {low} to {high}; what is behind it is not known: save the picture without",
            where=where,
        )
    _say_alpha_is_dropped()
    return pixels[..., 0] if picture.mode == "LA" else pixels[..., :3]


@functools.cache  # a data set of thousands of such pictures needs no thousand lines
def _say_alpha_is_dropped() -> None:
    logging.getLogger("medseg").warning(
        "W-PICTURE-ALPHA pictures with transparency, the same in all their pixels: it is dropped (said once)"
    )


def _gray_of(pixels: Pixels, where: str) -> Pixels:
    """The gray (rows, columns) of a label map stored as RGB."""
    if (pixels != pixels[..., :1]).any():
        raise DataError(
            "E-PICTURE-COLORS",
            "a label map in colors; expected one value a pixel: save it as gray, or with a palette whose indices "
            "are the labels",
            where=where,
        )
    return pixels[..., 0]


def _black_and_white(pixels: Pixels, *, fill: int) -> Pixels:
    """Black and white as 0 and 1, other values as they are.

    Args:
        pixels: As Pillow gives them.
        fill: What Pillow multiplied gray of 2 or 4 bits by.
    """
    white = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65_535}.get(pixels.dtype.newbyteorder("="))
    if white and np.isin(pixels, (0, white)).all():
        return (pixels == white).astype(np.uint8)
    return pixels // fill if fill > 1 else pixels


def _volume(pixels: Pixels, spacing_mm: Sequence[float] | None, where: str) -> Volume:
    rows, columns = pixels.shape[:2]
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8)
    array = (pixels[..., None] if pixels.ndim == 2 else pixels).transpose()  # (C, I, J)
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    return Volume(array, _geometry((columns, rows), spacing_mm, where))


def _geometry(shape: tuple[int, int], spacing_mm: Sequence[float] | None, where: str) -> Geometry:
    if spacing_mm is not None and len(spacing_mm) != 2:
        raise GeometryError(
            "E-SPATIAL-DIMS", f"spacing {list(spacing_mm)} for a picture; expected two numbers", where=where
        )
    return Geometry.from_spacing(shape, spacing_mm or (1.0, 1.0))


def _too_large(path: Path, found: str) -> DataError:
    return DataError(
        "E-PICTURE-SIZE",
        f"{found}, more than the {MAX_PIXELS:,} pixels that are read; the header is damaged, or cut it into tiles",
        where=str(path),
    )


def _unwritable(path: Path, found: str) -> DataError:
    return DataError("E-PICTURE-WRITE", f"{found}; write .nii.gz, .nrrd or .mha", where=str(path))
