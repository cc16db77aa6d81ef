"""How sure a prediction is of itself: voxel by voxel, organ by organ, and in one number for the case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg.labels import Labels

DOUBT = 1e-3
"""A voxel whose label has a probability of more than one less this is taken as certain: it costs little then."""

PERCENT = 100
"""The entropy that a map of it calls complete."""


class Votes:
    """How often several label maps of the same voxels agree, where at least one of them finds an organ."""

    def __init__(self) -> None:
        self._agreed: list[Tensor] = []  # counts stay where the voxels are until they are asked for
        self._found: list[Tensor] = []

    def __bool__(self) -> bool:
        return True

    def count(self, maps: Sequence[Tensor]) -> None:
        """Count voxels.

        Args:
            maps: Label maps of the same shape, or one that broadcasts to it; the last one, the ensemble's, does not
                vote, but what it finds counts as found.
        """
        *members, ensemble = maps
        found, agreed = ensemble > 0, torch.ones_like(ensemble, dtype=torch.bool)
        for member in (m.to(ensemble.device) for m in members):
            found |= member > 0
            agreed &= member == members[0].to(ensemble.device)
        self._found.append(found.sum())
        self._agreed.append((found & agreed).sum())

    @property
    def share(self) -> float | None:
        """From 0 to 1; None where nothing was found."""
        found = sum(int(count) for count in self._found)
        return sum(int(count) for count in self._agreed) / found if found else None


@dataclass(frozen=True)
class Doubts:
    """What `Uncertainty` says at the end.

    Args:
        case: The organs' mean, each weighing as much as the largest probability that one of its voxels has: an organ
            that is not in the scan neither calms nor alarms.
        organs: One less the soft Dice confidence of each; of an organ that was not found, the largest probability
            that one of its voxels has.
    """

    case: float
    organs: dict[str, float]


class Uncertainty:
    """Takes in the planes of a prediction while they pass.

    The soft Dice confidence is the Dice of the predicted mask with the probabilities, 2 Σ p (in the mask) ÷
    (voxels of the mask + Σ p): about the Dice to expect, were the probabilities right. It has no knobs, and ranks
    scans better than means of the entropy do.

    Args:
        labels: What the channels of the planes are.

    Reference:
        Borges et al. 2024, arXiv:2402.10665 (the score of an organ); Mehrtash et al. 2020,
        doi:10.1109/TMI.2020.3006437 (that the entropy of a prediction tells of its Dice).
    """

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.predicted, self.expected, self.confirmed, self.highest = np.zeros((4, labels.num_outputs))

    def add(self, logits: Tensor, found: Tensor) -> Tensor:
        """Take in a plane.

        Args:
            logits: (R, A, B).
            found: Its label map (A, B).

        Returns:
            The entropy of each voxel (A, B), float32: 0 where the network is certain, 1 where it has no idea (of
            regions, their mean). Voxels that are certain but for `DOUBT` have 0.
        """
        flat, label = logits.flatten(1), found.flatten().long()
        certain = self._certain(flat)
        doubtful = (~certain).nonzero()[:, 0]
        of_doubtful = flat[:, doubtful]
        p = of_doubtful.sigmoid() if self.labels.regions else of_doubtful.softmax(0)
        if self.labels.regions:
            surely = torch.stack([((channel > 0) & certain).sum() for channel in flat])
            mask = of_doubtful > 0
        else:
            surely = torch.bincount(label[certain], minlength=len(flat))
            mask = torch.zeros_like(p, dtype=torch.bool).scatter_(0, label[doubtful][None], True)
        sure = _numbers(surely)
        self.predicted += sure + _numbers(mask.sum(1))
        self.expected += sure + _numbers(p.sum(1))
        self.confirmed += sure + _numbers((p * mask).sum(1))
        if len(doubtful):
            self.highest = np.maximum(self.highest, _numbers(p.amax(1)))
        self.highest = np.maximum(self.highest, sure > 0)
        entropy = torch.zeros(flat.shape[1], device=flat.device)
        entropy[doubtful] = self._entropy(p)
        return entropy.reshape(logits.shape[1:])

    def result(self) -> Doubts:
        """What the planes add up to."""
        total = self.predicted + self.expected
        confidence = np.divide(2 * self.confirmed, total, out=np.zeros_like(total), where=total > 0)
        scores = np.where(self.predicted > 0, 1 - confidence, self.highest)
        first = 0 if self.labels.regions else 1  # the background is no organ
        scores, weights = scores[first:].clip(0, 1), self.highest[first:]
        case = float(scores @ weights / weights.sum()) if weights.any() else 0.0
        return Doubts(case, dict(zip(self.labels.organs, scores.tolist(), strict=True)))

    def _certain(self, flat: Tensor) -> Tensor:
        if self.labels.regions:
            return flat.abs().amin(0) > math.log((1 - DOUBT) / DOUBT)
        best = flat.amax(0)
        total = torch.zeros_like(best)  # 1 / total is the probability of the best
        for channel in flat:
            total += (channel - best).exp_()
        return total < 1 / (1 - DOUBT)

    def _entropy(self, p: Tensor) -> Tensor:
        if self.labels.regions:
            return (torch.special.entr(p) + torch.special.entr(1 - p)).mean(0) / math.log(2)
        return torch.special.entr(p).sum(0) / math.log(len(p))


def _numbers(counts: Tensor) -> npt.NDArray[np.float64]:
    return counts.double().cpu().numpy()
