"""``python -m medseg``: the command where its script is not on the path."""

from medseg.cli import app

app(prog_name="medseg")
