"""The page in a real browser: nothing leaves it, and what it draws lies on the right organ on the right side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from medseg.reporting import viewer
from medseg.reporting.page import asset, html_page
from medseg.reporting.run_page import write_run_page
from medseg.reporting.tables import MIN_FILTERED, Column, sortable_table

from .browser import Browser, find_browser
from .run_folders import make_run, right_sided, shifted

pytestmark = [
    pytest.mark.slow,  # without a GPU a view takes half a minute to draw
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed (on Debian: apt install chromium)"),
]

Picture = npt.NDArray[np.uint8]
READY = "document.getElementById('viewer').dataset"
BLUE, ORANGE = (86, 180, 233), (230, 159, 0)
"""Liver and spleen."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    predictions = {
        "exact": right_sided(),
        "off": shifted(right_sided(), (5, 0, 0)),
        "near": shifted(right_sided(), (1, 0, 0)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viewer, "FINEST", 1)  # without a GPU every voxel counts
        write_run_page(make_run(folder / "run", predictions), folder / "page.html", {"seconds": 100})
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.open(page)
        opened.wait_for(f"{READY}.ready ?? {READY}.failed")
        yield opened


def show(browser: Browser, name: str, **layers: bool) -> None:
    """Choose a case by the beginning of its button, and which layers are seen."""
    browser.evaluate(
        f"[...document.querySelectorAll('[data-case]')].find(b => b.textContent.startsWith('{name}')).click()"
    )
    browser.wait_for(f"{READY}.ready")
    for layer, visible in layers.items():
        box = f"document.querySelector('input[name={layer}]')"
        browser.evaluate(f"{box}.checked === {str(visible).lower()} || {box}.click()")
    browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def axial(browser: Browser) -> Picture:
    """The axial slice, as it is seen."""
    shown = "document.getElementById('viewer').medseg.nv"
    whole = browser.drawn("#viewer canvas", f"{shown}.drawScene()")
    tile: Any = browser.evaluate(f"Array.from({shown}.screenSlices.find(s => s.axCorSag === 0).leftTopWidthHeight)")
    left, top, width, height = (round(number) for number in tile)
    return whole[top : top + height, left : left + width]


def place(picture: Picture, color: tuple[int, int, int]) -> tuple[float, float]:
    """Where a color is, as a share of the width and of the height; a tinted gray counts too."""
    value = picture.astype(float)
    tint = value - value.mean(axis=-1, keepdims=True)
    wanted = np.array(color) - np.mean(color)
    likeness = tint @ wanted / (np.linalg.norm(tint, axis=-1) * np.linalg.norm(wanted) + 1e-9)
    rows, columns = np.nonzero((likeness > 0.95) & (np.linalg.norm(tint, axis=-1) > 25))
    assert len(rows) > 50, "the color is not there"
    return columns.mean() / picture.shape[1], rows.mean() / picture.shape[0]


def test_the_viewer_starts_from_disk_without_a_request_or_a_complaint(browser: Browser, page: Path) -> None:
    assert browser.evaluate(f"{READY}.failed") is None
    assert browser.requests() == []
    assert browser.complaints() == []
    assert page.stat().st_size < 20_000_000


def test_the_policy_stops_a_request_that_somebody_smuggles_in(browser: Browser) -> None:
    tried = "fetch('https://example.org/x').then(() => 'sent', () => 'refused')"
    assert browser.evaluate(tried) == "refused"
    assert browser.requests() == []


def test_the_patients_right_is_at_the_left_and_the_front_is_up(browser: Browser) -> None:
    show(browser, "best", prediction=True, reference=False)
    picture = axial(browser)
    liver, spleen = place(picture, BLUE), place(picture, ORANGE)
    assert liver[0] < 0.45, "the liver is the patient's right, which is at the left"
    assert spleen[0] > 0.6
    assert liver[1] < spleen[1], "the spleen lies behind"


def test_color_and_outline_lie_on_the_organ_itself(browser: Browser) -> None:
    show(browser, "best", prediction=True, reference=False)
    colored = place(axial(browser), BLUE)
    show(browser, "best", prediction=False, reference=False)
    bare = axial(browser)
    with pytest.raises(AssertionError, match="the color is not there"):
        place(bare, BLUE)
    gray = bare[..., 1].astype(float)
    half = gray[:, : gray.shape[1] // 2]
    rows, columns = np.nonzero(half > (half.min() + half.max()) / 2)
    organ = columns.mean() / gray.shape[1], rows.mean() / gray.shape[0]
    assert colored == pytest.approx(organ, abs=0.04)
    show(browser, "best", prediction=False, reference=True)
    white = (axial(browser).min(axis=-1) > 245)[:, : gray.shape[1] // 2]
    rows, columns = np.nonzero(white)
    assert (
        (columns.min() + columns.max()) / 2 / gray.shape[1],
        (rows.min() + rows.max()) / 2 / gray.shape[0],
    ) == pytest.approx(organ, abs=0.05)


def test_a_shifted_prediction_is_seen_shifted_to_the_patients_left(browser: Browser) -> None:
    show(browser, "worst", prediction=True, reference=True)
    picture = axial(browser)
    white = np.nonzero((picture.min(axis=-1) > 245)[:, : picture.shape[1] // 2])[1]
    assert place(picture, BLUE)[0] > (white.min() + white.max()) / 2 / picture.shape[1] + 0.03


def test_a_heading_sorts_the_table_both_ways(browser: Browser) -> None:
    names = "[...document.querySelectorAll('table.sortable tbody th')].map(c => c.textContent)"
    assert browser.evaluate(names) == ["off", "near", "exact"]
    for expected in (["exact", "near", "off"], ["off", "near", "exact"]):
        browser.evaluate("document.querySelectorAll('table.sortable thead button')[0].click()")
        assert browser.evaluate(names) == expected


def test_a_field_above_a_long_table_filters_its_rows(tmp_path: Path) -> None:
    cases = [(f"c{n}", f"case-{n}") for n in range(MIN_FILTERED)]
    notes = Column("note", ["liver: Not found" if n in (3, 7) else "" for n in range(MIN_FILTERED)])
    script = f"<script>{viewer.inline_script(asset('page.js'))}</script>"
    (tmp_path / "page.html").write_text(html_page("t", sortable_table(cases, [notes], {}) + script))
    seen = "[...document.querySelectorAll('tbody tr')].filter(row => row.offsetHeight).map(row => row.id)"
    typed = (
        "(field => (field.value = '{}', field.dispatchEvent(new Event('input'))))(document.querySelector('.filter'))"
    )
    with Browser(tmp_path / "profile") as opened:
        opened.open(tmp_path / "page.html")
        assert len(opened.evaluate(seen)) == MIN_FILTERED
        opened.evaluate(typed.format("not FOUND "))
        assert opened.evaluate(seen) == ["case-3", "case-7"]
        opened.evaluate(typed.format(""))
        assert len(opened.evaluate(seen)) == MIN_FILTERED
