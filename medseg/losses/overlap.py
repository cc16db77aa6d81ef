"""Losses of overlap: Dice, Tversky and their kin, each organ weighing the same whatever its size."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from medseg.losses.probabilities import compared, is_regions


class Dice(nn.Module):
    """One minus the soft Dice, averaged over the organs.

    An organ that is neither present nor predicted scores 1 thanks to `smooth`, so does one whose voxels
    are all masked; neither pulls on the weights.

    Args:
        batch: Whether the samples of a batch are scored as one, so that a patch without an organ does
            not count as a miss; else each by itself.
        include_background: Whether class 0 counts as an organ. Regions have none.
        squared: Whether the denominator sums squares, as V-Net's does.
        smooth: Voxels added to numerator and denominator; with 0 an organ that is nowhere, or all masked, makes NaN.

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
        self.smooth = _checked_smooth(smooth)

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


class GeneralizedDice(nn.Module):
    """One minus the generalized Dice: intersections and sizes are added up over the organs before they are divided.

    Each organ is weighted by one over its squared volume in the reference. An absent organ, for which that is
    infinite, weighs as much as the smallest present one, so that finding it where it is not costs something.

    Args:
        batch: Whether the samples of a batch are scored as one; else each by itself.
        include_background: Whether class 0 counts as an organ, as in the paper. Regions have none.
        smooth: Voxels of the smallest organ added to numerator and denominator.

    Reference:
        Sudre et al. 2017, arXiv:1707.03237. The weights are divided by the largest one, which changes nothing but
        that `smooth` does not outweigh large organs.
    """

    title: ClassVar[str] = "generalized Dice"
    paper: ClassVar[str] = "Sudre et al. 2017, arXiv:1707.03237"
    good_for: ClassVar[str] = "classes of very unequal size that are all in every patch"

    def __init__(self, *, batch: bool = True, include_background: bool = True, smooth: float = 1e-5) -> None:
        super().__init__()
        self.batch = batch
        self.include_background = include_background
        self.smooth = _checked_smooth(smooth)

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar in [0, 1]; arguments as `Dice.forward`."""
        hit, predicted, reference = soft_sums(
            logits, target, mask, batch=self.batch, include_background=self.include_background
        )
        present = reference > 0
        smallest = reference.where(present, torch.inf).amin(dim=1, keepdim=True)
        weights = (smallest / reference).square().where(present, 1)
        hit, size = ((weights * part).sum(dim=1) for part in (hit, predicted + reference))
        return 1 - ((2 * hit + self.smooth) / (size + self.smooth)).mean()


class Tversky(nn.Module):
    """One minus the soft Tversky index, which weighs false positives and false negatives apart.

    Args:
        alpha: Weight of false positives. With `beta`, 0.5 and 0.5 is Dice, 1 and 1 is Jaccard.
        beta: Weight of false negatives; the larger of the two favours finding everything.
        batch: Whether the samples of a batch are scored as one; else each by itself.
        include_background: Whether class 0 counts as an organ. Regions have none.
        smooth: Voxels added to numerator and denominator; with 0 an organ that is nowhere, or all masked, makes NaN.

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
        if min(alpha, beta) < 0 or alpha == beta == 0:
            raise ValueError(f"alpha is {alpha} and beta {beta}; neither may be negative and one must be positive")
        self.alpha = alpha
        self.beta = beta
        self.batch = batch
        self.include_background = include_background
        self.smooth = _checked_smooth(smooth)

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar in [0, 1]; arguments as `Dice.forward`."""
        return 1 - self.of_each(logits, target, mask).mean()

    def of_each(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The soft index of each organ, (B or 1, organs); arguments as `Dice.forward`."""
        hit, predicted, reference = soft_sums(
            logits, target, mask, batch=self.batch, include_background=self.include_background
        )
        errors = self.alpha * (predicted - hit) + self.beta * (reference - hit)
        return (hit + self.smooth) / (hit + errors + self.smooth)


class FocalTversky(nn.Module):
    """One minus the soft Tversky index to the power 1 / gamma, averaged over the organs.

    With gamma above 1 an organ that is nearly right still pulls, and pulls the harder the nearer it is.

    Args:
        alpha: Weight of false positives.
        beta: Weight of false negatives.
        gamma: The paper tries 1 to 3.
        batch: Whether the samples of a batch are scored as one; else each by itself.
        include_background: Whether class 0 counts as an organ. Regions have none.
        smooth: Voxels added to numerator and denominator.

    Reference:
        Abraham and Khan 2018, arXiv:1810.07842; the defaults are those it found best, but its alpha is our beta. The
        slope at a perfect index, there infinite, is 0 here.
    """

    title: ClassVar[str] = "focal Tversky"
    paper: ClassVar[str] = "Abraham and Khan 2018, arXiv:1810.07842"
    good_for: ClassVar[str] = "small lesions among organs that are already found well"

    def __init__(
        self,
        *,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 4 / 3,
        batch: bool = True,
        include_background: bool = False,
        smooth: float = 1e-5,
    ) -> None:
        super().__init__()
        if gamma <= 0:
            raise ValueError(f"gamma is {gamma}; it must be positive")
        self.gamma = gamma
        self.index = Tversky(alpha=alpha, beta=beta, batch=batch, include_background=include_background, smooth=smooth)

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar in [0, 1]; arguments as `Dice.forward`."""
        wrong = 1 - self.index.of_each(logits, target, mask)
        counted = wrong > torch.finfo(wrong.dtype).eps  # what is less is rounding
        return wrong.where(counted, 1).pow(1 / self.gamma).where(counted, 0).mean()


def _checked_smooth(smooth: float) -> float:
    if smooth < 0:
        raise ValueError(f"smooth is {smooth}; it must not be negative")
    return smooth


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
    """What overlap losses are made of, in float32 at least.

    Args:
        logits: (B, R, I, J[, K]).
        target: Class indices (B, I, J[, K]), or for regions floats (B, R, I, J[, K]).
        mask: Boolean (B, 1, I, J[, K]), the voxels that count; None: all.
        batch: Whether to add up the samples.
        include_background: Whether class 0 is kept; regions always are.
        squared: Whether `predicted` and `reference` sum squares.
    """
    # The background is left out last: sums over whole tensors are faster than over parts of them.
    probs, reference = compared(logits, target, mask, include_background=True)
    axes = tuple(range(2, logits.dim()))
    sums = SoftSums(
        intersection=(probs * reference).sum(axes),
        predicted=(probs.square() if squared else probs).sum(axes),
        reference=(reference.square() if squared else reference).sum(axes),
    )
    if batch:
        sums = SoftSums(*(part.sum(0, keepdim=True) for part in sums))
    keep_all = include_background or is_regions(logits, target)
    return sums if keep_all else SoftSums(*(part[:, 1:] for part in sums))
