"""The losses: LOSSES names those a workflow can sum; all take (logits, target, mask=None)."""

from __future__ import annotations

from torch import nn

from medseg.losses.compound import Compound, DeepSupervision, Ramp
from medseg.losses.overlap import Dice, Tversky
from medseg.losses.pixelwise import CrossEntropy
from medseg.registry import Registry

__all__ = ["LOSSES", "Compound", "CrossEntropy", "DeepSupervision", "Dice", "Ramp", "Tversky"]

LOSSES: Registry[type[nn.Module]] = Registry("loss", {"cross_entropy": CrossEntropy, "dice": Dice, "tversky": Tversky})
"""Each class also says its `title`, its `paper` and what it is `good_for`."""
