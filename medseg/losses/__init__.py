"""The losses: LOSSES names those a workflow can sum; all take (logits, target, mask=None)."""

from __future__ import annotations

from torch import nn

from medseg.losses.boundary import Boundary, Hausdorff
from medseg.losses.compound import Compound, DeepSupervision, Ramp
from medseg.losses.lovasz import Lovasz
from medseg.losses.overlap import Dice, FocalTversky, GeneralizedDice, Tversky
from medseg.losses.pixelwise import BinaryCrossEntropy, CrossEntropy, Focal, TopK
from medseg.losses.skeleton import ClDice
from medseg.registry import Registry

__all__ = [
    "BESIDE_OVERLAP",
    "LOSSES",
    "BinaryCrossEntropy",
    "Boundary",
    "ClDice",
    "Compound",
    "CrossEntropy",
    "DeepSupervision",
    "Dice",
    "Focal",
    "FocalTversky",
    "GeneralizedDice",
    "Hausdorff",
    "Lovasz",
    "Ramp",
    "TopK",
    "Tversky",
]

LOSSES: Registry[type[nn.Module]] = Registry(
    "loss",
    {
        "cross_entropy": CrossEntropy,
        "binary_cross_entropy": BinaryCrossEntropy,
        "top_k": TopK,
        "focal": Focal,
        "dice": Dice,
        "generalized_dice": GeneralizedDice,
        "tversky": Tversky,
        "focal_tversky": FocalTversky,
        "lovasz": Lovasz,
        "boundary": Boundary,
        "hausdorff": Hausdorff,
        "cldice": ClDice,
    },
)
"""Each class also says its `title`, its `paper` and what it is `good_for`."""

BESIDE_OVERLAP = frozenset({"boundary", "hausdorff", "cldice"})
"""Those that their papers add to a loss of overlap."""
