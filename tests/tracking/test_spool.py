from __future__ import annotations

from pathlib import Path

import pytest

from medseg.errors import ModelError
from medseg.tracking.spool import Delivery, Spool


def metric(step: int, value: float = 0.5) -> dict[str, object]:
    return {"kind": "metric", "key": "loss", "value": value, "step": step, "time": 1}


def test_lines_come_back_in_order_and_from_any_line_on(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([metric(1), metric(2), metric(3)])
    lines = spool.read()
    assert [line.record["step"] for line in lines] == [1, 2, 3]
    assert [line.record["step"] for line in spool.read(lines[0].end)] == [2, 3]
    assert spool.read(lines[-1].end) == []


def test_a_torn_last_line_is_ignored_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([metric(1), metric(2)])
    path = tmp_path / "tracking.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert [line.record["step"] for line in Spool(tmp_path).read()] == [1]
    again = Spool(tmp_path)
    again.append([metric(2), metric(3)])
    assert [line.record["step"] for line in again.read()] == [1, 2, 3]


def test_a_line_being_written_is_not_read_yet(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([metric(1)])
    with (tmp_path / "tracking.jsonl").open("ab") as stream:
        stream.write(b'{"kind": "metric"')
    assert len(spool.read()) == 1


def test_a_step_replayed_after_a_resume_keeps_its_first_value(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([metric(1, 0.1), metric(2, 0.2), metric(2, 0.25)])
    resumed = Spool(tmp_path)
    resumed.append([metric(2, 0.3), metric(3, 0.4)])
    assert [line.record["value"] for line in resumed.read()] == [0.1, 0.2, 0.4]


def test_after_a_rewind_the_steps_behind_it_may_be_logged_once_more(tmp_path: Path) -> None:
    rewind = {"kind": "rewind", "key": "1", "step": 2}
    spool = Spool(tmp_path)
    spool.append([metric(2, 0.2), metric(3, 0.3), rewind, metric(2, 0.0), metric(3, 0.4), metric(3, 0.0)])
    resumed = Spool(tmp_path)
    resumed.append([{**rewind, "step": 0}, metric(3, 0.0), metric(4, 0.5)])  # the same rewind, told again
    assert [line.record.get("value") for line in resumed.read()] == [0.2, 0.3, None, 0.4, 0.5]


def test_tags_and_files_may_be_logged_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for record in ({"kind": "tag", "key": "git", "value": "a"}, {"kind": "file", "path": "per_case.csv", "folder": ""}):
        spool.append([record, record])
    assert len(spool.read()) == 4


def test_delivery_survives_on_disk_and_is_none_where_nothing_was_tracked(tmp_path: Path) -> None:
    assert Delivery.load(tmp_path) is None
    delivery = Delivery(uri="u", experiment="e", run_name="n", local_id="local-1", started_ms=5)
    delivery.note(tmp_path, sent=17, run_id="abc")
    assert Delivery.load(tmp_path) == delivery
    assert delivery.sent == 17


def test_a_damaged_delivery_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tracking.json").write_text("{")
    with pytest.raises(ModelError, match=r"E-TRACK-STATE.*delete it"):
        Delivery.load(tmp_path)
