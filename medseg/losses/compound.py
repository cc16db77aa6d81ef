"""Sums of losses: of several kinds with weights that may change over training, and over a network's several outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from medseg.losses.boundary import Boundary, Hausdorff
from medseg.losses.probabilities import at_least_float32

Stride = Sequence[float] | None
"""How many times as large as the target's the voxels of an output are, along I, J[, K]."""


@dataclass(frozen=True)
class Ramp:
    """A weight that moves linearly from one value to another and then stays.

    Args:
        start: At step 0.
        end: From step `over` on.
        over: Steps it takes.
    """

    start: float
    end: float
    over: int

    def at(self, step: int) -> float:
        """The weight at a step."""
        done = min(step / self.over, 1.0) if self.over > 0 else 1.0
        return self.start + (self.end - self.start) * done


class Compound(nn.Module):
    """A weighted sum of losses; one whose weight is 0 at a step costs nothing there.

    Args:
        losses: Each takes (logits, target, mask).
        weights: One a loss, fixed or a `Ramp`.
    """

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float | Ramp]) -> None:
        super().__init__()
        if len(losses) != len(weights) or not losses:
            raise ValueError(f"{len(losses)} losses with {len(weights)} weights; give one each, at least one")
        self.losses = nn.ModuleList(losses)
        self.weights = tuple(weights)
        self.step = 0

    def set_step(self, step: int) -> None:
        """Tell which training step comes; all that the loss remembers, so a resumed run only has to say it again."""
        self.step = step

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None, stride: Stride = None) -> Tensor:
        """The sum, a float32 scalar; arguments as those of the losses."""
        logits = at_least_float32(logits)  # once, where under autocast each loss would make its own copy
        weights = [weight.at(self.step) if isinstance(weight, Ramp) else weight for weight in self.weights]
        terms = [w * _at(loss, stride)(logits, target, mask) for w, loss in zip(weights, self.losses, strict=True) if w]
        return sum(terms, start=torch.zeros((), device=logits.device)) if terms else 0 * logits.sum()


class DeepSupervision(nn.Module):
    """The weighted mean of the losses of all outputs, each at its own resolution.

    The weights are brought to a sum of 1, as nnU-Net does: the loss stays as large as without deep supervision, and
    what is tuned to its size (learning rates of SGD, gradient clipping) holds for both.

    It is the target that is brought to an output's resolution, by nearest voxel: classes stay classes,
    regions stay 0 or 1, and no coarse logits are interpolated to full size.

    Args:
        loss: Takes (logits, target, mask).
        extra_weights: One for each output but the main one, whose weight is 1 before they are brought to that sum.

    Reference:
        Isensee et al. 2021, doi:10.1038/s41592-020-01008-z.
    """

    def __init__(self, loss: nn.Module, extra_weights: Sequence[float]) -> None:
        super().__init__()
        self.loss = loss
        self.extra_weights = tuple(extra_weights)

    def set_step(self, step: int) -> None:
        """Passed on to the loss where it has a use for it."""
        if isinstance(self.loss, Compound):
            self.loss.set_step(step)

    def forward(self, outputs: Tensor | Sequence[Tensor], target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean, a float32 scalar.

        Args:
            outputs: Logits (B, R, I, J[, K]) as a network gives them: one, or the main ones and the extra ones.
            target: Class indices (B, I, J[, K]), or for regions floats (B, R, I, J[, K]).
            mask: Boolean (B, 1, I, J[, K]), the voxels that count; None: all.
        """
        if isinstance(outputs, Tensor):
            return self.loss(outputs, target, mask)
        total = self.loss(outputs[0], target, mask)
        for weight, logits in zip(self.extra_weights, outputs[1:], strict=True):
            size = logits.shape[2:]
            stride = [fine / coarse for fine, coarse in zip(target.shape[-len(size) :], size, strict=True)]
            coarse_mask = None if mask is None else at_size(mask, size)
            total = total + weight * _at(self.loss, stride)(logits, at_size(target, size), coarse_mask)
        return total / (1 + sum(self.extra_weights))


def _at(loss: nn.Module, stride: Stride) -> Callable[..., Tensor]:
    """The loss on coarser voxels: what measures distances is told how much coarser."""
    return partial(loss, stride=stride) if isinstance(loss, Compound | Boundary | Hausdorff) else loss


def at_size(target: Tensor, size: Sequence[int]) -> Tensor:
    """The voxel of a target at the center of each voxel of a coarser grid over the same field of view.

    Args:
        target: Any type, (..., I, J[, K]).
        size: Voxels of the coarser grid.
    """
    for axis, wanted in enumerate(size, start=target.dim() - len(size)):
        found = target.shape[axis]
        if found != wanted:
            centers = (2 * torch.arange(wanted, device=target.device) + 1) * found // (2 * wanted)
            target = target.index_select(axis, centers)
    return target
