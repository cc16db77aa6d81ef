"""The fully connected conditional random field, by mean field: labels that follow the edges of the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

Filter = Callable[[Tensor], Tensor]

EXACT_VOXELS = 4096
"""Up to so many, all pairs are computed where nothing else is wished."""

PAIRS_AT_ONCE = 1 << 22
"""So many pairs of voxels are held in memory at once, four bytes each."""

BLOCK_VOXELS = 1 << 15
"""Voxels that meet all their neighbors before the next do, on a processor: what its cache holds."""

_LEAST = 1e-7  # a probability whose logarithm or logit is still a number


@dataclass(frozen=True, kw_only=True)
class CRF:
    """What a CRF believes: voxels close to each other have the same label, the more so the more they look alike.

    Distances are in mm, so that thick slices count as what they are; intensities are those of the image that the network
    sees.

    Args:
        appearance_weight: Of the kernel that compares positions and intensities.
        smoothness_weight: Of the kernel that compares positions alone, which removes small pieces.
        theta_alpha_mm: Standard deviation of the first kernel's distances.
        theta_beta: Of its intensities; one number for all channels of the image, or one for each.
        theta_gamma_mm: Of the second kernel's distances.
        iterations: Mean-field steps.
        compatibility: What neighbors of two labels cost, a row for each label; None: 1 wherever they differ (Potts).
        normalization: ``symmetric``: every voxel's neighbors, itself among them, count about one together, so that weights
            mean the same at any spacing; ``none``: all pairs count in full, in a window the neighbors for those
            left out.
        connections: ``all``: all pairs of voxels; ``window``: those closer than `cutoff`; ``auto``: all up to 4096 voxels. The
            smoothness kernel, being separable, is always that of all pairs.
        cutoff: Where the window ends, in standard deviations `theta_alpha_mm`.
        neighbors: How many a voxel has in the window at most. Where there are more, only every second, third … is one.

    Raises:
        ValueError: If a number makes no sense.

    Reference:
        Krähenbühl & Koltun 2011, arXiv:1210.5644; 2013 (symmetric normalization). Teichmann & Cipolla 2018,
        arXiv:1805.04777 (windows).
    """

    appearance_weight: float = 4.0
    smoothness_weight: float = 2.0
    theta_alpha_mm: float = 3.0
    theta_beta: float | Sequence[float] = 0.5
    theta_gamma_mm: float = 1.5
    iterations: int = 5
    compatibility: Sequence[Sequence[float]] | None = None
    normalization: Literal["symmetric", "none"] = "symmetric"
    connections: Literal["auto", "all", "window"] = "auto"
    cutoff: float = 2.0
    neighbors: int = 120

    def __post_init__(self) -> None:
        betas = self.theta_beta if isinstance(self.theta_beta, Sequence) else (self.theta_beta,)
        above_zero = {
            "theta_alpha_mm": [self.theta_alpha_mm],
            "theta_gamma_mm": [self.theta_gamma_mm],
            "theta_beta": betas,
            "cutoff": [self.cutoff],
            "iterations": [self.iterations],
            "neighbors": [self.neighbors],
        }
        for name, numbers in above_zero.items():
            if not numbers or not all(0 < number < math.inf for number in numbers):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number above 0")
        for name in ("iterations", "neighbors"):
            if int(getattr(self, name)) != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a whole number")
        for name in ("appearance_weight", "smoothness_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name, choices in {"normalization": ("symmetric", "none"), "connections": ("auto", "all", "window")}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")

    def check(self, *, num_channels: int | None, num_labels: int, regions: bool = False) -> None:
        """Refuse what does not fit an image and its labels.

        Args:
            num_channels: Of the image; None: any.
            num_labels: Outputs of the network.
            regions: Whether they are regions, which may overlap.

        Raises:
            ValueError: If `theta_beta` or `compatibility` does not fit.
        """
        if isinstance(self.theta_beta, Sequence) and num_channels not in (None, len(self.theta_beta)):
            raise ValueError(f"theta_beta has {len(self.theta_beta)} entries; the image has {num_channels} channels")
        if self.compatibility is None:
            return
        if regions:
            raise ValueError("compatibility is for labels that exclude each other; regions are decided each for itself")
        rows = [list(row) for row in self.compatibility]
        finite = all(math.isfinite(cost) for row in rows for cost in row)
        if not finite or [len(row) for row in rows] != [num_labels] * num_labels:
            raise ValueError(f"compatibility must have {num_labels} rows of {num_labels} numbers, background first")


@dataclass(frozen=True)
class Refined:
    """What a CRF makes of a prediction.

    Args:
        logits: (R, I, J[, K]); their softmax, or of regions their sigmoid, are the probabilities.
        connections: Which voxels were compared, for people: ``"exact"`` or ``"windowed"``, and how.
    """

    logits: Tensor
    connections: str


class Messages:
    """The filters by which the voxels of an image hear of each other.

    Args:
        crf: Its kernels.
        image: (B, C, I, J[, K]).
        spacing_mm: Voxel size along each axis.
    """

    def __init__(self, crf: CRF, image: Tensor, spacing_mm: Sequence[float]) -> None:
        self.size = tuple(image.shape[2:])
        self.spacing_mm = tuple(spacing_mm)
        self.crf = crf
        beta = torch.as_tensor(crf.theta_beta, dtype=image.dtype, device=image.device).reshape(
            -1, *[1] * len(self.size)
        )
        self.image = image.detach() / beta
        self.is_exact = crf.connections == "all" or (crf.connections == "auto" and math.prod(self.size) <= EXACT_VOXELS)

    @property
    def connections(self) -> str:
        """Which voxels are compared, for people."""
        if self.is_exact:
            return "exact (all pairs)"
        num, reach = 2 * len(self._offsets), self.crf.cutoff * self.crf.theta_alpha_mm
        return f"windowed ({num} neighbors within {self.crf.cutoff:g} standard deviations, {reach:g} mm)"

    @cached_property
    def filters(self) -> tuple[Filter, Filter]:
        """For appearance and for smoothness: values (B, V, I, J[, K]) to the sum over all other voxels' weighted ones."""
        appearance = self._all_pairs if self.is_exact else self._window
        return self._finished(appearance), self._finished(self._smoothness)

    def _finished(self, others: Filter) -> Filter:
        if self.crf.normalization == "none":
            return lambda values: _Symmetric.apply(values, others)
        # A voxel counts in its own sum: one unlike all others then hears little, instead of whoever is least unlike.
        scale = (1 + others(torch.ones_like(self.image[:, :1]))).rsqrt()
        return lambda values: _Symmetric.apply(values, lambda given: others(scale * given).mul_(scale))

    def _all_pairs(self, values: Tensor) -> Tensor:
        grids = torch.meshgrid(
            *[torch.arange(n) * (s / self.crf.theta_alpha_mm) for n, s in zip(self.size, self.spacing_mm, strict=True)],
            indexing="ij",
        )
        place = torch.stack(grids).to(self.image)[None].expand(len(self.image), *[-1] * (1 + len(self.size)))
        points = torch.cat([self.image, place], dim=1).flatten(2).mT  # (B, N, C + dims)
        flat = values.flatten(2).mT.contiguous()  # (B, N, V)
        found = []
        for some in points.split(max(1, PAIRS_AT_ONCE // points.shape[1]), dim=1):
            pairs = torch.cdist(some, points, compute_mode="donot_use_mm_for_euclid_dist")  # the others lose digits
            found.append(pairs.square_().mul_(-0.5).exp_() @ flat)
        return (torch.cat(found, dim=1) - flat).mT.reshape(values.shape)

    def _window(self, values: Tensor) -> Tensor:
        total = torch.zeros_like(values)
        on_cpu = values.device.type == "cpu"
        rows = max(1, BLOCK_VOXELS // math.prod(self.size[1:])) if on_cpu else self.size[0]
        for start in range(0, self.size[0], rows):
            for offset, distance in self._offsets:
                here, there = _shifted(self.size, offset, start, start + rows)
                weight = (self.image[here] - self.image[there]).square_().sum(dim=1, keepdim=True)
                weight.add_(distance).mul_(-0.5).exp_()
                total[here].addcmul_(weight, values[there])
                total[there].addcmul_(weight, values[here])
        # Without normalization each neighbor speaks for those left out beside it, too.
        return total if self.crf.normalization == "symmetric" else total.mul_(self._stands_for)

    @property
    def _offsets(self) -> list[tuple[tuple[int, ...], float]]:
        return self._neighbors[0]

    @property
    def _stands_for(self) -> int:
        """How many voxels one neighbor in the window is taken for."""
        return self._neighbors[1]

    @cached_property
    def _neighbors(self) -> tuple[list[tuple[tuple[int, ...], float]], int]:
        """Half of a voxel's neighbors, the others being opposite, and their squared distance in standard deviations.

        With them, how many voxels there are for each.
        """
        stride_mm = 0.0
        while True:
            sides = [self._side(axis, stride_mm) for axis in range(len(self.size))]
            if math.prod(map(len, sides)) <= 8 * (self.crf.neighbors + 1):  # of a box, a ball is an eighth at least
                found = list(self._half_a_ball(sides))
                if 2 * len(found) <= self.crf.neighbors:
                    return found, math.prod(side[1] - side[0] for side in sides if len(side) > 1)
            stride_mm = max(1.1 * stride_mm, min(self.spacing_mm))

    def _side(self, axis: int, stride_mm: float) -> list[int]:
        spacing = self.spacing_mm[axis]
        stride = max(1, round(stride_mm / spacing))
        reach = min(int(self.crf.cutoff * self.crf.theta_alpha_mm / spacing), self.size[axis] - 1) // stride
        return [stride * step for step in range(-reach, reach + 1)]

    def _half_a_ball(self, sides: Sequence[Sequence[int]]) -> Iterator[tuple[tuple[int, ...], float]]:
        for offset in product(*sides):
            distance = sum((o * s / self.crf.theta_alpha_mm) ** 2 for o, s in zip(offset, self.spacing_mm, strict=True))
            if offset > (0,) * len(offset) and distance <= self.crf.cutoff**2:
                yield offset, distance

    def _smoothness(self, values: Tensor) -> Tensor:
        found = torch.empty_like(values)
        for channel in range(values.shape[1]):  # each for itself, as a product makes copies
            total = values[:, channel]
            for axis, (n, spacing) in enumerate(zip(self.size, self.spacing_mm, strict=True), 1):
                place = torch.arange(n).to(values) * (spacing / self.crf.theta_gamma_mm)
                weights = (place[:, None] - place).square().mul(-0.5).exp()
                total = torch.tensordot(total, weights, dims=([axis], [0])).movedim(-1, axis)
            found[:, channel] = total
        return found.sub_(values)


class _Symmetric(torch.autograd.Function):
    """A linear filter whose matrix is symmetric: its gradient is itself, and nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weighted: Filter) -> Tensor:
        ctx.weighted = weighted
        return weighted(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        with full_precision(gradients[0].device):
            return _Symmetric.apply(gradients[0], ctx.weighted), None


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Sums over many voxels want all digits, whatever the network around them computes in."""
    has_less = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_less else nullcontext()


def mean_field(
    logits: Tensor,
    messages: Messages,
    weights: Tensor,
    *,
    iterations: int,
    compatibility: Tensor | None = None,
    regions: bool = False,
) -> Tensor:
    """Let voxels persuade each other, step by step.

    Args:
        logits: (B, R, I, J[, K]): what each voxel would say alone.
        messages: How they hear of each other.
        weights: (2, R) or (2, 1): of the kernels for appearance and smoothness, for each label.
        iterations: Steps.
        compatibility: (R, R): what neighbors of two labels cost; None: 1 wherever they differ.
        regions: Whether each channel is a yes or no of its own.

    Returns:
        Logits of the mean field's probabilities, (B, R, I, J[, K]).
    """
    weights = weights.reshape(*weights.shape, *[1] * (logits.dim() - 2))
    current = logits
    for _ in range(iterations):
        # Of a region, yes speaks for it and no against it.
        belief = 2 * current.sigmoid() - 1 if regions else current.softmax(dim=1)
        del current
        heard = sum(weight * weighted(belief) for weight, weighted in zip(weights, messages.filters, strict=True))
        assert isinstance(heard, Tensor)
        if compatibility is None:  # what all labels but this one cost is what all cost, less this one's
            current = logits + heard
        else:
            current = logits - torch.einsum("ab,nb...->na...", compatibility, heard)
    return current


@torch.no_grad()
def refine(
    prediction: Tensor,
    image: Tensor,
    spacing_mm: Sequence[float],
    crf: CRF | None = None,
    *,
    probabilities: bool = False,
    regions: bool = False,
) -> Refined:
    """A prediction made to follow the image.

    Memory: the prediction five times more, and `PAIRS_AT_ONCE` pairs where all are computed.

    Args:
        prediction: Logits (R, I, J[, K]).
        image: (C, I, J[, K]), on the same device.
        spacing_mm: Voxel size along each axis.
        crf: None: with its default numbers.
        probabilities: Whether the prediction is probabilities instead.
        regions: Whether its channels are regions (sigmoid), which may overlap, instead of labels (softmax).

    Raises:
        ValueError: If the shapes differ, or the CRF is for other labels or channels.
    """
    crf = crf or CRF()
    if prediction.shape[1:] != image.shape[1:] or len(spacing_mm) != image.dim() - 1:
        raise ValueError(
            f"a prediction of shape {tuple(prediction.shape)} for an image of shape {tuple(image.shape)}, "
            f"spacing {tuple(spacing_mm)} mm; they must be on the same grid"
        )
    crf.check(num_channels=len(image), num_labels=len(prediction), regions=regions)
    logits = prediction if prediction.dtype == torch.float64 else prediction.float()
    if probabilities:
        logits = prediction.logit(eps=_LEAST) if regions else prediction.clamp(min=_LEAST).log()
    messages = Messages(crf, image[None].to(logits.dtype), spacing_mm)
    costs = None if crf.compatibility is None else torch.tensor(crf.compatibility).to(logits)
    weights = torch.tensor([[crf.appearance_weight], [crf.smoothness_weight]]).to(logits)
    refined = mean_field(
        logits[None], messages, weights, iterations=crf.iterations, compatibility=costs, regions=regions
    )
    return Refined(refined[0], messages.connections)


def _shifted(
    size: Sequence[int], offset: Sequence[int], start: int, stop: int
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where voxels are, those of some rows of the first axis, and where their neighbors at an offset."""
    here, there = [slice(None), slice(None)], [slice(None), slice(None)]
    for axis, (n, step) in enumerate(zip(size, offset, strict=True)):
        low, high = max(0, -step), n - max(0, step)
        if axis == 0:
            low, high = start, max(start, min(stop, high))
        here.append(slice(low, high))
        there.append(slice(low + step, high + step))
    return tuple(here), tuple(there)
