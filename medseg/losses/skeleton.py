"""clDice: the overlap of centerlines, for what is a tube or a net."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medseg.losses.probabilities import compared

View = Callable[[Tensor], Tensor]


class ClDice(nn.Module):
    """One minus the soft clDice, averaged over the organs.

    Precision is the share of the predicted centerline that lies in the reference, sensitivity the share of the
    reference's centerline that lies in the prediction; clDice is their harmonic mean. An organ that is neither present
    nor predicted scores 1 thanks to `smooth`.

    Args:
        iterations: Erosions of the soft skeleton; at least the largest radius in voxels of what is to be thinned.
        batch: Whether the samples of a batch are scored as one; else each by itself.
        include_background: Whether class 0 counts as an organ. Regions have none.
        smooth: Voxels added to both numerators and denominators.

    Reference:
        Shit et al. 2021, arXiv:2003.07311. The authors' program sums up all organs before it divides; here each one
        weighs the same, as in `Dice`.
    """

    title: ClassVar[str] = "soft clDice"
    paper: ClassVar[str] = "Shit et al. 2021, arXiv:2003.07311"
    good_for: ClassVar[str] = "vessels and airways that must stay connected, beside dice"

    def __init__(
        self, *, iterations: int = 3, batch: bool = True, include_background: bool = False, smooth: float = 1.0
    ) -> None:
        super().__init__()
        if iterations < 0:
            raise ValueError(f"iterations is {iterations}; it must not be negative")
        if smooth <= 0:
            raise ValueError(f"smooth is {smooth}; it must be positive, or an absent organ has no score")
        self.iterations = iterations
        self.batch = batch
        self.include_background = include_background
        self.smooth = smooth

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar in [0, 1].

        Args:
            logits: (B, R, I, J[, K]).
            target: Class indices (B, I, J[, K]), or for regions floats (B, R, I, J[, K]).
            mask: Boolean (B, 1, I, J[, K]), the voxels that count; None: all.
        """
        probs, reference = compared(logits, target, mask, include_background=self.include_background)
        precision = self._covered(soft_skeleton(probs, mask, iterations=self.iterations), reference)
        sensitivity = self._covered(soft_skeleton(reference, mask, iterations=self.iterations), probs)
        return 1 - (2 * precision * sensitivity / (precision + sensitivity)).mean()

    def _covered(self, skeleton: Tensor, by: Tensor) -> Tensor:
        """The share of a skeleton, (B or 1, organs)."""
        axes = (*((0,) if self.batch else ()), *range(2, skeleton.dim()))
        return ((skeleton * by).sum(axes) + self.smooth) / (skeleton.sum(axes) + self.smooth)


def soft_skeleton(probs: Tensor, mask: Tensor | None = None, *, iterations: int) -> Tensor:
    """The ridges of a probability map: at each scale, what opening takes away.

    Args:
        probs: In [0, 1], (B, organs, I, J[, K]).
        mask: Boolean (B, 1, I, J[, K]); other voxels have no say in what is eroded or dilated. None: all have.
        iterations: Erosions, each a scale.

    Returns:
        In [0, 1], in the shape of `probs`; 0 in voxels that do not count.
    """
    eroded = _eroded(probs, mask)
    skeleton = (probs - _dilated(eroded, mask)).relu()
    for _ in range(iterations):
        probs, eroded = eroded, _eroded(eroded, mask)
        ridges = (probs - _dilated(eroded, mask)).relu()
        skeleton = skeleton + (ridges - skeleton * ridges).relu()
    return skeleton if mask is None else skeleton * mask


def _eroded(probs: Tensor, mask: Tensor | None) -> Tensor:
    """The least of each voxel and those that share a face with it."""
    filled = probs if mask is None else probs.where(mask, 1)
    return -_Greatest.apply(-filled, tuple(range(2, probs.dim())))


def _dilated(probs: Tensor, mask: Tensor | None) -> Tensor:
    """The greatest of each voxel and all its neighbors."""
    greatest = probs if mask is None else probs.where(mask, 0)
    for axis in range(2, probs.dim()):
        greatest = _Greatest.apply(greatest, (axis,))
    return greatest


class _Greatest(torch.autograd.Function):
    """The greatest of each voxel and its two neighbors along each of some axes.

    What torch's pooling does, but vectorized on a CPU, and keeping one byte a voxel for the gradient instead of eight.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, axes: tuple[int, ...]) -> Tensor:
        greatest = values.clone(memory_format=torch.contiguous_format)
        source = torch.zeros_like(greatest, dtype=torch.int8)  # 0: the voxel itself
        for n, (here, there) in enumerate(_neighbors(axes), start=1):
            best, neighbor = here(greatest), there(values)
            here(source).masked_fill_(neighbor > best, n)
            torch.maximum(best, neighbor, out=best)
        ctx.save_for_backward(source)
        ctx.axes = axes
        return greatest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (source,) = gradients, ctx.saved_tensors
        result = gradient * (source == 0)
        for n, (here, there) in enumerate(_neighbors(ctx.axes), start=1):
            there(result).add_(here(gradient) * (here(source) == n))
        return result, None


def _neighbors(axes: Iterable[int]) -> Iterator[tuple[View, View]]:
    """For each direction: all voxels of a tensor that have a neighbor there, and these neighbors."""
    for axis in axes:
        but_last: View = partial(_part, axis=axis, start=0)
        but_first: View = partial(_part, axis=axis, start=1)
        yield but_last, but_first
        yield but_first, but_last


def _part(values: Tensor, *, axis: int, start: int) -> Tensor:
    return values.narrow(axis, start, values.shape[axis] - 1)
