"""Files that are there whole or not at all, whoever is killed while writing them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a full disk."""

_CHUNK = 1 << 20


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` that says which process of which machine writes it."""
    return path.with_name(f".{uuid.uuid4().hex[:8]}.{socket.gethostname()}.{os.getpid()}.tmp")


def write_atomically(path: Path, content: bytes | memoryview | Iterator[bytes]) -> None:
    """Write a file, all at once or in pieces; a reader, or a kill at any moment, sees the old one or the new one whole."""
    if path.exists() and not path.is_file():  # a folder, or a device that would be replaced
        raise OSError(errno.EINVAL, "is there, and is no file; choose another name", str(path))
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as stream:
            stream.writelines(content if isinstance(content, Iterator) else [content])
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails for want of room names no file itself
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes of this machine left half-written in a folder."""
    for leftover in folder.glob(".*.tmp"):
        *_, pid, _ = leftover.name.split(".")
        host = leftover.name.removesuffix(f".{pid}.tmp").split(".", 2)[-1]
        if host != socket.gethostname() or is_running(int(pid)):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_running(pid: int) -> bool:
    """Whether a process of this machine exists, and has not ended with nobody to take note, as in a container."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # this is no Linux, or it has ended just now
        return True
    return state != "Z"
