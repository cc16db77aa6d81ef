"""The page of a run: what it says, what it leaves out, and what never stands in it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from medseg.errors import MedsegError
from medseg.metrics.table import ALL_CLASSES, SPURIOUS, Score, read_table, write_table
from medseg.reporting.run_page import write_run_page
from medseg.reporting.tables import rank_cases

from .run_folders import make_run, right_sided, shifted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight cases, each worse than the one before; of the last the spleen was not found."""
    predictions = {f"case_{n}": shifted(right_sided(), (n, 0, 0)) for n in range(7)}
    without = shifted(right_sided(), (7, 0, 0))
    without[without == 2] = 0
    return make_run(tmp_path / "run", predictions | {"case_7": without})


def page_of(folder: Path) -> str:
    result = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else {}
    write_run_page(folder, folder / "report.html", result)
    return (folder / "report.html").read_text()


def text_of(html: str) -> str:
    """What people read, programs and scans left out."""
    return re.sub(r"<script.*?</script>|<svg.*?</svg>", "", html, flags=re.DOTALL)


def test_cases_are_listed_worst_first(folder: Path) -> None:
    order = re.findall(r'<th scope="row" data-value="(case_\d)"', page_of(folder))
    assert order == [f"case_{n}" for n in reversed(range(8))]


def test_it_says_how_good_the_network_is_and_what_it_missed(folder: Path) -> None:
    text = text_of(page_of(folder))
    assert "8 scans that the network had not seen in training" in text
    assert "missed an organ altogether once" in text
    assert "spleen: missed" in text
    dice = [2 * (12 - n) / 24 for n in range(8)]  # a box 12 voxels wide, n voxels off
    assert f'<div class="number">{np.mean(dice):.3f}</div>' in text
    assert "95 % interval" in text
    assert "How to read the numbers" in text
    assert "not a medical device" in text


def test_worst_median_and_best_are_pictured_and_linked(folder: Path) -> None:
    html = page_of(folder)
    pictured = re.findall(r'<figure id="(picture-\d+)"><img.*?<strong>(case_\d)</strong>', html)
    assert [case for _, case in pictured] == ["case_7", "case_6", "case_5", "case_4", "case_3", "case_0"]
    for anchor, case in pictured:
        assert f'<a href="#{anchor}">{case}</a>' in html
    buttons = re.findall(r'<button type="button" data-case="\d"[^>]*>(.*?)</button>', html)
    assert buttons == ["worst: case_7", "median: case_3", "best: case_0"]


def test_every_dot_leads_to_its_cases_row(folder: Path) -> None:
    html = page_of(folder)
    for anchor in set(re.findall(r'xlink:href="#(case-\d+)"', html)):
        assert f'<tr id="{anchor}">' in html
    assert len(re.findall(r'xlink:href="#case-\d+"', html)) >= 16


def test_no_patient_no_folder_and_no_address_stands_in_it(folder: Path) -> None:
    html = page_of(folder)
    assert "Doe^" not in html
    assert str(folder.parent) not in html
    assert not re.search(r'(src|href|action)\s*=\s*"(?!#|data:)', text_of(html))
    assert not re.search(r"https?://", text_of(html))


def test_provenance_is_there_and_folded_away(folder: Path) -> None:
    details = re.search(r"<details>.*?</details>", page_of(folder), re.DOTALL)
    assert details
    for known in ("f00dcafe", "unet", "medseg 0", "2 minutes", "0123456789abcdef"):
        assert known in details.group()


def test_where_the_scans_are_gone_it_says_so_and_keeps_the_rest(folder: Path) -> None:
    shutil.rmtree(folder.parent / "data")
    html = page_of(folder)
    assert "its scan is not where it was (case_7, " in html
    assert 'id="viewer"' not in html
    assert "niivue" not in html
    assert "Every case, worst first" in html
    assert "<svg" in html


def test_a_table_alone_makes_a_page(tmp_path: Path) -> None:
    write_table(tmp_path / "per_case.csv", [Score("a", "liver", {"dice": 0.9}), Score("b", "liver", {"dice": 0.7})])
    html = page_of(tmp_path)
    assert "0.800" in html
    assert "How training went" not in html


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    write_table(
        tmp_path / "per_case.csv",
        [Score('<script>"x"', "<b>liver", {"dice": 0.9}), Score("b", "<b>liver", {"dice": 0.5})],
    )
    html = page_of(tmp_path)
    assert '<script>"x"' not in html
    assert "<b>liver" not in html


def test_all_folds_make_one_page(tmp_path: Path) -> None:
    scores = {}
    for fold in (0, 1):
        folder = make_run(tmp_path / f"fold_{fold}", {f"c{fold}": shifted(right_sided(), (fold, 0, 0))}, fold=fold)
        scores[fold] = (folder / "per_case.csv").read_text().splitlines()
    (tmp_path / "per_case.csv").write_text("\n".join([*scores[0], *scores[1][1:]]) + "\n")
    html = page_of(tmp_path)
    assert "in 2 folds" in html
    assert set(re.findall(r'<figure id="picture-\d+"><img.*?<strong>(\w+)</strong>', html)) == {"c0", "c1"}


def test_an_unfinished_run_is_told_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="finish its training") as caught:
        write_run_page(tmp_path, tmp_path / "report.html", {})
    assert caught.value.error_id == "E-REPORT-RUN"


def test_cases_without_a_value_come_last() -> None:
    rows = rank_cases(
        [Score("a", "x", {"dice": float("nan")}), Score("b", "x", {"dice": 0.9}), Score("c", "x", {"dice": 0.1})],
        "dice",
    )
    assert [row.case for row in rows] == ["c", "b", "a"]


def test_by_a_distance_the_largest_is_the_worst_and_a_missed_organ_is_told(tmp_path: Path) -> None:
    distances = {"a": 1.254, "b": 27.3, "c": float("nan")}
    scores = [Score(c, "liver", {"volume_ml": 9.0, "hd95": mm}, "missed" * (mm != mm)) for c, mm in distances.items()]
    write_table(tmp_path / "per_case.csv", scores)
    html = page_of(tmp_path)
    assert re.findall(r'<th scope="row" data-value="(\w)"', html) == ["c", "b", "a"], "a volume ranks nothing"
    assert "A missed organ without a value ranks as the worst" in html
    assert "A missed organ has no distance" in html
    assert "2 cases, missed in 1" in html
    assert f'<div class="number">{(1.254 + 27.3) / 2:.1f}</div>' in html


def test_a_missed_or_invented_organ_is_as_far_off_as_the_scan_is_long() -> None:
    nan = float("nan")
    cases = {
        "found": (60.0, ""),
        "missed": (nan, "missed"),
        "spurious": (nan, SPURIOUS),
        "absent": (nan, "absent in both"),
    }
    scores = [Score(case, "x", {"hd95": mm}, note, diagonal_mm=90.0) for case, (mm, note) in cases.items()]
    scores += [Score("all", ALL_CLASSES, {"mean_iou": 0.5}), Score("unknown", "x", {"hd95": nan}, "missed")]
    rows = rank_cases(scores, "hd95")
    assert [row.case for row in rows] == ["unknown", "missed", "spurious", "found", "absent", "all"]
    assert [row.rank for row in rows[1:4]] == [90, 90, 60]
    rows = rank_cases([Score("a", "x", {"precision": nan}, "missed"), Score("b", "x", {"precision": 0.0})], "precision")
    assert [row.case for row in rows] == ["a", "b"]


def test_a_case_whose_only_organ_was_missed_has_its_picture_also_without_dice(tmp_path: Path) -> None:
    predictions = {f"case_{n}": shifted(right_sided(), (0, 0, n)) for n in range(7)}
    run = make_run(tmp_path / "run", predictions | {"missed": 0 * right_sided()})
    lines = [
        f"{score.case},{score.organ},{'' if score.case == 'missed' else 2.0},60,{score.note}"
        for score in read_table(run / "per_case.csv")
    ]
    (run / "per_case.csv").write_text("\n".join(["case,organ,hd95,diagonal_mm,note", *lines]))
    assert re.findall(r"<figure id.*?<strong>(\w+)</strong>", page_of(run))[0] == "missed"


def test_differences_that_cancel_are_told_organ_by_organ(tmp_path: Path) -> None:
    scores = [
        Score("a", organ, {"dice": 0.5, "volume_difference_ml": ml})
        for organ, ml in (("liver", 31.0), ("spleen", -31.0))
    ]
    write_table(tmp_path / "per_case.csv", scores)
    html = page_of(tmp_path)
    assert "liver: volume difference (ml)" in html
    assert "mean volume difference" not in html


def test_a_page_with_nothing_to_show_says_so(tmp_path: Path) -> None:
    write_table(tmp_path / "per_case.csv", [Score("a", "liver", {"dice": float("nan")}, "absent in both")])
    html = page_of(tmp_path)
    assert "1 segmentation was held to what an expert drew. None of them has a value of Dice" in html
    assert "<svg" not in html
    assert "it is not known where their files are (a)" in html


def test_a_picture_and_its_row_lead_to_each_other(folder: Path) -> None:
    html = page_of(folder)
    pairs = re.findall(r'<figure id="(picture-\d+)"><img.*?<strong>(case_\d)</strong> · <a href="#(case-\d+)"', html)
    assert len(pairs) == 6
    for anchor, case, row in pairs:
        assert f'<tr id="{row}"><th scope="row" data-value="{case}"><a href="#{anchor}">' in html
    assert "place 1 of 8" in html
