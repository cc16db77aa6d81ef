"""What a training needs to be told, who it talks to, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Batch = Mapping[str, Any]
Target = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Args:
        rows: (case, organ, Dice); Dice is NaN where the organ is in neither label map.
        pictures: Case to RGB picture (H, W, 3) with contours.
    """

    rows: Sequence[tuple[str, str, float]]
    pictures: Mapping[str, npt.NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def dice(self) -> dict[str, float]:
        """Mean over cases for each organ, NaN where no case has it."""
        organs = dict.fromkeys(organ for _, organ, _ in self.rows)
        values = {organ: [d for _, o, d in self.rows if o == organ and not math.isnan(d)] for organ in organs}
        return {organ: float(np.mean(found)) if found else math.nan for organ, found in values.items()}


class Tracker(Protocol):
    """Where metrics go; see `medseg.tracking`."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def log_picture(self, picture: npt.NDArray[np.uint8], name: str, step: int) -> None: ...
    def rewind(self, step: int, count: int) -> None: ...


class Observer(Protocol):
    """Who watches; see `medseg.training.live`. The loss of a step is the mean that was logged last."""

    def on_step(self, step: int, loss: float) -> None: ...
    def on_validation(self, step: int, dice: Mapping[str, float], mean: float, best: float) -> None: ...
    def note(self, message: str) -> None: ...


@dataclass(frozen=True)
class Settings:
    """The numbers of a training; see `medseg.workflow.Train`."""

    iterations: int
    validate_every: int
    lr: float
    clip_grad_norm: float | None = None
    accumulate: int = 1
    early_stop: int | None = None
    ema: float = 0.0
    seed: int = 0
    scored: tuple[str, ...] = ()  # organs whose mean picks the best checkpoint; empty: all


@dataclass
class Progress:
    """How far a training is; all of it goes into the checkpoint."""

    step: int = 0
    scores: list[float] = field(default_factory=list)  # mean Dice at each validation
    best_step: int = 0
    lr_scale: float = 1.0  # halved each time the training diverged
    restores: int = 0
    loss_sum: float = 0.0  # since the last logged step
    loss_count: int = 0
    skipped: list[str] = field(default_factory=list)  # cases of the updates left out in a row, their loss not finite

    @property
    def best(self) -> float:
        return max(self.scores, default=-math.inf)
