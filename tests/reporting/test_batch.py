"""What stands out in a batch, what its list tells, and what the page makes of it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.data.manifest import Case
from medseg.labels import Labels
from medseg.model import Preprocessing
from medseg.reporting.batch import busy_seconds, measure_batch
from medseg.reporting.batch_page import write_batch_page

LABELS = Labels({0: "background", 1: "liver", 2: "spleen"})


def done(case: str, liver: float, spleen: float, **more: Any) -> dict[str, Any]:
    told = {"case": case, "input": f"in/{case}.nii", "state": "done", "seconds": 2.0, "peak_mb": 900, "attempts": 0}
    return {**told, "volumes": {"liver": liver, "spleen": spleen}, "unit": "ml", **more}


def refused(case: str, state: str, error_id: str, message: str) -> dict[str, Any]:
    told = {"case": case, "input": f"in/{case}.nii", "state": state, "seconds": None, "peak_mb": None, "attempts": 2}
    return {**told, "error_id": error_id, "message": f"{error_id} in/{case}.nii: {message}"}


def by_case(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in rows}


def files_of(rows: list[dict[str, Any]]) -> list[Case]:
    """Segmentations that are not there: what the list tells need not be read."""
    return [Case(row["case"], (Path("gone") / row["case"],), None, "") for row in rows if row["state"] == "done"]


def page_of(rows: list[dict[str, Any]], folder: Path, labels: Labels = LABELS) -> tuple[dict[str, Any], str]:
    page = folder / "report.html"
    found = write_batch_page(
        files_of(rows), page, name="night", scans={}, labels=labels, preprocessing=Preprocessing(), told=by_case(rows)
    )
    return found, page.read_text()


def test_what_stands_out_comes_first_then_the_least_sure() -> None:
    doubts = [0.1, 0.11, 0.12, 0.13, 0.14, 0.9, 0.1, 0.115]
    livers = [100.0, 101, 102, 103, 104, 102, 300, 101]
    rows = [done(f"c{n}", liver, 50, uncertainty=u) for n, (liver, u) in enumerate(zip(livers, doubts, strict=True))]
    batch = measure_batch(files_of(rows), "b", LABELS, by_case(rows))
    assert [case.case for case in batch.cases] == ["c6", "c5", "c4", "c3", "c2", "c7", "c1", "c0"]
    deviation = np.median(np.abs(np.array(livers) - 102)) / 0.6745
    assert batch.cases[0].outlying == pytest.approx((300 - 102) / deviation)
    assert batch.cases[0].note == "liver: unusually large"
    assert batch.cases[1].note == "unusually unsure"
    assert len(batch.outliers) == 2


def test_to_be_unusually_sure_is_nothing_to_look_at() -> None:
    rows = [done(f"c{n}", 100, 50, uncertainty=0.5 + n / 100) for n in range(8)] + [done("s", 100, 50, uncertainty=0.0)]
    assert measure_batch(files_of(rows), "b", LABELS, by_case(rows)).outliers == []


def test_busy_seconds_leave_out_breaks_and_count_what_overlaps_once() -> None:
    told = [
        {"claimed_at": 100.0, "seconds": 10.0},
        {"claimed_at": 105.0, "seconds": 10.0},
        {"claimed_at": 106.0, "seconds": 2.0},
        {"claimed_at": 1000.0, "seconds": 5.0},
        {"claimed_at": None, "seconds": None},
    ]
    assert busy_seconds(told) == 15 + 5


def test_failed_scans_are_on_the_page_with_what_to_do_those_that_killed_first(tmp_path: Path) -> None:
    rows = [
        done("a", 100, 50),
        refused("b", "failed", "E-NIFTI-CRC", "compressed data are damaged; copy the file again"),
        refused("c", "quarantined", "E-WORKER", "its process was ended 2 times by SIGKILL; give the job more memory"),
        {"case": "d", "input": "in/d.nii", "state": "todo", "seconds": None, "peak_mb": None},
    ]
    found, html = page_of(rows, tmp_path)
    assert (found["cases"], found["refused"]) == (1, 2)
    headline = html[: html.index("</header>")]
    assert "1 of 4 scans segmented." in headline
    assert "2 scans failed" in headline and "1 of them as they ended their processes" in headline
    assert "<b>1 is still to be done.</b>" in headline
    table = html[html.index('id="refused"') : html.index("Volumes, organ by organ")]
    assert re.findall(r'<th scope="row" data-value="(\w)"', table) == ["c", "b"]
    assert "give the job more memory" in table and "compressed data are damaged" in table
    assert "in/b.nii" not in html, "a file is told by its case"


def test_a_batch_in_which_all_scans_failed_has_a_page_too(tmp_path: Path) -> None:
    found, html = page_of([refused(n, "failed", "E-NIFTI-EMPTY", "is empty") for n in "ab"], tmp_path)
    assert found["cases"] == 0 and "0 of 2 scans segmented." in html and html.count("is empty") == 2


def test_the_page_tells_pace_time_and_memory(tmp_path: Path) -> None:
    more = {"windows": 30, "windows_in_air": 10, "network_seconds": 1.5}
    rows = [done(f"c{n}", 100, 50, claimed_at=100 + 2.0 * n, **more) for n in range(5)]
    rows.append(done("slow", 100, 50, claimed_at=110.0, peak_mb=2400, **more) | {"seconds": 8.0})
    _, html = page_of(rows, tmp_path)
    assert "20.0 scans a minute, 18 s in all" in html  # six in 18 s
    assert "2.0 s each (median), at the most 8.0 s (slow)" in html
    assert "50 % of that" in html  # 9 of 18 s
    assert "240, of which 25 % were passed over" in html
    assert "2.4 GB in a process" in html


def test_organs_that_differ_a_thousandfold_stand_on_a_logarithmic_axis_with_a_place_for_0(tmp_path: Path) -> None:
    rows = [done(f"c{n}", 1500 + n, 1.5 if n else 0.0) for n in range(6)]
    _, html = page_of(rows, tmp_path)
    axis = html[html.index("Volumes, organ by organ") :]
    figure = axis[: axis.index("</svg>")]
    ticks = re.findall(r"<text[^>]*>([\d,.]+)</text>", figure)
    assert ticks == ["0", "1", "10", "100", "1,000"]
    assert "ten times" in axis
    _, html = page_of([done(f"c{n}", 150 + n, 50) for n in range(6)], tmp_path)
    assert "ten times" not in html


def test_two_thousand_cases_make_a_small_page_that_can_be_filtered(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    organs = {0: "background", **{n: f"organ {n}" for n in range(1, 41)}}
    rows = [
        done(f"c{n:04d}", 0, 0, uncertainty=float(draw.uniform()))
        | {"volumes": {organ: float(draw.normal(100, 10)) for organ in list(organs.values())[1:]}}
        for n in range(2000)
    ]
    found, html = page_of(rows, tmp_path, Labels(organs))
    assert found["cases"] == 2000 and len(html) < 5_000_000
    assert html.count('<th scope="row"') == 2000 and 'class="filter"' in html
    assert "Of 40 organs the first 12 have columns." in html
    assert html.count('xlink:href="#case-') <= 3000


def test_volumes_that_the_list_lacks_are_measured_but_not_too_many(tmp_path: Path) -> None:
    from medseg.data.volume_io import write_volume
    from medseg.geometry import Geometry, Volume

    array = np.zeros((1, 10, 10, 10), np.uint8)
    array[:, :4] = 1
    array[:, 5, 5, :3] = 2
    cases = [Case(name, (tmp_path / f"{name}.nii.gz",), None, name) for name in "abc"]
    for case in cases[:2]:
        write_volume(case.images[0], Volume(array, Geometry.from_spacing((10, 10, 10), (1, 2, 3))))
    told = by_case([done("a", 0, 0, volumes=None), done("b", 0, 0, volumes=None), done("c", 9, 8)])
    batch = measure_batch(cases, "b", LABELS, told, most_read=1)
    assert batch.unread == 1 and not batch.failed
    volumes = {case.case: case.volumes for case in batch.cases}
    assert volumes == {"a": pytest.approx({"liver": 400 * 0.006, "spleen": 3 * 0.006}), "c": {"liver": 9, "spleen": 8}}
    assert all(math.isnan(case.uncertainty) for case in batch.cases)
