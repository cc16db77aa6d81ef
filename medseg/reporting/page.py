"""One HTML file that needs nothing else: its style, its figures and its pictures stand in it, and it asks no network."""

from __future__ import annotations

import base64
import io
import re
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
"""What the page is called in the folder of what it tells of."""

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
    "base-uri 'none'; form-action 'none'"
)
"""What the browser may load: nothing but what stands in the page; so no number and no scan leaves it."""

PICTURE_QUALITY = 88


def html_page(title: str, body: str) -> str:
    """A complete document, for light and dark screens and for paper.

    Args:
        title: Plain text, for the browser's tab.
        body: HTML; whatever it takes from elsewhere is escaped already.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<style>
{asset("page.css")}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def figure_svg(figure: Figure, label: str = "") -> str:
    """A figure as inline SVG: the same bytes for the same figure; black becomes the page's own text color.

    Args:
        figure: Of matplotlib. Its backgrounds are left out, so that it lies on light and on dark pages.
        label: What it shows, for those who cannot see it.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "medseg", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("stroke: #000000", "stroke: currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # names addresses, which nobody asks
    described = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*" height="[^"]*"', rf'<svg \1 fill="currentColor" {described}', svg)
    svg = re.sub(
        r'^<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', rf'<svg \1\2 fill="currentColor" {described}', svg
    )
    return svg


def picture_html(picture: npt.NDArray[np.uint8], alt: str) -> str:
    """An RGB picture (H, W, 3) as an ``<img>`` that holds it.

    Args:
        picture: Its pixels.
        alt: What it shows, for those who cannot see it.
    """
    from PIL import Image

    stored = io.BytesIO()
    Image.fromarray(picture).save(stored, format="WEBP", quality=PICTURE_QUALITY)
    height, width = picture.shape[:2]
    content = f"data:image/webp;base64,{base64.b64encode(stored.getvalue()).decode()}"
    return f'<img src="{content}" width="{width}" height="{height}" alt="{escape(alt)}">'


def section(heading: str, content: str, *, explanation: str = "") -> str:
    """A part of a page.

    Args:
        heading: Plain text.
        content: HTML.
        explanation: HTML that says how to read it.
    """
    told = f'<p class="explanation">{explanation}</p>\n' if explanation else ""
    return f"<section>\n<h2>{escape(heading)}</h2>\n{told}{content}\n</section>"


def definitions(entries: dict[str, Any]) -> str:
    """Names and what they are, as a list; entries without a value are left out."""
    rows = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in entries.items()
        if value not in (None, "")
    ]
    return f'<dl class="definitions">{"".join(rows)}</dl>'


def asset(name: str) -> str:
    """The text of a file in ``assets``."""
    return files("medseg.reporting").joinpath("assets", name).read_text(encoding="utf-8")
