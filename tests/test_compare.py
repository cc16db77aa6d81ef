from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType
from scipy import stats

from medseg import compare as module
from medseg.compare import compare, rank_experiment
from medseg.errors import DataError, ModelError, WorkflowError
from medseg.metrics.statistics import bootstrap_ci
from medseg.outcome import print_result
from medseg.reporting.comparison_table import comparison_table, ranking_table
from medseg.tracking.mlflow_tracker import open_store
from medseg.tracking.runs import TrackedRun

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
    assert comparison["why_worse"] == ["cases are missing: d"]  # though better in the mean
    assert comparison["unpaired"] == {"baseline": ["d"], "run": ["e"]}


def test_of_distances_less_is_better_and_a_missed_organ_is_counted_apart(runs: list[str]) -> None:
    liver = compare(runs, metric="hd95")["comparisons"][0]["organs"]["liver"]
    assert (liver["wins"], liver["ties"], liver["losses"]) == (0, 1, 1)
    assert liver["n_unscored"] == 1
    assert liver["difference"] == pytest.approx(0.5)


def test_a_run_is_neither_better_nor_worse_than_itself(runs: list[str]) -> None:
    comparison = compare([runs[0], runs[0]])["comparisons"][0]
    assert comparison["mean_difference"] == 0
    assert comparison["organs"]["liver"]["ties"] == 4


def test_every_run_is_held_to_the_first(runs: list[str]) -> None:
    result = compare([runs[0], runs[1], runs[0]])
    assert result["baseline"] == runs[0]
    assert [c["run"] for c in result["comparisons"]] == [runs[1], runs[0]]


def test_the_result_is_json_with_null_for_what_is_not_a_number(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_result(compare(runs), as_json=True)
    spleen = json.loads(capsys.readouterr().out)["comparisons"][0]["organs"]["spleen"]
    assert (spleen["n"], spleen["p"], spleen["ci95"]) == (1, None, [None, None])


def test_the_tables_are_written(runs: list[str], tmp_path: Path) -> None:
    result = compare(runs[::-1], output=tmp_path / "out")
    assert result["comparisons"][0]["why_worse"][-1].startswith("mean difference -0.0")
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
    asked, logged = [], []

    def run(run_id: str, uri: str | None) -> TrackedRun:
        asked.append((run_id, uri))
        return TrackedRun(run_id, "liver-fold0", {}, list(csv.DictReader(NOW.splitlines())))

    def log(run_id: str, folder: Path, uri: str | None) -> None:
        logged.append((run_id, uri, folder.name, sorted(path.name for path in folder.iterdir())))

    monkeypatch.setattr(module, "tracked_run", run)
    monkeypatch.setattr(module, "log_comparison", log)
    run_id = "0123456789abcdef" * 2
    by_id = compare([runs[0], run_id], tracking_uri="http://store")["comparisons"][0]
    assert by_id["label"] == "liver-fold0 (01234567)"
    by_folder = compare(runs)["comparisons"][0]
    assert repr({**by_id, "run": 0, "label": 0}) == repr({**by_folder, "run": 0, "label": 0})  # NaN is not itself
    assert asked == [(run_id, "http://store")]
    ((logged_to, uri, folder, files),) = logged
    assert (logged_to, uri) == (run_id, "http://store")
    assert folder.startswith("dice-")
    assert files == ["comparison.csv", "comparison.html", "comparison.png", "pairs.csv"]
    compare([runs[0], run_id], tracking_uri="http://store", log=False)
    assert len(logged) == 1


def test_a_store_that_takes_no_comparison_is_a_warning(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def log(run_id: str, folder: Path, uri: str | None) -> None:
        raise ModelError("E-TRACK-DOWN", "does not answer: Connection refused")

    rows = list(csv.DictReader(NOW.splitlines()))
    monkeypatch.setattr(module, "tracked_run", lambda run_id, uri: TrackedRun(run_id, "x", {}, rows))
    monkeypatch.setattr(module, "log_comparison", log)
    result = compare([runs[0], "some-id"])
    assert "W-COMPARE-LOG" in result["warnings"][-1]
    assert "Connection refused" in result["warnings"][-1]


def test_runs_without_a_common_case_are_refused(runs: list[str], tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("case,organ,dice\nz,liver,1\n")
    with pytest.raises(DataError, match=r"E-COMPARE-CASES .* \(cases a, b, c, d\) .* \(cases z\)"):
        compare([runs[0], str(tmp_path / "other.csv")])


def test_the_same_cases_with_organs_of_other_names_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("case,organ,dice\nz,liver,1\n")
    (tmp_path / "b.csv").write_text("case,organ,dice\nz,label 1,1\n")
    with pytest.raises(DataError, match=r"E-COMPARE-CASES .*\(organs liver\) .*\(organs label 1\); .* --labels"):
        compare([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])


def test_rows_of_another_scope_are_no_results(tmp_path: Path) -> None:
    """A table with every metric against one with Dice alone."""
    every, dice_only = tmp_path / "every.csv", tmp_path / "dice.csv"
    rows = [f"c{n},liver,0.{n}" for n in range(1, 8)]
    every.write_text("\n".join(["case,organ,dice,mean_iou", *(f"{r},\n{r[:2]},all classes,,0.5" for r in rows)]))
    dice_only.write_text("\n".join(["case,organ,dice", *rows]))
    for runs in ([str(every), str(dice_only)], [str(dice_only), str(every)]):
        result = compare(runs)
        (found,) = result["comparisons"]
        assert (list(found["organs"]), found["why_worse"], result["warnings"]) == (["liver"], [], [])
        assert "too few" not in shown(comparison_table(result))
    (found,) = compare([str(every), str(every)], metric="mean_iou")["comparisons"]
    assert list(found["organs"]) == ["all classes"]


def test_a_row_without_value_and_reason_may_be_missing(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.csv", tmp_path / "part.csv"
    part.write_text("case,organ,dice,note\na,liver,0.9,\n")
    for row, is_lost in (("a,tumor,,absent in both", False), ("a,tumor,,missed", True)):
        whole.write_text(f"case,organ,dice,note\na,liver,0.9,\n{row}\n")
        assert compare([str(whole), str(part)])["comparisons"][0]["worse"] is is_lost


def test_a_short_row_has_no_value_and_nothing_is_said_of_misses(tmp_path: Path) -> None:
    whole, short = tmp_path / "whole.csv", tmp_path / "short.csv"
    whole.write_text("case,organ,hd95\na,liver,1\nb,liver,2\n")
    short.write_text("case,organ,hd95\na,liver\nb,liver,2\n", encoding="utf-8-sig")
    (warning,) = compare([str(short), str(whole)], metric="hd95")["warnings"]
    assert warning == "whole.csv: 1 pair left out, as not both runs have a hd95 there"


def test_a_damaged_model_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = [write_run(tmp_path / name, n, tags={"medseg.data_hash": name}) for n, name in enumerate("ab")]
    for damaged in ("{", "[]", '{"provenance": 3}'):
        (tmp_path / "a" / "model" / "model.json").write_text(damaged)
        assert compare(runs)["warnings"] == []
    assert caplog.text.count("W-COMPARE-MODEL") == 3


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
        ("case,organ,dice\na,liver,0.5\nb,liver,-inf\n", "E-COMPARE-TABLE .*bad.csv:3: dice is '-inf'"),
        ("case,organ,dice\nb,all classes,0.5\n", "E-COMPARE-METRIC .*bad.csv: has no row that dice belongs in"),
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


def shown(table: RenderableType, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def rows_of(text: str, name: str) -> tuple[list[str], list[str]]:
    """The words of both lines of a row."""
    lines = [line.split() for line in text.splitlines()]
    n = next(n for n, words in enumerate(lines) if words[:1] == [name])
    return lines[n], lines[n + 1]


def test_people_see_a_row_per_organ_and_what_was_left_out(runs: list[str]) -> None:
    text = shown(comparison_table(compare(runs)))
    above, below = rows_of(text, "liver")
    assert above == ["liver", "3", "0.700", "+0.027", "too", "few", "1/1/1", "1→0"]
    assert (below[0], below[3:]) == ("0.727", ["+0.33", "0→0"])
    assert "only one of the two runs has them: cases d, e" in text
    assert "fewer than 6 patients" in text
    assert "name no patients: each case is taken for another one" in text


def lines_at_80(table: RenderableType) -> list[str]:
    lines = shown(table, 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    return lines


def test_at_80_columns_every_organ_and_number_is_whole(tmp_path: Path) -> None:
    """Distances of many cases that count as the diagonal, with misses and inventions: nothing is wider."""
    names = ("liver", "inferior_vena_cava", "portal_vein_and_splenic_vein")
    random = np.random.default_rng(0)
    for run in ("a", "b"):
        rows = [
            f"c{n},{organ},{random.uniform(0, 300):.4f},400,{'missed' if n < 12 else ''}"
            for n in range(120)
            for organ in names
        ]
        rows[50] = "c16,portal_vein_and_splenic_vein,,400,false positive: absent in the reference"
        (tmp_path / f"{run}.csv").write_text("\n".join(["case,organ,hd95,diagonal_mm,note", *rows]))
    result = compare([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], metric="hd95")
    text = "\n".join(lines_at_80(comparison_table(result)))
    for organ, found in result["comparisons"][0]["organs"].items():
        above, below = rows_of(text, organ[:19])  # a longer name goes on in the next line
        low, high = found["ci95"]
        counts = f"{found['wins']}/{found['ties']}/{found['losses']}"
        expected = [
            with_digits(found["baseline"]),
            with_digits(found["difference"], "+"),
            f"{found['p_holm']:.3f}",
            counts,
        ]
        assert above == [organ[:19], "120", *expected, "12→12"]
        effect, spurious = f"{found['effect_size']:+.2f}", found["spurious_run"]
        expected = [with_digits(found["run"]), f"[{with_digits(low)},", f"{with_digits(high)}]", effect]
        assert below == [*filter(None, [organ[19:]]), *expected, f"{spurious}→{spurious}"]


def with_digits(value: float, sign: str = "") -> str:
    return f"{value:{sign}.{3 if abs(value) < 10 else 1}f}"


def test_at_80_columns_every_run_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("unet-large-patch-fold0", "segformer-mit-b2-fold0")
    runs = [tracked(Path(write_run(tmp_path / name, n)), name) for n, name in enumerate(names)]
    for run in runs:
        run.rows[0]["note"], run.rows[1]["note"] = "missed", "false positive: absent in the reference"
    monkeypatch.setattr(module, "experiment_runs", lambda experiment, uri: runs)
    result = rank_experiment("liver")
    lines = lines_at_80(ranking_table(result))
    assert "2 runs, 20 cases; anterior, posterior, whole" in lines[0]
    for place, row in enumerate(result["ranking"], start=1):
        n = next(n for n, line in enumerate(lines) if line.strip().startswith(f"{place} "))
        assert " ".join([*lines[n].split()[1:2], *lines[n + 1].split()[:1]]) == row["run"]
        assert f"{row['mean']:.3f}" in lines[n]
        assert f"[{row['ci95'][0]:.3f}, {row['ci95'][1]:.3f}]" in lines[n + 1]
        assert (lines[n].split()[-1], lines[n + 1].split()[-1]) == ("1", "1")


def test_what_is_not_a_number_is_a_dash(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("case,organ,dice\n1,liver,0.5\n1,spleen,\n")
    text = shown(comparison_table(compare([str(tmp_path / "a"), str(tmp_path / "b")])))
    assert "nan" not in text
    assert rows_of(text, "spleen") == (["spleen", "0", "–", "–", "too", "few", "0/0/0"], ["–", "–"])


def test_a_run_that_lacks_a_result_of_the_first_is_worse(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.csv", tmp_path / "part.csv"
    whole.write_text("case,organ,dice\na,liver,0.9\na,tumour,0.5\n")
    part.write_text("case,organ,dice\na,liver,0.95\n")
    (found,) = compare([str(whole), str(part)])["comparisons"]
    assert found["lost"] == [["a", "tumour"]]
    assert found["why_worse"] == ["1 result missing"]


ORGANS = ("anterior", "posterior", "whole")


def write_run(
    path: Path, seed: int, *, gain: float = 0.0, cases: int = 20, tags: dict[str, str] | None = None, scans: int = 1
) -> str:
    """A run folder with Dice of cases that are as hard in every run."""
    hard, noise = np.random.default_rng(0), np.random.default_rng(seed)
    path.mkdir()
    lines = ["case,organ,patient,dice"]
    for n in range(cases):
        for organ, base in zip(ORGANS, hard.normal(0.85, 0.04, 3), strict=True):
            dice = base + noise.normal(gain, 0.02)
            lines.append(f"case{n:02d},{organ},patient{n // scans:02d},{dice:.6f}")
    (path / "per_case.csv").write_text("\n".join(lines) + "\n")
    if tags:
        (path / "model").mkdir()
        (path / "model" / "model.json").write_text(json.dumps({"provenance": tags}))
    return str(path)


def paired(output: Path, runs: Sequence[str]) -> dict[str, list[tuple[str, float, float]]]:
    """By organ: patient and both values, read from the CSV without medseg."""
    found: dict[str, list[tuple[str, float, float]]] = {}
    with (output / "pairs.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            found.setdefault(row["organ"], []).append((row["patient"], float(row[runs[0]]), float(row[runs[1]])))
    return found


def test_the_statistics_are_scipys_on_the_same_csv(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", 1), write_run(tmp_path / "b", 2, gain=0.012)]
    (comparison,) = compare(runs, output=tmp_path / "out")["comparisons"]
    pairs = paired(tmp_path / "out", runs)
    differences = {organ: np.array([b - a for _, a, b in rows]) for organ, rows in pairs.items()}
    p = {organ: stats.wilcoxon(d, method="exact").pvalue for organ, d in differences.items()}
    ordered = sorted(p, key=lambda organ: p[organ])
    corrected = np.maximum.accumulate([min(1, p[organ] * (3 - n)) for n, organ in enumerate(ordered)])
    with (tmp_path / "out" / "comparison.csv").open(newline="") as stream:
        table = {row["organ"]: row for row in csv.DictReader(stream)}
    for organ, p_holm in zip(ordered, corrected, strict=True):
        found, d = comparison["organs"][organ], differences[organ]
        assert found["n"] == found["n_patients"] == 20
        assert found["difference"] == pytest.approx(d.mean())
        assert found["p"] == pytest.approx(p[organ])
        assert found["p_holm"] == pytest.approx(p_holm)
        more = stats.wilcoxon(d, alternative="greater").statistic
        assert found["effect_size"] == pytest.approx((2 * more - 210) / 210)
        assert (found["wins"], found["losses"]) == ((d > 0).sum(), (d < 0).sum())
        t = stats.bootstrap((d,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
        assert found["ci95"] == pytest.approx(tuple(t), abs=0.15 * (t.high - t.low))  # ours is a little wider
        before, now = (np.array([row[n] for row in pairs[organ]]) for n in (1, 2))
        assert found["baseline_ci95"] == pytest.approx(bootstrap_ci(before), abs=1e-9)
        assert found["run_ci95"] == pytest.approx(bootstrap_ci(now), abs=1e-9)
        assert float(table[organ]["p_holm"]) == pytest.approx(p_holm)
        assert float(table[organ]["ci95_low"]) == found["ci95"][0]
    joint = np.stack(list(differences.values()), axis=1)
    assert comparison["mean_difference"] == pytest.approx(joint.mean())
    assert comparison["mean_ci95"] == pytest.approx(bootstrap_ci(joint.mean(axis=1)), abs=1e-9)


def test_scans_of_one_patient_are_resampled_together_and_tested_as_one(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", 1, scans=2), write_run(tmp_path / "b", 2, scans=2)]
    (comparison,) = compare(runs, output=tmp_path / "out")["comparisons"]
    for organ, rows in paired(tmp_path / "out", runs).items():
        found = comparison["organs"][organ]
        assert (found["n"], found["n_patients"]) == (20, 10)
        d = np.array([b - a for _, a, b in rows])
        assert found["p"] == pytest.approx(stats.wilcoxon(d.reshape(10, 2).mean(axis=1), method="exact").pvalue)
        assert found["ci95"] == pytest.approx(bootstrap_ci(d.reshape(10, 2).mean(axis=1)), abs=1e-9)


def test_holms_correction_is_over_all_runs_and_organs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(n), n, gain=0.004 * n) for n in range(3)]
    found = [organ for c in compare(runs)["comparisons"] for organ in c["organs"].values()]
    assert len(found) == 6
    smallest = min(found, key=lambda organ: organ["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, 6 * smallest["p"]))


MISSES = """case,organ,hd95,diagonal_mm,note
a,liver,4.0,300,
b,liver,,300,missed
c,liver,,300,missed
d,liver,,300,absent in both
e,liver,,300,absent in both
f,liver,2.0,300,
"""
FINDS = """case,organ,hd95,note
a,liver,5.0,
b,liver,6.0,
c,liver,,missed
d,liver,,false positive: absent in the reference
e,liver,,absent in both
f,liver,,missed
"""


def test_a_missed_or_invented_organ_is_as_far_off_as_the_scan_is_long(tmp_path: Path) -> None:
    runs = [str(tmp_path / "misses.csv"), str(tmp_path / "finds.csv")]
    for path, text in zip(runs, (MISSES, FINDS), strict=True):
        Path(path).write_text(text)
    (comparison,) = compare(runs, metric="hd95", output=tmp_path / "out")["comparisons"]
    liver = comparison["organs"]["liver"]
    assert liver["n"] == 5  # e has no liver, which both know
    assert liver["baseline"] == pytest.approx((4 + 300 + 300 + 0 + 2) / 5)
    assert liver["run"] == pytest.approx((5 + 6 + 300 + 300 + 300) / 5)
    assert (liver["wins"], liver["ties"], liver["losses"]) == (1, 1, 3)
    assert (liver["missed_baseline"], liver["missed_run"]) == (2, 2)
    assert (liver["spurious_baseline"], liver["spurious_run"]) == (0, 1)
    assert liver["n_unscored"] == 0
    text = shown(comparison_table(compare(runs, metric="hd95")))
    assert "missed and invented organs count as the diagonal of their scan" in text
    assert [words[-1] for words in rows_of(text, "liver")] == ["2→2", "0→1"]
    with (tmp_path / "out" / "pairs.csv").open(newline="") as stream:
        assert [row[runs[1]] for row in csv.DictReader(stream)] == ["5.0", "6.0", "300.0", "300.0", "", "300.0"]


def test_without_a_diagonal_missed_organs_are_left_out_said_and_worse(tmp_path: Path) -> None:
    runs = [str(tmp_path / "misses.csv"), str(tmp_path / "finds.csv")]
    for path, text in zip(runs, (MISSES.replace(",300,", ",,"), FINDS), strict=True):
        Path(path).write_text(text)
    result = compare(runs, metric="hd95")
    (comparison,) = result["comparisons"]
    assert comparison["organs"]["liver"]["n"] == 1
    assert comparison["organs"]["liver"]["n_unscored"] == 4  # b, c, d, f
    assert comparison["lost"] == [["f", "liver"]]
    assert comparison["worse"]
    assert any("4 pairs left out" in warning and "diagonal_mm" in warning for warning in result["warnings"])


def test_runs_of_other_data_are_compared_with_a_warning(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", 1, tags={"medseg.data_hash": "aaaa"}),
        write_run(tmp_path / "b", 2, tags={"medseg.data_hash": "bbbb"}),
        write_run(tmp_path / "c", 3),
        write_run(tmp_path / "d", 3, tags={"medseg.data_hash": "aaaa"}),
    ]
    result = compare(runs, output=tmp_path / "out")
    (warning,) = result["warnings"]
    assert "different data" in warning
    assert "aaaa (a); bbbb (b)" in warning
    assert warning in shown(comparison_table(result)).replace("\n", "")
    assert warning in (tmp_path / "out" / "comparison.html").read_text()


def test_runs_are_called_by_the_part_of_their_path_that_differs(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    runs = [write_run(tmp_path / "x" / name, n) for n, name in enumerate(("dice", "tversky"))]
    result = compare(runs)
    assert (result["baseline_label"], result["comparisons"][0]["label"]) == ("dice", "tversky")
    assert result["baseline"] == runs[0]


def tracked(path: Path, name: str, **tags: str) -> TrackedRun:
    with (path / "per_case.csv").open(newline="") as stream:
        return TrackedRun(f"{name:0>32}", name, tags, list(csv.DictReader(stream)))


def test_an_experiments_runs_are_ranked_on_the_cases_that_all_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [write_run(tmp_path / str(n), n, gain=0.01 * n, cases=20 - n) for n in range(3)]
    runs = [tracked(Path(folder), f"run{n}") for n, folder in enumerate(folders)]
    monkeypatch.setattr(module, "experiment_runs", lambda experiment, uri: runs)
    result = rank_experiment("liver", output=tmp_path / "out")
    assert result["n_cases"] == 18
    assert "do not have the same cases" in result["warnings"][0]
    values = np.array([[float(row["dice"]) for row in run.rows[: 18 * 3]] for run in runs]).reshape(3, 18, 3)
    means = values.mean(axis=2)
    assert [row["run"].split()[0] for row in result["ranking"]] == ["run2", "run1", "run0"]
    p = [stats.wilcoxon(means[n] - means[2], method="exact").pvalue for n in (1, 0)]
    for row, n, p_value in zip(result["ranking"], (2, 1, 0), (math.nan, *p), strict=True):
        assert row["mean"] == pytest.approx(values[n].mean())
        assert row["ci95"] == pytest.approx(bootstrap_ci(means[n]), abs=1e-9)
        assert row["difference"] == pytest.approx(values[n].mean() - values[2].mean(), abs=1e-12)
        assert row["p"] == pytest.approx(p_value, nan_ok=True)
    assert min(row["p_holm"] for row in result["ranking"][1:]) == pytest.approx(2 * min(p))
    assert "liver: 3 runs, 18 cases" in shown(ranking_table(result))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ranking.csv", "ranking.html", "ranking.png"}


def test_runs_of_other_cases_are_not_ranked_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tracked(Path(write_run(tmp_path / str(n), n)), f"run{n}") for n in range(3)]
    other = TrackedRun("9" * 32, "other", {}, [{"case": "z", "organ": "whole", "dice": "1"}])
    without = TrackedRun("8" * 32, "old", {}, [{"case": "z", "organ": "whole", "iou": "1"}])
    monkeypatch.setattr(module, "experiment_runs", lambda experiment, uri: [other, *runs, without])
    result = rank_experiment("liver")
    assert len(result["ranking"]) == 3
    assert "old (88888888) is not ranked: its table has no dice" in result["warnings"]
    assert any("other (99999999)" in warning for warning in result["warnings"])
    monkeypatch.setattr(module, "experiment_runs", lambda experiment, uri: [other, runs[0]])
    with pytest.raises(DataError, match="E-COMPARE-RUNS"):
        rank_experiment("liver")


def test_a_run_that_lacks_organs_is_named_with_them_and_so_is_what_is_ranked_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tracked(Path(write_run(tmp_path / str(n), n)), f"run{n}") for n in range(3)]
    part = replace(runs[1], rows=[row for row in runs[1].rows if row["organ"] == "whole"])
    monkeypatch.setattr(module, "experiment_runs", lambda experiment, uri: [runs[0], part, runs[2]])
    result = rank_experiment("liver", output=tmp_path / "out")
    assert result["warnings"] == ["left out, as run1 (00000000) does not have them: organs anterior, posterior"]
    assert result["organs"] == ["whole"]
    assert "liver: 3 runs, 20 cases; whole" in shown(ranking_table(result))
    assert " of whole</h1>" in (tmp_path / "out" / "ranking.html").read_text()
    gap = replace(runs[1], rows=runs[1].rows[1:])
    monkeypatch.setattr(module, "experiment_runs", lambda experiment, uri: [runs[0], gap])
    (warning,) = rank_experiment("liver")["warnings"]
    assert "do not have the same organs of each case" in warning


def test_runs_with_organs_of_other_names_are_not_ranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tracked(Path(write_run(tmp_path / str(n), n)), f"run{n}") for n in range(3)]
    other = replace(runs[1], rows=[row | {"organ": f"label {row['organ']}"} for row in runs[1].rows])
    monkeypatch.setattr(module, "experiment_runs", lambda experiment, uri: [runs[0], other, runs[2]])
    result = rank_experiment("liver")
    assert {row["run"].split()[0] for row in result["ranking"]} == {"run0", "run2"}
    assert any("not ranked" in warning and "run1 (00000000)" in warning for warning in result["warnings"])


def test_only_what_is_ranked_by_counts_as_diagonal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(csv.DictReader(MISSES.splitlines()))
    runs = [TrackedRun(f"{n:0>32}", f"run{n}", {}, rows) for n in range(2)]
    more = replace(runs[0], rows=[*rows, rows[1] | {"organ": "spleen"}, rows[1] | {"case": "z"}])
    monkeypatch.setattr(module, "experiment_runs", lambda experiment, uri: [more, runs[1]])
    assert rank_experiment("liver", metric="hd95")["n_as_diagonal"] == 4  # b and c of both


def test_what_is_logged_numbers_the_patients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store that others read; the user's own folder names them."""
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = open_store(uri)
    experiment = client.create_experiment("liver", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    evaluated = Path(write_run(tmp_path / "evaluated", 0, cases=4, scans=2)) / "per_case.csv"
    (tmp_path / "per_case.csv").write_text(evaluated.read_text().replace("patient0", ""))
    client.log_artifact(run_id, str(tmp_path / "per_case.csv"))
    client.set_terminated(run_id)
    evaluated.write_text(evaluated.read_text().replace("patient0", "Doe^Jane"))
    compare([str(evaluated.parent), run_id], tracking_uri=uri, output=tmp_path / "out")
    logged = [path for path in (tmp_path / "artifacts").rglob("comparisons/*/*") if path.is_file()]
    assert len(logged) == 4
    assert not any(b"Doe" in path.read_bytes() for path in [*logged, tmp_path / "mlflow.db"])
    pairs = next(path for path in logged if path.name == "pairs.csv")
    with pairs.open(newline="") as stream:
        assert [row["patient"] for row in csv.DictReader(stream)] == ["1"] * 6 + ["2"] * 6
    assert "Doe^Jane0" in (tmp_path / "out" / "pairs.csv").read_text()


def test_runs_of_a_store_are_ranked_and_what_is_compared_lies_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = open_store(uri)
    experiment = client.create_experiment("liver", artifact_location=(tmp_path / "artifacts").as_uri())
    for n in range(3):
        folder = write_run(tmp_path / str(n), n, gain=0.01 * n)
        run_id = client.create_run(experiment, run_name=f"run{n}").info.run_id
        client.log_artifact(run_id, f"{folder}/per_case.csv")
        client.set_terminated(run_id)
    ranking = rank_experiment("liver", tracking_uri=uri)["ranking"]
    assert [row["run"].split()[0] for row in ranking] == ["run2", "run1", "run0"]
    first, second = (row["run_id"] for row in ranking[:2])
    assert compare([first, second], tracking_uri=uri)["warnings"] == []
    for run_id in (first, second):
        (logged,) = client.list_artifacts(run_id, "comparisons")
        assert "comparison.html" in {Path(entry.path).name for entry in client.list_artifacts(run_id, logged.path)}


def test_forty_runs_of_a_hundred_cases_are_ranked_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tracked(Path(write_run(tmp_path / str(n), n, gain=0.001 * n, cases=100)), f"run{n}") for n in range(40)]
    monkeypatch.setattr(module, "experiment_runs", lambda experiment, uri: runs)
    start = time.process_time()
    ranking = rank_experiment("liver")["ranking"]
    seconds = time.process_time() - start
    assert len(ranking) == 40
    assert ranking[0]["mean"] - ranking[-1]["mean"] > 0.02
    assert ranking[-1]["p_holm"] < 0.001
    assert seconds < 3  # reading them from the store comes on top


@pytest.mark.parametrize("metric", ["volume_ml", "relative_volume_difference", "note"])
def test_what_has_no_better_and_worse_is_not_compared(runs: list[str], metric: str) -> None:
    for run in (Path(runs[0], "per_case.csv"), Path(runs[1])):
        run.write_text(run.read_text().replace("hd95", metric, 1) if metric != "note" else run.read_text())
    with pytest.raises(DataError, match="E-COMPARE-METRIC"):
        compare(runs, metric=metric)


def test_a_result_that_only_the_first_run_has_makes_the_other_worse_whatever_its_notes_say(tmp_path: Path) -> None:
    rows = [f"{case},liver,{value}" for case, value in zip("abc", (2.0, 3.0, 4.0), strict=True)]
    (tmp_path / "before.csv").write_text("\n".join(["case,organ,hd95", *rows]))
    (tmp_path / "now.csv").write_text("\n".join(["case,organ,hd95", *rows[:2], "c,liver,"]))
    (found,) = compare([str(tmp_path / "before.csv"), str(tmp_path / "now.csv")], metric="hd95")["comparisons"]
    assert found["why_worse"] == ["1 result missing"]


def test_references_that_differ_are_told(runs: list[str]) -> None:
    now = Path(runs[1])
    now.write_text(NOW.replace("c,liver,6.0,0.60,", "c,liver,,0,false positive: absent in the reference"))
    warnings = compare(runs)["comparisons"] and compare(runs)["warnings"]
    assert any("scored against other references" in text and "liver of c" in text for text in warnings)
    assert not any("other references" in text for text in compare([runs[0], runs[0]])["warnings"])
