"""Post-processing chosen on held-out cases: what raises their Dice by more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.inference.postprocess import LabelMap, is_smaller, pieces_of
from medseg.metrics.statistics import bootstrap_ci

VOLUMES_ML = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Smallest volumes that are tried: from a voxel of a CT to half a kidney."""

LEAST_GAIN = 0.001
"""Mean gain in Dice below which a step is not worth having."""

FEW_PATIENTS = 10
"""With fewer, what is chosen may be chance, and a person is told so."""

Candidate = tuple[str, float]
"""A step's name and its amount."""

CANDIDATES: tuple[Candidate, ...] = (("keep_largest", 0.0), *(("min_volume_ml", ml) for ml in VOLUMES_ML))


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of an organ in one prediction: all that is needed to say what the Dice would be without some.

    Args:
        sizes: Voxels of each piece.
        counted: Of these, those that do not have the ignore label in the reference.
        correct: Of these, those of the organ in the reference.
        in_reference: Voxels of the organ in the reference.
        voxel_ml: Volume of a voxel; NaN for a picture.
    """

    sizes: npt.NDArray[np.int64]
    counted: npt.NDArray[np.int64]
    correct: npt.NDArray[np.int64]
    in_reference: int
    voxel_ml: float

    def dice(self, kept: npt.NDArray[np.bool_]) -> float:
        """With only some of the pieces. 1 where neither has any: an organ that is rightly gone is no loss."""
        total = self.in_reference + int(self.counted[kept].sum())
        return 2 * int(self.correct[kept].sum()) / total if total else 1.0

    def gain(self, candidate: Candidate) -> float:
        """What a step does to the Dice."""
        step, amount = candidate
        if step == "keep_largest":
            kept = np.arange(len(self.sizes)) == (self.sizes.argmax() if len(self.sizes) else -1)
        else:
            kept = ~is_smaller(self.sizes, amount, self.voxel_ml)
        return self.dice(kept) - self.dice(np.ones_like(kept))


@dataclass(frozen=True)
class Choice:
    """A step that is worth having for an organ.

    Args:
        organ: Its name.
        step: The step's name.
        amount: What the step takes.
        gain: Mean gain in Dice.
        ci95: Where the mean gain lies.
    """

    organ: str
    step: str
    amount: float
    gain: float
    ci95: tuple[float, float]

    def __str__(self) -> str:
        amount = f" {self.amount:g}" if self.amount else ""
        low, high = self.ci95
        return f"{self.step}{amount} for {self.organ} (Dice {self.gain:+.4f}, 95 % interval {low:+.4f} to {high:+.4f})"


def pieces_in(
    prediction: LabelMap,
    reference: LabelMap,
    organs: Mapping[str, Sequence[int]],
    *,
    voxel_ml: float,
    ignore_label: int | None = None,
) -> dict[str, Pieces]:
    """The pieces of each organ.

    Args:
        prediction: (I, J[, K]).
        reference: Same shape.
        organs: Label values of each.
        voxel_ml: Volume of a voxel; NaN for a picture.
        ignore_label: Value of the reference's voxels that do not count.
    """
    found = {}
    for organ, values in organs.items():
        in_reference = np.isin(reference, values)
        mask = np.isin(prediction, values)
        boxes = ndimage.find_objects(mask.astype(np.uint8))
        box = boxes[0] if boxes else (slice(0, 0),) * mask.ndim
        pieces, sizes = pieces_of(mask[box])
        counts = pieces if ignore_label is None else np.where(reference[box] == ignore_label, 0, pieces)
        counted, correct = (
            np.bincount(which.ravel(), minlength=len(sizes) + 1)[1:] for which in (counts, counts[in_reference[box]])
        )
        found[organ] = Pieces(sizes, counted, correct, int(in_reference.sum()), voxel_ml)
    return found


def choose(cases: Sequence[Mapping[str, Pieces]], patients: Sequence[str]) -> list[Choice]:
    """For each organ the step that raises the mean Dice most, if it does so by more than chance.

    A step is taken if its mean gain is above `LEAST_GAIN` and the bootstrap interval of the mean does not reach
    below 0. Every organ is tried alone.

    Args:
        cases: The pieces of each organ in every held-out case.
        patients: Whose each case is.
    """
    chosen = []
    for organ in cases[0] if cases else ():
        choices = []
        for step, amount in CANDIDATES:
            gains = [case[organ].gain((step, amount)) for case in cases]
            mean = float(np.mean(gains))
            if mean > LEAST_GAIN:
                choices.append(Choice(organ, step, amount, mean, bootstrap_ci(gains, patients=patients)))
        surely = [choice for choice in choices if choice.ci95[0] >= 0]  # NaN with one patient
        if surely:
            chosen.append(max(surely, key=lambda choice: choice.gain))
    return chosen


def as_steps(choices: Sequence[Choice]) -> dict[str, Any]:
    """Choices as a workflow would say them: small pieces go first."""
    volumes = {choice.organ: choice.amount for choice in choices if choice.step == "min_volume_ml"}
    largest = [choice.organ for choice in choices if choice.step == "keep_largest"]
    return ({"min_volume_ml": volumes} if volumes else {}) | ({"keep_largest": largest} if largest else {})
