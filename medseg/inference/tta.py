"""Mirroring at prediction: the average over flipped copies, left and right exchanged where they trade places."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor, nn

from medseg.errors import WorkflowError
from medseg.inference.uncertainty import Votes
from medseg.labels import Labels

LEFT_RIGHT_AXIS = 0
"""The axis that runs between left and right; every orientation that preprocessing offers has it first."""


class Mirrored(nn.Module):
    """A network that averages its logits over mirrored copies of its input.

    Args:
        network: (B, C, I, J[, K]) → logits (B, R, I, J[, K]).
        axes: Spatial axes to mirror, in all combinations: 2, 4 or 8 passes.
        labels: The label map, for its left and right pairs.

    Raises:
        WorkflowError: If left and right would be mirrored but a region has no counterpart.
    """

    def __init__(self, network: nn.Module, axes: Sequence[int], labels: Labels) -> None:
        super().__init__()
        self.network = network
        self.axes = tuple(sorted(set(axes)))
        self.labels = labels
        self.exchanged = mirrored_channels(labels) if LEFT_RIGHT_AXIS in self.axes else ()

    def forward(self, image: Tensor, votes: Votes | None = None) -> Tensor:
        total = self.network(image).float()
        maps = [self.labels.segment(total)] if votes else []
        flips = [flip for n in range(1, len(self.axes) + 1) for flip in combinations(self.axes, n)]
        for flip in flips:
            dims = [axis + 2 for axis in flip]
            logits = self.network(image.flip(dims)).flip(dims)
            logits = logits[:, self.exchanged] if LEFT_RIGHT_AXIS in flip else logits
            if votes:
                maps.append(self.labels.segment(logits))
            total = total + logits
        mean = total / (1 + len(flips))
        if votes:
            votes.count([*maps, self.labels.segment(mean)])
        return mean


def mirrored_channels(labels: Labels) -> tuple[int, ...]:
    """For each output channel, the channel that shows the same organ of a left-right mirrored patient.

    Raises:
        WorkflowError: If the mirror image of a region is no region.
    """
    other = {value: value for value in labels.names}
    for left, right in labels.pairs:
        other[left], other[right] = right, left
    if not labels.regions:
        return tuple(other[value] for value in sorted(labels.names))
    united = [frozenset(values) for values in labels.regions.values()]
    channels = []
    for name, values in zip(labels.regions, united, strict=True):
        mirrored = frozenset(other[value] for value in values)
        if mirrored not in united:
            raise WorkflowError(
                "E-MIRROR",
                f"region {name!r} (labels {sorted(values)}) becomes labels {sorted(mirrored)} when left and right are "
                f"mirrored, which is no region; predict without mirroring, or without axis {LEFT_RIGHT_AXIS}",
            )
        channels.append(united.index(mirrored))
    return tuple(channels)
