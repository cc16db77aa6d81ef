"""Synthetic abdominal CT and 2D pictures with exact labels: the embedded default data.

From the ground up: `solids` are formulas, `tissues` their HU, `atlas` the frame; `trunk` and
`viscera` fill it, `patient` varies it, `scanner` renders it on a grid, and `cases` is the way in.
"""

from medseg.data.phantom.cases import LABELS, Phantom, ct_case, make_cases, picture

__all__ = ["LABELS", "Phantom", "ct_case", "make_cases", "picture"]
