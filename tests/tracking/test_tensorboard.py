from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

from medseg.tracking.mlflow_tracker import MlflowTracker, open_store
from medseg.tracking.tensorboard import EventFiles, MlflowAndTensorBoard, crc32c, record

F = descriptor_pb2.FieldDescriptorProto
MESSAGES = {
    "Image": [("height", 1, F.TYPE_INT32), ("width", 2, F.TYPE_INT32), ("encoded_image_string", 4, F.TYPE_BYTES)],
    "Value": [("tag", 1, F.TYPE_STRING), ("simple_value", 2, F.TYPE_FLOAT), ("image", 4, "Image")],
    "Summary": [("value", 1, "Value")],
    "SessionLog": [("status", 1, F.TYPE_INT32)],
    "Event": [
        ("wall_time", 1, F.TYPE_DOUBLE),
        ("step", 2, F.TYPE_INT64),
        ("file_version", 3, F.TYPE_STRING),
        ("summary", 5, "Summary"),
        ("session_log", 7, "SessionLog"),
    ],
}
"""What this reads of TensorFlow's event.proto and summary.proto."""


@pytest.fixture(scope="module")
def event_message() -> Any:
    """The message `Event`, made by protobuf itself."""
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="tb", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            made = message.field.add(name=field, number=number, label=F.LABEL_OPTIONAL)
            if isinstance(kind, str):
                made.type, made.type_name = F.TYPE_MESSAGE, f".tb.{kind}"
                made.label = F.LABEL_REPEATED if field == "value" else F.LABEL_OPTIONAL
            else:
                made.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tb.Event"))


def events(path: Path, event_message: Any) -> Iterator[Any]:
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        data = content[12 : 12 + length]
        assert record(data) == content[: 16 + length]
        content = content[16 + length :]
        yield event_message.FromString(data)


@pytest.mark.parametrize(
    ("content", "checksum"),
    [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_the_checksum_is_that_of_rfc_3720(content: bytes, checksum: int) -> None:
    assert crc32c(content) == checksum


def test_numbers_and_pictures_are_read_back_by_protobuf(tmp_path: Path, event_message: Any) -> None:
    files = EventFiles(tmp_path / "tensorboard")
    files.log_metrics({"train/loss": 0.5, "val/dice/left kidney": math.nan, "val/mean_dice": 0.25}, 300)
    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    files.log_picture(picture, "case_1", 2**40)
    (path,) = (tmp_path / "tensorboard").iterdir()
    version, start, metrics, drawn = events(path, event_message)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (300, 1)
    assert metrics.step == 300
    assert {value.tag: value.simple_value for value in metrics.summary.value} == {
        "train/loss": 0.5,
        "val/mean_dice": 0.25,
    }
    assert drawn.step == 2**40
    (value,) = drawn.summary.value
    assert (value.tag, value.image.height, value.image.width) == ("case_1", 5, 7)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string))), picture)


def test_nothing_is_written_before_there_is_something_to_tell(tmp_path: Path) -> None:
    EventFiles(tmp_path / "tensorboard")
    assert list((tmp_path / "tensorboard").iterdir()) == []


def test_tensorboard_shows_the_course_that_holds(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = EventFiles(tmp_path)
    for step in (10, 20, 30):
        first.log_metrics({"train/loss": 1.0, "val/dice/liver": 0.5}, step)
        first.log_picture(np.full((4, 6, 3), step, np.uint8), "case_1", step)
    resumed = EventFiles(tmp_path)  # from the checkpoint after 15: 20 and 30 are run again
    for step in (20, 30, 40):
        resumed.log_metrics({"train/loss": 2.0}, step)
    resumed.rewind(25, 1)
    resumed.rewind(25, 1)
    resumed.log_metrics({"train/loss": 3.0}, 30)
    shown = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("train/loss")] == [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert [e.step for e in shown.Scalars("val/dice/liver")] == [10]
    (drawn,) = shown.Images("case_1")
    assert (drawn.step, drawn.width, drawn.height) == (10, 6, 4)


def test_both_are_told_the_same(tmp_path: Path, store: str, event_message: Any) -> None:
    tracker = MlflowTracker.start(tmp_path / "run", uri=store, experiment="e", run_name="r", params={}, tags={})
    both = MlflowAndTensorBoard(tracker, EventFiles(tmp_path / "run" / "tensorboard"))
    both.log_metrics({"train/loss": 0.5}, 10)
    both.log_picture(np.zeros((4, 4, 3), np.uint8), "case_1", 10)
    both.rewind(5, 1)
    tracker.finish("FINISHED")
    (path,) = (tmp_path / "run" / "tensorboard").iterdir()
    told = list(events(path, event_message))
    assert [event.step for event in told] == [0, 10, 10, 10, 6]
    assert open_store(store).get_run(tracker.run_id).data.metrics == {"train/loss": 0.5}
    assert len(list((tmp_path / "run" / "pictures").rglob("*.png"))) == 1
