"""Logits and target as losses compare them: a probability and a reference for each organ in each voxel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Compared(NamedTuple):
    """Both (B, organs, I, J[, K]), of the same type, and 0 in voxels that do not count."""

    probs: Tensor
    reference: Tensor


def compared(logits: Tensor, target: Tensor, mask: Tensor | None, *, include_background: bool) -> Compared:
    """Softmax of classes or sigmoid of regions, beside what is true.

    In float32 a sigmoid is 1 from a logit of 17 on and has no slope there, where the formula's is below 5e-8. Who is
    that sure and wrong learns by cross-entropy, which keeps its slope.

    Args:
        logits: (B, R, I, J[, K]).
        target: Class indices (B, I, J[, K]), or for regions floats (B, R, I, J[, K]).
        mask: Boolean (B, 1, I, J[, K]), the voxels that count; None: all.
        include_background: Whether class 0 is kept; regions always are.
    """
    logits = at_least_float32(logits)
    regions = is_regions(logits, target)
    probs = logits.sigmoid() if regions else logits.softmax(dim=1)
    reference = target.to(logits.dtype) if regions else one_hot(target, logits)
    if not (regions or include_background):
        probs, reference = probs[:, 1:], reference[:, 1:]
    return Compared(probs, reference) if mask is None else Compared(probs * mask, reference * mask)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in the type losses are computed in: sums over a patch are beyond float16 and bfloat16."""
    return logits if logits.dtype == torch.float64 else logits.float()


def is_regions(logits: Tensor, target: Tensor) -> bool:
    """Whether a target holds regions, which may overlap, rather than class indices."""
    return target.dim() == logits.dim()


def one_hot(target: Tensor, logits: Tensor) -> Tensor:
    """Class indices (B, I, J[, K]) in the shape and type of the logits (B, R, I, J[, K])."""
    # Narrow integers compare twice as fast; and a product with booleans would take longer than this conversion.
    classes = torch.arange(logits.shape[1], device=target.device, dtype=torch.int16)
    return (target.unsqueeze(1).to(torch.int16) == classes.view(-1, *[1] * (target.dim() - 1))).to(logits.dtype)
