"""The pixel bytes of a DICOM file: whether we can decode them, and whether they are all there."""

from __future__ import annotations

import os
from typing import BinaryIO, Literal

from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
"""Not compressed (deflate packs the whole file)."""

BY_PYDICOM = (RLELossless, JPEGLSLossless, JPEGLSNearLossless)
BY_GDCM = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1, JPEG2000Lossless, JPEG2000)
"""Which library decodes what: pydicom knows no lossless JPEG, and what it knows of the others depends on plugins;
SimpleITK brings GDCM, which decodes the whole family."""

END_OF_IMAGE = b"\xff\xd9"
"""Ends every stream of the JPEG family."""

_PIXELS = {bytes.fromhex(tag) for tag in ("e07f1000", "7fe00010")}
_FRAGMENT, _END_OF_FRAGMENTS = 0xFFFEE000, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF


def can_decode(syntax: UID) -> bool:
    """Whether pixels of a transfer syntax can be decoded here."""
    if syntax in BY_PYDICOM:
        return get_decoder(syntax).is_available  # JPEG-LS needs a package of its own
    return syntax in NATIVE or syntax in BY_GDCM


def missing_pixels(header: Dataset, file: BinaryIO) -> str | None:
    """What is missing of the pixels of a file, without decoding them.

    Args:
        header: Read from `file` up to the pixels.
        file: Stands where pydicom stopped.

    Returns:
        A description, or None if all bytes are there.
    """
    end = os.fstat(file.fileno()).st_size
    is_implicit, is_little = header.original_encoding
    tag = file.read(4)
    if tag not in _PIXELS:
        return "holds no pixels"
    order: Literal["little", "big"] = "little" if is_little else "big"
    if not is_implicit:
        file.seek(4, os.SEEK_CUR)  # value representation, and two bytes that mean nothing
    length = int.from_bytes(file.read(4), order)
    num_frames = int(header.get("NumberOfFrames") or 1)
    if length == _UNDEFINED:
        return _missing_fragments(file, end, num_frames)
    bits = int(header.get("BitsAllocated") or 16)
    expected = header.Rows * header.Columns * num_frames * int(header.get("SamplesPerPixel") or 1) * bits // 8
    there = min(length, end - file.tell())
    return f"{there:,} bytes of pixels; expected {expected:,}" if there < expected else None


def _missing_fragments(file: BinaryIO, end: int, num_frames: int) -> str | None:
    num_fragments = -1  # the first item is a table of offsets
    while True:
        item = file.read(8)
        tag = int.from_bytes(item[:2], "little") << 16 | int.from_bytes(item[2:4], "little")
        length = int.from_bytes(item[4:], "little")
        if tag == _END_OF_FRAGMENTS:
            break
        if tag != _FRAGMENT or len(item) < 8 or file.tell() + length > end:
            return "the compressed pixels end before their end mark"
        file.seek(length, os.SEEK_CUR)
        num_fragments += 1
    return f"{num_fragments} compressed frames; expected {num_frames}" if num_fragments < num_frames else None
