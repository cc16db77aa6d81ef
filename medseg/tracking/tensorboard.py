"""TensorBoard's event files, written without TensorBoard: a file of records, each one protobuf message.

The format is TensorFlow's: records as in ``tensorflow/core/lib/io/record_writer.h``, messages as in
``event.proto`` and ``summary.proto``, of which this writes scalars, pictures and restarts.
"""

from __future__ import annotations

import io
import math
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    from medseg.tracking.mlflow_tracker import MlflowTracker

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf."""

START = 1
"""Status of a session: what was told of this step and later ones holds no longer."""


class EventFiles:
    """What a training tells, as TensorBoard reads it.

    A resumed training writes a file of its own, whose first line takes back what the former one told of the
    steps that are run again; so does a training that goes back to an earlier step.

    Args:
        folder: Made if need be; ``tensorboard --logdir`` takes it, or any folder above it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"events.out.tfevents.{time.time_ns()}.medseg"
        self._begun = False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers; NaN and infinity are left out, as in MLflow."""
        values = [_text(1, name) + _float(2, value) for name, value in metrics.items() if math.isfinite(value)]
        self._log(values, step)

    def log_picture(self, picture: npt.NDArray[np.uint8], name: str, step: int) -> None:
        """Log a picture.

        Args:
            picture: RGB, (H, W, 3).
            name: E.g. the case.
            step: Iteration.
        """
        content = io.BytesIO()
        Image.fromarray(picture).save(content, "PNG", compress_level=3)
        height, width, colors = picture.shape
        image = _integer(1, height) + _integer(2, width) + _integer(3, colors) + _bytes(4, content.getvalue())
        self._log([_text(1, name) + _bytes(4, image)], step)

    def rewind(self, step: int, count: int) -> None:
        """Take back what was told of the steps after this one; saying it again changes nothing."""
        self._restart(step + 1)

    def _log(self, values: list[bytes], step: int) -> None:
        if not self._begun:
            self._restart(step)
        self._write(_integer(2, step) + _bytes(5, b"".join(_bytes(1, value) for value in values)))

    def _restart(self, step: int) -> None:
        if not self._begun:
            self._begun = True
            self._write(_text(3, "brain.Event:2"))
        self._write(_integer(2, step) + _bytes(7, _integer(1, START)))

    def _write(self, event: bytes) -> None:
        with self._file.open("ab", buffering=0) as stream:  # one write a record: a kill tears none but the last
            stream.write(record(_double(1, time.time()) + event))


class MlflowAndTensorBoard:
    """Tells both the same.

    Args:
        mlflow: The run in MLflow.
        events: The event files beside it.
    """

    def __init__(self, mlflow: MlflowTracker, events: EventFiles) -> None:
        self._both = mlflow, events

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for each in self._both:
            each.log_metrics(metrics, step)

    def log_picture(self, picture: npt.NDArray[np.uint8], name: str, step: int) -> None:
        for each in self._both:
            each.log_picture(picture, name, step)

    def rewind(self, step: int, count: int) -> None:
        for each in self._both:
            each.rewind(step, count)


def record(content: bytes) -> bytes:
    """A record of an event file: length and content, each with its checksum."""
    length = struct.pack("<Q", len(content))
    return length + _checksum(length) + content + _checksum(content)


def crc32c(content: bytes) -> int:
    """CRC-32 with Castagnoli's polynomial (RFC 3720), which `zlib` does not have."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _remainder(crc: int) -> int:
    for _ in range(8):
        crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc


CRC_TABLE = tuple(_remainder(byte) for byte in range(256))


def _checksum(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first, the eighth saying whether more follow."""
    if number < 0x80:
        return bytes([number])
    return bytes([number & 0x7F | 0x80]) + _varint(number >> 7)


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _integer(field: int, value: int) -> bytes:
    return _key(field, VARINT) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _key(field, FIXED64) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _key(field, FIXED32) + struct.pack("<f", np.float32(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, BYTES) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())
