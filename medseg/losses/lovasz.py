"""The Lovász losses: the Jaccard index itself, made continuous, rather than a soft stand-in for it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from medseg.losses.probabilities import at_least_float32, compared, is_regions


class Lovasz(nn.Module):
    """The Lovász extension of one minus the Jaccard index: Lovász-softmax for classes, the Lovász hinge for regions.

    Its value at a vector of voxel errors is the mean of Jaccard losses, one for each threshold on the errors. Classes
    are averaged over those that the target has, as the authors do; the background is one of them, so that a patch
    without organs still teaches. Of regions all are: in one that is absent, the worst voxel alone counts.

    Args:
        batch: Whether the samples of a batch are scored as one; else each by itself.
        include_background: Whether class 0 counts as an organ. Regions have none.

    Reference:
        Berman et al. 2018, arXiv:1705.08790; Yu and Blaschko 2015, arXiv:1512.07797 (hinge).
    """

    title: ClassVar[str] = "Lovász-softmax, Lovász hinge"
    paper: ClassVar[str] = "Berman et al. 2018, arXiv:1705.08790"
    good_for: ClassVar[str] = "a high IoU, also of small organs; after or beside cross_entropy"

    def __init__(self, *, batch: bool = True, include_background: bool = True) -> None:
        super().__init__()
        self.batch = batch
        self.include_background = include_background

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar, of classes in [0, 1]; 0 if no voxel counts.

        Args:
            logits: (B, R, I, J[, K]).
            target: Class indices (B, I, J[, K]), or for regions floats (B, R, I, J[, K]).
            mask: Boolean (B, 1, I, J[, K]), the voxels that count; None: all.
        """
        regions = is_regions(logits, target)
        if regions:
            logits = at_least_float32(logits)
            reference = target.to(logits.dtype)
            errors = (1 - logits * (2 * reference - 1)).relu()
            if mask is not None:
                errors, reference = errors * mask, reference * mask
        else:
            probs, reference = compared(logits, target, mask, include_background=self.include_background)
            errors = (probs - reference).abs()
        errors, inside = (_by_organ(part, batch=self.batch) for part in (errors, reference > 0))
        losses = torch.stack([lovasz_extension(*organ) for organ in zip(errors, inside, strict=True)])
        if regions:
            return losses.mean()
        present = inside.any(dim=1)
        return (losses * present).sum() / present.sum().clamp(min=1)


def lovasz_extension(errors: Tensor, inside: Tensor) -> Tensor:
    """The Lovász extension of the Jaccard loss of one organ, a scalar.

    It is linear in the errors as long as their order stays the same: each weighs what the Jaccard loss rises when its
    voxel joins those with larger errors as a wrong one. A voxel without error weighs nothing.

    Args:
        errors: Not negative, (N,).
        inside: Whether a voxel is in the organ, boolean (N,).
    """
    with torch.no_grad():
        wrong = errors.nonzero()[:, 0]
        ranked = wrong[_descending(errors[wrong])]
        weights = torch.zeros_like(errors)
        weights[ranked] = _rises(inside[ranked], inside.sum()).to(errors.dtype)
    return (errors * weights).sum()


def _rises(inside: Tensor, total: Tensor) -> Tensor:
    """By how much each wrong voxel, the worst first, raises the Jaccard loss.

    A missed voxel leaves the union and takes 1 from the intersection n, a false one adds 1 to the union u: 1 / u and
    n / (u - 1) - n / u. So written, no two nearly equal numbers are subtracted, as they are in the authors' program.

    Args:
        inside: Boolean (N,), whether it is in the organ.
        total: The organ's voxels.
    """
    missed = inside.cumsum(0, dtype=torch.int32)
    false = torch.arange(1, len(inside) + 1, device=inside.device, dtype=torch.int32) - missed
    union = (total + false).double()
    rises = torch.where(inside, 1 / union, (total - missed) / (union * (union - 1).clamp(min=1)))
    rises[:1] += total == 0  # a false voxel of an absent organ: from a Jaccard index of 1 to 0
    return rises


def _descending(errors: Tensor) -> Tensor:
    """The order of errors that are not negative, largest first."""
    # The bits of such floats, read as integers, are in the same order; torch sorts those several times as fast on a CPU.
    integers = torch.int64 if errors.dtype == torch.float64 else torch.int32
    return (torch.iinfo(integers).max - errors.view(integers)).argsort()


def _by_organ(values: Tensor, *, batch: bool) -> Tensor:
    """(B, organs, I, J[, K]) as (organs, voxels of the batch), or each sample's organs apart as (B · organs, voxels)."""
    return values.transpose(0, 1).flatten(1) if batch else values.flatten(2).flatten(0, 1)
