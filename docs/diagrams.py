"""Draws every network for docs/networks.md, as `medseg nets NAME --picture` does.

python docs/diagrams.py
"""

from __future__ import annotations

from pathlib import Path

from medseg.nets import NETS
from medseg.nets.describe import drawn

FOLDER = Path(__file__).with_name("networks")


def main() -> None:
    """Draw them all."""
    FOLDER.mkdir(exist_ok=True)
    for name in NETS:
        (FOLDER / f"{name}.svg").write_text(drawn(name), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
