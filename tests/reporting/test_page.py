"""Pages and figures that need nothing but themselves."""

from __future__ import annotations

import re

import numpy as np
from matplotlib.figure import Figure

from medseg.reporting.page import definitions, figure_svg, html_page, picture_html
from medseg.reporting.viewer import inline_script


def figure() -> Figure:
    made = Figure(figsize=(3, 2))
    axes = made.add_subplot()
    axes.plot([0, 1], [0, 1], color="black")
    axes.set_xlabel("iteration")
    return made


def test_a_page_forbids_its_browser_every_request() -> None:
    page = html_page("t", "<p>b</p>")
    assert "default-src 'none'" in page
    assert "connect-src" not in page
    assert not re.search(r"https?://", page)


def test_a_title_is_escaped() -> None:
    assert "<title>&lt;b&gt; &amp; co</title>" in html_page("<b> & co", "")


def test_a_figure_is_the_same_text_each_time_and_takes_the_pages_color() -> None:
    first, again = figure_svg(figure(), "a < b"), figure_svg(figure(), "a < b")
    assert first == again
    assert first.startswith("<svg ")
    assert first.count("<svg") == 1
    assert "stroke: currentColor" in first
    assert "#ffffff" not in first
    assert 'role="img" aria-label="a &lt; b"' in first
    assert not re.search(r'^<svg [^>]*(width|height)="', first), "it fills its place"
    assert ">iteration</text>" in first, "text stays text"


def test_a_picture_stands_in_the_page_with_its_size_and_description() -> None:
    html = picture_html(np.zeros((4, 6, 3), np.uint8), 'contours of "x"')
    assert 'src="data:image/webp;base64,' in html
    assert 'width="6" height="4"' in html
    assert 'alt="contours of &quot;x&quot;"' in html


def test_definitions_leave_out_what_is_not_known() -> None:
    html = definitions({"fold": 0, "commit": None, "<x>": "<y>"})
    assert "<dd>0</dd>" in html
    assert "commit" not in html
    assert "&lt;x&gt;" in html
    assert "&lt;y&gt;" in html


def test_no_program_ends_its_own_element() -> None:
    assert "</script" not in inline_script('x = "</script>"')
