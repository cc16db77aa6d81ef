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
        weights = self._weights(logits)
        of = self._of_regions if target.dim() == logits.dim() else self._of_classes
        return of(logits.float(), target, mask, weights)

    def _of_classes(self, logits: Tensor, target: Tensor, mask: Tensor | None, weights: Tensor) -> Tensor:
        if mask is not None:
            target = target.where(mask[:, 0], IGNORED)
            logits = logits.where(mask, 0)
        weight = None if self.class_weights is None else weights
        total = F.cross_entropy(
            logits, target, weight, ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing
        )
        if self.class_weights is None:
            counted = target.numel() if mask is None else mask.sum()
        else:
            voxel_weights = weights[target.clamp(min=0)]
            counted = (voxel_weights if mask is None else voxel_weights.where(mask[:, 0], 0)).sum()
        return _mean(total, counted)

    def _of_regions(self, logits: Tensor, target: Tensor, mask: Tensor | None, weights: Tensor) -> Tensor:
        target = target.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
        voxels = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if mask is not None:
            voxels = voxels.where(mask, 0)
        counted = voxels[:, 0].numel() if mask is None else mask.sum()
        per_region = voxels.transpose(0, 1).flatten(1).sum(1)  # (R,)
        return _mean((per_region * weights).sum(), counted * weights.sum())

    def _weights(self, logits: Tensor) -> Tensor:
        num_outputs = logits.shape[1]
        given = self.class_weights or (1.0,) * num_outputs
        if len(given) != num_outputs:
            raise WorkflowError(
                "E-ARGUMENT",
                f"loss 'cross_entropy': class_weights has {len(given)} entries but the network has {num_outputs} outputs; "
                "give one for each, the background's first",
            )
        return logits.new_tensor(given, dtype=torch.float32)


def _mean(total: Tensor, counted: Tensor | int) -> Tensor:
    if isinstance(counted, int):
        return total / counted
    return total / counted.where(counted > 0, 1)  # the total is 0 too where nothing counts
