"""Dice of each organ on held-out cases, on the network's own grid, with pictures to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medseg.data.dataset import CachedCase
from medseg.labels import Labels
from medseg.metrics.confusion import count, dice
from medseg.training.memory import LARGE_SCAN, memory_told
from medseg.training.state import Validation

NUM_PICTURES = 3


class Validator:
    """Scores a network.

    Args:
        cases: Held-out, preprocessed.
        labels: The label map.
        segment: (network, image (C, I, J[, K])) → label map (I, J[, K]).
        draw: (case, predicted label map (I, J[, K]), title) → RGB picture.
        unions: Label values also scored together, by name.
        device: Where images go.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        labels: Labels,
        *,
        segment: Callable[[nn.Module, Tensor], Tensor],
        draw: Callable[[CachedCase, npt.NDArray[Any], str], npt.NDArray[np.uint8]],
        unions: Mapping[str, Sequence[int]],
        device: torch.device,
    ) -> None:
        self.cases = cases
        self.labels = labels
        self.segment = segment
        self.draw = draw
        self.unions = unions
        self.device = device

    def __call__(self, network: nn.Module) -> Validation:
        rows: list[tuple[str, str, float]] = []
        pictures: dict[str, npt.NDArray[np.uint8]] = {}
        for case in self.cases:
            predicted = self.predict(network, case)
            scores = self.score(case, predicted)
            rows += [(case.id, organ, value) for organ, value in scores.items()]
            if len(pictures) < NUM_PICTURES and not case.description["shows_text"]:  # which may name the patient
                title = f"{case.id}: " + ", ".join(f"{organ} {value:.2f}" for organ, value in scores.items())
                pictures[case.id] = self.draw(case, predicted, title)
        return Validation(rows, pictures)

    def predict(self, network: nn.Module, case: CachedCase) -> npt.NDArray[Any]:
        """The network's label map, (I, J[, K])."""
        with memory_told(LARGE_SCAN, where=f"case {case.id}"):
            image = torch.from_numpy(np.asarray(case.image, dtype=np.float32)).to(self.device)
            return self.segment(network, image).cpu().numpy()

    def score(self, case: CachedCase, predicted: npt.NDArray[Any]) -> dict[str, float]:
        """Dice of each organ and union."""
        organs, ignored = self.labels.scored(self.unions), self.labels.ignore_label
        counts = count(np.asarray(case.label[0]), predicted, organs, ignore_label=ignored)
        return {organ: dice(found) for organ, found in counts.items()}
