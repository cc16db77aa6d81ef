"""Losses of overlap: Dice and Tversky, each organ weighing the same whatever its size."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Dice(nn.Module):
    """One minus the soft Dice, averaged over the organs.

    An organ that is neither present nor predicted scores 1 thanks to `smooth`, so does one whose voxels
    are all masked; neither pulls on the weights.

    Args:
        batch: Whether the samples of a batch are scored as one, so that a patch without an organ does
            not count as a miss; else each by itself.
        include_background: Whether class 0 counts as an organ. Regions have none.
        squared: Whether the denominator sums squares, as V-Net's does.
        smooth: Voxels added to numerator and denominator.

    Reference:
        Milletari et al. 2016, arXiv:1606.04797; Drozdzal et al. 2016, arXiv:1608.04117.
    """

    title: ClassVar[str] = "soft Dice"
    paper: ClassVar[str] = "Milletari et al. 2016, arXiv:1606.04797"
    good_for: ClassVar[str] = "organs of unequal size; together with cross_entropy the usual choice"

    def __init__(
        self, *, batch: bool = True, include_background: bool = False, squared: bool = False, smooth: float = 1e-5
    ) -> None:
        super().__init__()
        self.batch = batch
        self.include_background = include_background
        self.squared = squared
        self.smooth = smooth

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar in [0, 1].

        Args:
            logits: (B, R, I, J[, K]).
            target: Class indices (B, I, J[, K]), or for regions floats (B, R, I, J[, K]).
            mask: Boolean (B, 1, I, J[, K]), the voxels that count; None: all.
        """
        sums = soft_sums(
            logits, target, mask, batch=self.batch, include_background=self.include_background, squared=self.squared
        )
        dice = (2 * sums.intersection + self.smooth) / (sums.predicted + sums.reference + self.smooth)
        return 1 - dice.mean()


class Tversky(nn.Module):
    """One minus the soft Tversky index, which weighs false positives and false negatives apart.

    Args:
        alpha: Weight of false positives. With `beta`, 0.5 and 0.5 is Dice, 1 and 1 is Jaccard.
        beta: Weight of false negatives; the larger of the two favours finding everything.
        batch: Whether the samples of a batch are scored as one; else each by itself.
        include_background: Whether class 0 counts as an organ. Regions have none.
        smooth: Voxels added to numerator and denominator.

    Reference:
        Salehi et al. 2017, arXiv:1706.05721; the defaults are those it found best.
    """

    title: ClassVar[str] = "Tversky"
    paper: ClassVar[str] = "Salehi et al. 2017, arXiv:1706.05721"
    good_for: ClassVar[str] = "small lesions, where a miss is worse than a false alarm"

    def __init__(
        self,
        *,
        alpha: float = 0.3,
        beta: float = 0.7,
        batch: bool = True,
        include_background: bool = False,
        smooth: float = 1e-5,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.batch = batch
        self.include_background = include_background
        self.smooth = smooth

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar in [0, 1]; arguments as `Dice.forward`."""
        hit, predicted, reference = soft_sums(
            logits, target, mask, batch=self.batch, include_background=self.include_background
        )
        errors = self.alpha * (predicted - hit) + self.beta * (reference - hit)
        return 1 - ((hit + self.smooth) / (hit + errors + self.smooth)).mean()


class SoftSums(NamedTuple):
    """Voxels, counted by probability: each (B, organs), or (1, organs) for a whole batch."""

    intersection: Tensor
    predicted: Tensor
    reference: Tensor


def soft_sums(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    *,
    batch: bool,
    include_background: bool,
    squared: bool = False,
) -> SoftSums:
    """What overlap losses are made of, in float32.

    Args:
        logits: (B, R, I, J[, K]).
        target: Class indices (B, I, J[, K]), or for regions floats (B, R, I, J[, K]).
        mask: Boolean (B, 1, I, J[, K]), the voxels that count; None: all.
        batch: Whether to add up the samples.
        include_background: Whether class 0 is kept; regions always are.
        squared: Whether `predicted` and `reference` sum squares.
    """
    regions = target.dim() == logits.dim()
    reference = target.float() if regions else _one_hot(target, logits.shape[1])
    probs = logits.float()
    probs = probs.sigmoid() if regions else probs.softmax(dim=1)
    if mask is not None:
        probs = probs * mask
        reference = reference * mask
    axes = tuple(range(2, logits.dim()))
    sums = SoftSums(
        intersection=(probs * reference).sum(axes),
        predicted=(probs.square() if squared else probs).sum(axes),
        reference=(reference.square() if squared else reference).sum(axes),
    )
    if batch:
        sums = SoftSums(*(part.sum(0, keepdim=True) for part in sums))
    return sums if regions or include_background else SoftSums(*(part[:, 1:] for part in sums))


def _one_hot(target: Tensor, num_classes: int) -> Tensor:
    """Class indices (B, I, J[, K]) as floats (B, R, I, J[, K])."""
    # Narrow integers compare twice as fast; and a product with booleans would take longer than this conversion.
    classes = torch.arange(num_classes, device=target.device, dtype=torch.int16)
    return (target.unsqueeze(1).to(torch.int16) == classes.view(-1, *[1] * (target.dim() - 1))).float()
