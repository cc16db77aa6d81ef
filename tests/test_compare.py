from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from medseg import compare as module
from medseg.compare import compare, comparison_table
from medseg.errors import DataError, WorkflowError

BEFORE = """case,organ,dice,hd95,note
a,liver,0.90,4.0,
a,spleen,0.80,3.0,
b,liver,0.70,9.0,
b,spleen,,,absent in both
c,liver,0.50,,missed
d,liver,0.99,1.0,
"""
NOW = """case,organ,hd95,dice,note
c,liver,6.0,0.60,
b,liver,9.0,0.70,
a,spleen,2.0,0.85,
a,liver,5.0,0.88,
b,spleen,,,absent in both
e,liver,1.0,0.99,
"""


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """A run folder, and the table of another run."""
    before = tmp_path / "before"
    before.mkdir()
    (before / "per_case.csv").write_text(BEFORE)
    (tmp_path / "now.csv").write_text(NOW)
    return [str(before), str(tmp_path / "now.csv")]


def test_runs_are_paired_by_case_and_organ_whatever_their_order(runs: list[str]) -> None:
    comparison = compare(runs)["comparisons"][0]
    liver = comparison["organs"]["liver"]
    assert liver["n"] == 3
    assert liver["baseline"] == pytest.approx((0.9 + 0.7 + 0.5) / 3)
    assert liver["run"] == pytest.approx((0.88 + 0.7 + 0.6) / 3)
    assert liver["difference"] == pytest.approx((-0.02 + 0 + 0.1) / 3)
    assert (liver["wins"], liver["ties"], liver["losses"], liver["n_unscored"]) == (1, 1, 1, 0)
    spleen = comparison["organs"]["spleen"]
    assert (spleen["n"], spleen["wins"], spleen["n_unscored"]) == (1, 1, 0)  # b has no spleen in either
    assert comparison["mean_difference"] == pytest.approx((0.08 / 3 + 0.05) / 2)
    assert comparison["worse"] is False
    assert comparison["unpaired"] == {"baseline": ["d"], "run": ["e"]}


def test_of_distances_less_is_better_and_a_missed_organ_is_counted_apart(runs: list[str]) -> None:
    liver = compare(runs, metric="hd95")["comparisons"][0]["organs"]["liver"]
    assert (liver["wins"], liver["ties"], liver["losses"]) == (0, 1, 1)
    assert liver["n_unscored"] == 1
    assert liver["difference"] == pytest.approx(0.5)


def test_a_run_is_neither_better_nor_worse_than_itself(runs: list[str]) -> None:
    comparison = compare([runs[0], runs[0]], fail_if_worse=True)["comparisons"][0]
    assert comparison["mean_difference"] == 0
    assert comparison["organs"]["liver"]["ties"] == 4


def test_every_run_is_held_to_the_first(runs: list[str]) -> None:
    result = compare([runs[0], runs[1], runs[0]])
    assert result["baseline"] == runs[0]
    assert [c["run"] for c in result["comparisons"]] == [runs[1], runs[0]]
    json.dumps(result, allow_nan=False)


def test_a_worse_run_fails_when_asked_but_its_tables_are_written(runs: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="E-COMPARE-WORSE"):
        compare(runs[::-1], output=tmp_path / "out", fail_if_worse=True)
    with (tmp_path / "out" / "comparison.csv").open(newline="") as stream:
        summary = {row["organ"]: row for row in csv.DictReader(stream)}
    assert float(summary["liver"]["difference"]) == pytest.approx(-0.08 / 3)
    with (tmp_path / "out" / "pairs.csv").open(newline="") as stream:
        pairs = {(row["case"], row["organ"]): row for row in csv.DictReader(stream)}
    assert pairs["c", "liver"][runs[1]] == "0.6"
    assert pairs["d", "liver"][runs[1]] == ""
    assert len(pairs) == 7


def test_an_organ_scored_nowhere_leaves_the_mean_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("case,organ,dice\n1,liver,0.5\n1,spleen,\n")
    comparison = compare([str(tmp_path / "a"), str(tmp_path / "b")])["comparisons"][0]
    assert math.isnan(comparison["organs"]["spleen"]["difference"])
    assert comparison["mean_difference"] == 0


def test_an_mlflow_run_id_stands_for_its_table(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def table(run_id: str, uri: str | None) -> list[dict[str, str]]:
        asked.append((run_id, uri))
        return list(csv.DictReader(NOW.splitlines()))

    monkeypatch.setattr(module, "per_case_table", table)
    run_id = "0123456789abcdef" * 2
    by_id = compare([runs[0], run_id], tracking_uri="http://store")["comparisons"][0]
    assert by_id == {**compare(runs)["comparisons"][0], "run": run_id}
    assert asked == [(run_id, "http://store")]


def test_runs_without_a_common_case_are_refused(runs: list[str], tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("case,organ,dice\nz,liver,1\n")
    with pytest.raises(DataError, match=r"E-COMPARE-CASES .* \(cases a, b, c, d\) .* \(cases z\)"):
        compare([runs[0], str(tmp_path / "other.csv")])


def test_one_run_is_not_a_comparison(runs: list[str]) -> None:
    with pytest.raises(WorkflowError, match="E-COMPARE-RUNS"):
        compare(runs[:1])


def test_an_unknown_metric_names_the_nearest_column(runs: list[str]) -> None:
    with pytest.raises(DataError, match=r"E-COMPARE-METRIC .* did you mean 'hd95'"):
        compare(runs, metric="hd99")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "columns case, organ"),
        ("id,dice\na,1\n", "columns case, organ"),
        ("case,organ,dice\na,liver,1\na,liver,1\n", "bad.csv:3: case a, organ liver is there twice"),
        ("case,organ,dice\na,liver,high\n", "bad.csv:2: dice is 'high'"),
    ],
)
def test_a_damaged_table_is_named_with_its_line(tmp_path: Path, table: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(table)
    with pytest.raises(DataError, match=message):
        compare([str(path), str(path)])


def test_a_folder_without_a_table_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no per_case\.csv; finish its training"):
        compare([str(tmp_path), str(tmp_path)])


def test_people_see_a_row_per_organ_and_what_was_left_out(runs: list[str]) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(comparison_table(compare(runs)))
    rows = [line.replace("│", " ").split() for line in capture.get().splitlines()]
    assert [runs[1], "liver", "3", "0.700", "0.727", "+0.027", "1", "/", "1", "/", "1"] in rows
    assert "left out, as only one of two runs has them: d, e" in capture.get()


def test_a_run_that_lacks_a_result_of_the_first_is_worse(tmp_path):
    whole, part = tmp_path / "whole.csv", tmp_path / "part.csv"
    whole.write_text("case,organ,dice\na,liver,0.9\na,tumour,0.5\n")
    part.write_text("case,organ,dice\na,liver,0.95\n")
    (found,) = compare([str(whole), str(part)])["comparisons"]
    assert found["lost"] == [["a", "tumour"]]
    with pytest.raises(DataError, match="E-COMPARE-WORSE"):
        compare([str(whole), str(part)], fail_if_worse=True)
