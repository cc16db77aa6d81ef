"""Losses of single voxels: cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.errors import WorkflowError

IGNORED = -100
"""Class index of voxels that do not count."""


class CrossEntropy(nn.Module):
    """Cross-entropy of classes, or binary cross-entropy of regions: the weighted mean over the voxels that count.

    Args:
        class_weights: One a class or region; None: all the same.
        label_smoothing: Share of certainty that is spread over all classes, in [0, 1).
    """

    title: ClassVar[str] = "cross-entropy"
    paper: ClassVar[str] = "smoothing: Szegedy et al. 2016, arXiv:1512.00567"
    good_for: ClassVar[str] = "smooth gradients from the first step on; together with dice the usual choice"

    def __init__(self, *, class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if class_weights is not None and (min(class_weights) < 0 or sum(class_weights) <= 0):
            raise ValueError(f"class_weights {list(class_weights)}; none may be negative and one must be positive")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 1)")
        self.class_weights = None if class_weights is None else tuple(class_weights)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar; 0 if no voxel counts.

        Args:
            logits: (B, R, I, J[, K]).
            target: Class indices (B, I, J[, K]), or for regions floats (B, R, I, J[, K]).
            mask: Boolean (B, 1, I, J[, K]), the voxels that count; None: all.

        Raises:
            WorkflowError: If the class weights are not one for each output.
        """
        of = _of_regions if target.dim() == logits.dim() else _of_classes
        return of(logits.float(), target, mask, self._weights(logits), self.label_smoothing)

    def _weights(self, logits: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        if len(self.class_weights) != logits.shape[1]:
            raise WorkflowError(
                "E-ARGUMENT",
                f"loss 'cross_entropy': class_weights has {len(self.class_weights)} entries but the network has "
                f"{logits.shape[1]} outputs; give one for each, in their order",
            )
        return logits.new_tensor(self.class_weights, dtype=torch.float32)


def _of_classes(
    logits: Tensor, target: Tensor, mask: Tensor | None, weights: Tensor | None, smoothing: float
) -> Tensor:
    if mask is not None:
        target = target.where(mask[:, 0], IGNORED)
    total = F.cross_entropy(logits, target, weights, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    counted = target != IGNORED
    if weights is not None:
        counted = weights[target.clamp(min=0)] * counted
    return _mean(total, counted.sum())


def _of_regions(
    logits: Tensor, target: Tensor, mask: Tensor | None, weights: Tensor | None, smoothing: float
) -> Tensor:
    ones = (1,) * (logits.dim() - 2)
    counted = logits.new_ones(1, 1, *ones) if weights is None else weights.view(1, -1, *ones)
    if mask is not None:
        counted = counted * mask
    smooth = target.float() * (1 - smoothing) + smoothing / 2
    total = F.binary_cross_entropy_with_logits(logits, smooth, weight=counted, reduction="sum")
    return _mean(total, counted.expand_as(logits).sum())


def _mean(total: Tensor, counted: Tensor) -> Tensor:
    return total / counted.where(counted > 0, 1)  # where nothing counts, the total is 0 too
