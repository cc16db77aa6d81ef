"""Checks a NIfTI file before anything else opens it, and reads it once while doing so.

Libraries let bad files through: some a truncated one, some one whose checksum is wrong. This module
refuses (`DataError`) or mends (a warning on the logger ``medseg``), and `headers` does so for what
the bytes mean:

===================== ==================================================================
E-FILE                missing, a folder, or not readable
E-NIFTI-EMPTY         no bytes
E-NIFTI-MAGIC         not NIfTI (the first bytes are shown)
E-NIFTI-TRUNCATED     fewer bytes than the header promises
E-NIFTI-CRC           damaged compressed data or a wrong checksum
W-NIFTI-SUFFIX        compressed or not, contrary to its name
W-NIFTI-TRAILING      more bytes than the header promises
===================== ==================================================================
"""

from __future__ import annotations

import gzip
import logging
from collections.abc import Sequence
from contextlib import suppress
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import igzip, isal_zlib

from medseg.data.headers import NiftiHeader, parse_nifti
from medseg.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_DEFLATE_RATIO = 1032  # no deflate stream expands further
_DAMAGED: tuple[Any, ...] = (gzip.BadGzipFile, isal_zlib.error)
_WITHOUT_END = "the checksum behind them is missing"
_CHUNK = 2**20  # larger ones leave the processor's cache
_SMALL_CHUNK = 2**16  # of compressed bytes, which may expand to a thousand times as many
_GZIP_WINDOW = 31  # zlib's way to ask for a gzip header and checksum

log = logging.getLogger("medseg")


def read_nifti_header(path: Path, *, assume_spacing_mm: Sequence[float] | None = None) -> NiftiHeader:
    """Check what can be checked without reading the voxels.

    Args:
        path: A .nii or .nii.gz file.
        assume_spacing_mm: Voxel size for a file that states none.

    Raises:
        DataError: See the table above; also `GeometryError`.
    """
    with open_checked(path) as file, _decompressed(file) as stream:
        return parse_nifti(_read_head(stream, path), path, assume_spacing_mm)


def read_nifti(
    path: Path, *, assume_spacing_mm: Sequence[float] | None = None
) -> tuple[NiftiHeader, npt.NDArray[np.uint8]]:
    """Read a file whole, checking header, size and checksum.

    Args:
        path: A .nii or .nii.gz file.
        assume_spacing_mm: Voxel size for a file that states none.

    Returns:
        The header, and the voxel bytes (writable, owned by nobody else).

    Raises:
        DataError: See the table above; also `GeometryError`.
    """
    with open_checked(path) as file, _decompressed(file) as stream:
        head = _read_head(stream, path)
        header = parse_nifti(head, path, assume_spacing_mm)
        promised, stored = header.offset + header.num_bytes, path.stat().st_size
        if promised > stored * (1 if stream is file else _MAX_DEFLATE_RATIO):  # known before memory is taken
            raise _truncated(path, promised, f"a file of {stored:,} bytes cannot hold them")
        extensions = np.empty(header.offset - len(head), np.uint8)
        _fill(stream, extensions, path, promised=promised)
        voxels = np.empty(header.num_bytes, np.uint8)
        _fill(stream, voxels, path, promised=promised)
        _read_rest(stream, path, promised)
    return header, voxels


def open_checked(path: Path) -> BufferedIOBase:
    """Open a file that exists, can be read and has content.

    Raises:
        DataError: If not.
    """
    try:
        if path.stat().st_size == 0 and path.is_file():
            raise DataError("E-NIFTI-EMPTY", "the file is empty; copy it again or remove the case", where=str(path))
        return path.open("rb")
    except OSError as error:
        raise DataError("E-FILE", f"cannot be read: {error.strerror}; check path and rights", where=str(path)) from None


def _decompressed(file: BufferedIOBase) -> BufferedIOBase:
    """The stream behind a file, by its first bytes: names lie."""
    compressed = file.read(2) == _GZIP_MAGIC
    file.seek(0)
    return igzip.IGzipFile(fileobj=file) if compressed else file


def _read_head(stream: BufferedIOBase, path: Path) -> bytes:
    """The bytes of the header, 348 (NIfTI-1) or 540 (NIfTI-2)."""
    start = np.zeros(4, np.uint8)
    _fill(stream, start, path, promised=352)
    stated = [int.from_bytes(start.tobytes(), "little"), int.from_bytes(start.tobytes(), "big")]
    size = next((n for n in (348, 540) if n in stated), 0)
    if not size:
        more = np.zeros(20, np.uint8)
        shown = start.tobytes() + more[: _read_some(stream, more, path)].tobytes()
        raise DataError(
            "E-NIFTI-MAGIC", f"is not NIfTI: it begins with {shown!r}; export the scan again", where=str(path)
        )
    rest = np.empty(size - 4, np.uint8)
    _fill(stream, rest, path, promised=size + 4)
    compressed = isinstance(stream, igzip.IGzipFile)
    if compressed != (path.suffix.lower() == ".gz"):  # told of what is NIfTI alone
        state = "compressed" if compressed else "not compressed"
        log.warning("W-NIFTI-SUFFIX %s: %s, contrary to its name; read as it is", path, state)
    return start.tobytes() + rest.tobytes()


def _fill(stream: BufferedIOBase, buffer: npt.NDArray[np.uint8], path: Path, *, promised: int) -> None:
    """Read until the buffer is full; `promised` (bytes) is for the message if it does not get full."""
    done = 0
    while done < buffer.size:
        count = _read_some(stream, buffer[done : done + _CHUNK], path)
        if not count:
            there = _num_there(path)
            raise _truncated(path, promised, f"got {there:,}" if there < promised else _WITHOUT_END)
        done += count


def _num_there(path: Path) -> int:
    """Bytes that a file holds, decompressed as far as it goes: the stream that broke off does not say."""
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP_MAGIC
        if not compressed:
            return path.stat().st_size
        file.seek(0)
        stream, count = isal_zlib.decompressobj(wbits=_GZIP_WINDOW), 0
        with suppress(EOFError, *_DAMAGED):
            while chunk := file.read(_SMALL_CHUNK):
                count += len(stream.decompress(chunk))
        return count


def _read_some(stream: BufferedIOBase, buffer: npt.NDArray[np.uint8], path: Path) -> int:
    """As `readinto`, with a stream that ends early read as ended, and a damaged one as the user's fault."""
    try:
        return stream.readinto(buffer.data)
    except EOFError:
        return 0
    except _DAMAGED as error:
        raise _damaged(path, error) from None


def _read_rest(stream: BufferedIOBase, path: Path, promised: int) -> None:
    """Read past the voxels: the checksum comes last and is only compared at the very end."""
    chunk, extra = np.empty(_CHUNK, np.uint8), 0
    try:
        while count := stream.readinto(chunk.data):
            extra += count
    except EOFError:
        raise _truncated(path, promised, _WITHOUT_END) from None
    except _DAMAGED as error:
        raise _damaged(path, error) from None
    if extra:
        log.warning("W-NIFTI-TRAILING %s: %s bytes more than the header promises; ignored", path, f"{extra:,}")


def _truncated(path: Path, promised: int, found: str) -> DataError:
    return DataError(
        "E-NIFTI-TRUNCATED",
        f"expected {promised:,} bytes, {found}; copy the file again from its source",
        where=str(path),
    )


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        "E-NIFTI-CRC", f"compressed data are damaged ({error}); copy the file again from its source", where=str(path)
    )
