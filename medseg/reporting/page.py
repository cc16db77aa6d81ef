"""A page that people look at: one HTML file without a network."""

from __future__ import annotations

import io
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --text: #1d1d1f; --quiet: #6e6e73; --line: #d2d2d7; --ground: #fff; --card: #f5f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --text: #f5f5f7; --quiet: #a1a1a6; --line: #424245; --ground: #1d1d1f; --card: #2a2a2c; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground); max-width: 62rem;
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: .93rem; }
th, td { text-align: right; padding: .4rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
"""


def html_page(title: str, body: str) -> str:
    """A complete document."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def figure_svg(figure: Figure) -> str:
    """A figure as inline SVG."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "medseg"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
