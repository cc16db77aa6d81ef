from __future__ import annotations

import io
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medseg.compare import compare
from medseg.reporting.comparison import comparison_page
from medseg.reporting.comparison_figure import BETTER, WORSE, comparison_figure, png
from medseg.reporting.comparison_table import p_text, with_interval

ORGANS = ("liver", "<spleen>")


@pytest.fixture
def made(tmp_path: Path) -> tuple[dict[str, Any], list[dict[str, dict[str, float]]]]:
    """A run that is better in the liver in every case and the same in the spleen, and its differences."""
    random = np.random.default_rng(0)
    found: dict[str, dict[str, float]] = {organ: {} for organ in ORGANS}
    tables = [["case,organ,dice"], ["case,organ,dice"]]
    for n in range(12):
        for organ in ORGANS:
            before = random.uniform(0.7, 0.9)
            now = before + (random.uniform(0.01, 0.03) if organ == "liver" else random.normal(0, 0.01))
            tables[0].append(f"case{n},{organ},{before:.6f}")
            tables[1].append(f"case{n},{organ},{now:.6f}")
            found[organ][f"case{n}"] = now - before
    for name, lines in zip(("a", "b"), tables, strict=True):
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return compare([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]), [found]


def texts(page: str) -> str:
    """What a reader reads."""
    parser, words = HTMLParser(), []
    parser.handle_data = words.append  # type: ignore[method-assign]
    parser.feed(page)
    return " ".join(" ".join(words).split())


def test_the_page_says_what_was_found_and_how_to_read_it(made: tuple[Any, Any]) -> None:
    page = comparison_page(*made)
    text = texts(page)
    assert "b.csv is better than a.csv in liver (+0.0" in text
    assert "in <spleen> these cases do not tell the two runs apart" in text
    assert "One run each says nothing about the variance of training." in text
    assert "Nothing was left out." in text
    assert "neither run missed an organ" in text
    assert "<spleen>" not in page
    assert "<svg" in page


def test_the_page_names_every_case_that_was_left_out(made: tuple[Any, Any]) -> None:
    result, differences = made
    result["comparisons"][0]["unpaired"]["baseline"] = [f"gone{n}" for n in range(8)]
    result["warnings"] = ["b.csv: left out: cases gone0, gone1, gone2, gone3, gone4 and 3 more"]
    assert "only a.csv has: gone0, gone1, gone2, gone3, gone4, gone5, gone6, gone7" in texts(
        comparison_page(result, differences)
    )


def test_the_page_tells_what_misses_and_few_patients_mean(made: tuple[Any, Any]) -> None:
    result, differences = made
    result["comparisons"][0]["organs"]["liver"] |= {
        "missed_baseline": 2,
        "missed_run": 1,
        "p": math.nan,
        "p_holm": math.nan,
    }
    text = texts(comparison_page(result, differences))
    assert "missed organs: liver: 2 before, 1 now" in text
    assert "too few" in text


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_dots_of_better_cases_are_blue_and_of_worse_ones_orange(made: tuple[Any, Any], lower_is_better: bool) -> None:
    result, differences = made
    result["lower_is_better"] = lower_is_better
    differences[0]["<spleen>"] = {"a": -0.02, "b": -0.01}
    picture = np.asarray(Image.open(io.BytesIO(png(comparison_figure(result, differences)))).convert("RGB")).astype(int)
    half = picture.shape[1] // 2
    colors = {
        name: tuple(int(shade[i : i + 2], 16) for i in (1, 3, 5)) for name, shade in (("+", BETTER), ("-", WORSE))
    }

    def bluish(part: np.ndarray[Any, Any]) -> int:
        return int((part[..., 2] - part[..., 0] > 60).sum() - (part[..., 0] - part[..., 2] > 60).sum())

    assert colors["+"][2] > colors["+"][0]
    right, left = bluish(picture[:, half:]), bluish(picture[:, :half])
    assert (right < 0 < left) if lower_is_better else (left < 0 < right)


def test_a_miss_does_not_squeeze_the_other_dots(made: tuple[Any, Any]) -> None:
    result, differences = made
    differences[0]["liver"]["case0"] = 300.0
    (axes,) = comparison_figure(result, differences).axes
    assert axes.get_xlim()[1] < 1
    assert "1 farther out" in [text.get_text() for text in axes.texts]


def test_runs_that_are_the_same_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("case,organ,dice\na,liver,0.5\nb,liver,\n")
    result = compare([str(tmp_path / "a.csv")] * 2)
    assert png(comparison_figure(result, [{"liver": {"a": 0.0}}]))[:4] == b"\x89PNG"


def test_numbers_read_as_people_write_them() -> None:
    assert with_interval(0.0123, (-0.004, 0.03), signed=True) == "+0.012 [-0.004, 0.030]"
    assert with_interval(0.5, (math.nan, math.nan)) == "0.500"
    assert with_interval(math.nan, (math.nan, math.nan)) == "–"
    assert (p_text(0.0001), p_text(0.0312), p_text(math.nan)) == ("<0.001", "0.031", "too few")
