"""Losses of single voxels: cross-entropy of classes and of regions, and what stresses the hard voxels in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.errors import WorkflowError
from medseg.losses.probabilities import at_least_float32, is_regions, one_hot

IGNORED = -100
"""Class index of voxels that do not count."""

ClassWeights = Sequence[float] | Literal["balanced"] | None
"""The word is a workflow's; it becomes numbers before the loss is made."""


class CrossEntropy(nn.Module):
    """Cross-entropy of classes, or binary cross-entropy of regions: the weighted mean over the voxels that count.

    Args:
        class_weights: One a class or region, of which only the ratios matter; None: all the same. In a workflow
            ``balanced`` stands for weights from the frequencies in the training data, see `medseg.build.balance`.
        label_smoothing: Share of certainty that is spread over all classes, in [0, 1).
    """

    title: ClassVar[str] = "cross-entropy"
    paper: ClassVar[str] = "smoothing: Szegedy et al. 2016, arXiv:1512.00567"
    good_for: ClassVar[str] = "smooth gradients from the first step on; together with dice the usual choice"

    def __init__(self, *, class_weights: ClassWeights = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.class_weights = _checked_weights(class_weights)
        self.label_smoothing = _checked_smoothing(label_smoothing)

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar; 0 if no voxel counts.

        Args:
            logits: (B, R, I, J[, K]).
            target: Class indices (B, I, J[, K]), or for regions floats (B, R, I, J[, K]).
            mask: Boolean (B, 1, I, J[, K]), the voxels that count; None: all.

        Raises:
            WorkflowError: If the class weights are not one for each output.
        """
        logits = at_least_float32(logits)
        of = _of_regions if is_regions(logits, target) else _of_classes
        return of(logits, target, mask, _weights_for(logits, self.class_weights, "cross_entropy"), self.label_smoothing)


class BinaryCrossEntropy(nn.Module):
    """Binary cross-entropy of regions, or of classes one against the rest: the weighted mean over voxels and outputs.

    For regions it is what `CrossEntropy` is. Of classes each logit is judged by itself, by its sigmoid; the largest
    one still decides at prediction.

    Args:
        class_weights: As in `CrossEntropy`; each weighs its output's voxels, those of the organ and all others.
        label_smoothing: Share of certainty that goes half to yes and half to no, in [0, 1).
    """

    title: ClassVar[str] = "binary cross-entropy"
    paper: ClassVar[str] = "smoothing: Szegedy et al. 2016, arXiv:1512.00567"
    good_for: ClassVar[str] = "regions that overlap; classes that should not compete"

    def __init__(self, *, class_weights: ClassWeights = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.class_weights = _checked_weights(class_weights)
        self.label_smoothing = _checked_smoothing(label_smoothing)

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar; 0 if no voxel counts. Arguments and errors as `CrossEntropy.forward`."""
        logits = at_least_float32(logits)
        regions = target if is_regions(logits, target) else one_hot(target, logits)
        weights = _weights_for(logits, self.class_weights, "binary_cross_entropy")
        return _of_regions(logits, regions, mask, weights, self.label_smoothing)


class TopK(nn.Module):
    """The mean cross-entropy of the hardest voxels of a batch.

    Args:
        share: Of the voxels that count (of regions: of all their voxels together), in (0, 1]; at least one is taken.

    Reference:
        Wu et al. 2016, arXiv:1605.06885 (there a fixed number of voxels); the default is nnU-Net's.
    """

    title: ClassVar[str] = "top-k cross-entropy"
    paper: ClassVar[str] = "Wu et al. 2016, arXiv:1605.06885"
    good_for: ClassVar[str] = "images that are mostly easy; hard borders and rare tissue among them"

    def __init__(self, *, share: float = 0.1) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; it must be in (0, 1]")
        self.share = share

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar; 0 if no voxel counts. Arguments as `CrossEntropy.forward`."""
        losses = _voxel_losses(at_least_float32(logits), target)
        losses = losses.flatten() if mask is None else losses[mask.expand_as(losses)]
        if losses.numel() == 0:
            return losses.sum()
        return losses.topk(max(1, round(self.share * losses.numel())), sorted=False).values.mean()


class Focal(nn.Module):
    """Cross-entropy in which a voxel counts the less the surer it is: (1 - p)^gamma · -log p, p that of the truth.

    Args:
        gamma: How much; 0 is cross-entropy.
        alpha: Factor of voxels in an organ or region, 1 - alpha that of the others; None: 1 for both. The paper has
            0.25 beside gamma 2.
        class_weights: As in `CrossEntropy`.

    Reference:
        Lin et al. 2017, arXiv:1708.02002. Sigmoid form for regions; for classes the softmax form, of which the paper
        has only the two-class case. Here it is the mean over the voxels, there the sum over those in objects.
    """

    title: ClassVar[str] = "focal"
    paper: ClassVar[str] = "Lin et al. 2017, arXiv:1708.02002"
    good_for: ClassVar[str] = "small organs or lesions in large images, where sure background drowns the rest"

    def __init__(self, *, gamma: float = 2.0, alpha: float | None = None, class_weights: ClassWeights = None) -> None:
        super().__init__()
        if gamma < 0:
            raise ValueError(f"gamma is {gamma}; it must not be negative")
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; it must be in [0, 1]")
        self.gamma = gamma
        self.alpha = alpha
        self.class_weights = _checked_weights(class_weights)

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar; 0 if no voxel counts. Arguments and errors as `CrossEntropy.forward`."""
        logits = at_least_float32(logits)
        regions = is_regions(logits, target)
        losses = _voxel_losses(logits, target)  # (B, R or 1, I, J[, K]), -log p
        doubt = -torch.expm1(-losses)  # 1 - p, exact near 0
        losses = doubt.clamp(min=torch.finfo(doubt.dtype).tiny) ** self.gamma * losses  # 0 has no slope below gamma 1
        organ = target if regions else (target > 0).unsqueeze(1)
        if self.alpha is not None:
            losses = losses * torch.where(organ > 0, self.alpha, 1 - self.alpha)
        weights = _weights_for(logits, self.class_weights, "focal")
        counted = torch.ones_like(losses)
        if weights is not None:
            counted = counted * (_per_output(weights, logits) if regions else weights[target].unsqueeze(1))
        if mask is not None:
            counted = counted * mask
        return _mean((losses * counted).sum(), counted.sum())


def _checked_weights(class_weights: ClassWeights) -> tuple[float, ...] | None:
    if class_weights is None:
        return None
    if isinstance(class_weights, str):
        raise ValueError(f"class_weights {class_weights!r}; give a number for each output, or in a workflow 'balanced'")
    if min(class_weights) < 0 or sum(class_weights) <= 0:
        raise ValueError(f"class_weights {list(class_weights)}; none may be negative and one must be positive")
    return tuple(class_weights)


def _checked_smoothing(label_smoothing: float) -> float:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 1)")
    return label_smoothing


def _weights_for(logits: Tensor, class_weights: Sequence[float] | None, name: str) -> Tensor | None:
    if class_weights is None:
        return None
    if len(class_weights) != logits.shape[1]:
        raise WorkflowError(
            "E-ARGUMENT",
            f"loss {name!r}: class_weights has {len(class_weights)} entries but the network has "
            f"{logits.shape[1]} outputs; give one for each, in their order",
        )
    return logits.new_tensor(class_weights)


def _per_output(weights: Tensor, logits: Tensor) -> Tensor:
    return weights.view(1, -1, *[1] * (logits.dim() - 2))


def _voxel_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each voxel, (B, 1, I, J[, K]), or of each voxel and region, (B, R, I, J[, K])."""
    if is_regions(logits, target):
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
    return F.cross_entropy(logits, target, reduction="none").unsqueeze(1)


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
    counted = _per_output(logits.new_ones(1) if weights is None else weights, logits)
    if mask is not None:
        counted = counted * mask
    smooth = target.to(logits.dtype) * (1 - smoothing) + smoothing / 2
    total = F.binary_cross_entropy_with_logits(logits, smooth, weight=counted, reduction="sum")
    return _mean(total, counted.expand_as(logits).sum())


def _mean(total: Tensor, counted: Tensor) -> Tensor:
    return total / counted.where(counted > 0, 1)  # where nothing counts, the total is 0 too
