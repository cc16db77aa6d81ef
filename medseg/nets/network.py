"""What every segmentation network has in common: which input sizes it takes, and logits at the input's size."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from medseg.errors import WorkflowError
from medseg.nets.blocks import crop_end, pad_end


@dataclass(frozen=True)
class AxisSizes:
    """Which input sizes a network computes on along one axis: ``offset + n × multiple``, from `minimum` up.

    Args:
        multiple: The product of the axis' strides.
        minimum: Smallest size; with nothing else said, that which leaves one voxel at the deepest level.
        offset: Not 0 only with unpadded convolutions.
        margin: Voxels by which the output is smaller than the input, for the same reason.
    """

    multiple: int
    minimum: int
    offset: int = 0
    margin: int = 0

    @classmethod
    def of_strides(cls, strides: Sequence[Sequence[int]]) -> list[AxisSizes]:
        """For each axis the sizes that all strides together divide.

        Args:
            strides: Between one level and the next, each with an entry an axis.
        """
        return [cls(multiple, minimum=multiple) for multiple in map(math.prod, zip(*strides, strict=True))]

    def padded(self, size: int) -> int:
        """The smallest size that the network computes on and that holds `size`."""
        return self.offset + math.ceil((size - self.offset) / self.multiple) * self.multiple

    def nearest(self, size: int) -> int:
        """The closest size that needs no padding."""
        steps = math.floor((size - self.offset) / self.multiple + 0.5)
        return max(self.minimum, self.offset + steps * self.multiple)


class SegmentationNetwork(nn.Module, ABC):
    """A network whose logits come back at the size of its input.

    An input that the strides do not divide is continued at its far ends by its last voxels, and the
    logits are cropped back. A subclass computes `outputs`; heads that only training uses live in a
    module list called `extra_heads`, so that weights trained with them also load without.

    Args:
        sizes: What input sizes it computes on, for each axis.
        extra_weights: Loss weight of each output beyond the main one (whose weight is 1).
    """

    def __init__(self, sizes: Sequence[AxisSizes], *, extra_weights: Sequence[float] = ()) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.extra_weights = tuple(extra_weights)
        self.register_load_state_dict_pre_hook(_drop_unused_heads)

    @abstractmethod
    def outputs(self, x: Tensor) -> list[Tensor]:
        """Logits of an input that needs no padding.

        Args:
            x: (B, C, I, J[, K]).

        Returns:
            The main logits (B, R, I, J[, K]); in training followed by one for each of `extra_weights`,
            at their own resolution, finest first.
        """

    @property
    def min_size(self) -> tuple[int, ...]:
        """Smallest input along each axis."""
        return tuple(axis.minimum for axis in self.sizes)

    def efficient_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The closest input size that needs no padding, for hints."""
        return self._padded_size([axis.nearest(n) for axis, n in zip(self.sizes, size, strict=True)])

    def check_size(self, size: Sequence[int]) -> None:
        """Refuse an input that the network cannot take.

        Raises:
            WorkflowError: If it has the wrong number of axes or is smaller than `min_size`.
        """
        if len(size) != len(self.sizes):
            raise WorkflowError(
                "E-PATCH-SIZE", f"an input of {_times(size)} for a {len(self.sizes)}D network; give one size an axis"
            )
        if any(n < least for n, least in zip(size, self.min_size, strict=True)):
            raise WorkflowError(
                "E-PATCH-SIZE",
                f"an input of {_times(size)} voxels is too small for this {type(self).__name__}, which needs at least "
                f"{_times(self.min_size)}; use a patch of {_times(self.efficient_size(size))}, or fewer levels",
            )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, R, I, J[, K]); in training, where there are `extra_weights`, the list of all outputs.

        Args:
            x: (B, C, I, J[, K]), any size from `min_size` up.

        Raises:
            WorkflowError: If the input is smaller than `min_size`.
        """
        size = tuple(x.shape[2:])
        self.check_size(size)
        padded = self._padded_size(size)
        cropped = [self._crop(output, size, padded) for output in self.outputs(pad_end(x, padded))]
        return cropped if self.training and self.extra_weights else cropped[0]

    def _padded_size(self, size: Sequence[int]) -> tuple[int, ...]:
        padded = [axis.padded(n) for axis, n in zip(self.sizes, size, strict=True)]
        if all(n == axis.multiple for axis, n in zip(self.sizes, padded, strict=True)):
            padded[0] *= 2  # norms cannot learn from the single voxel that would be left at the deepest level
        return tuple(padded)

    def _crop(self, output: Tensor, size: Sequence[int], padded: Sequence[int]) -> Tensor:
        kept = [
            math.ceil(m * (n - axis.margin) / (p - axis.margin))  # m voxels of the output cover p − margin of the input
            for axis, m, n, p in zip(self.sizes, output.shape[2:], size, padded, strict=True)
        ]
        return crop_end(output, kept)


def _drop_unused_heads(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if not getattr(module, "extra_weights", ()):
        for name in [name for name in state_dict if name.startswith(f"{prefix}extra_heads.")]:
            del state_dict[name]


def _times(size: Sequence[int]) -> str:
    return " × ".join(str(n) for n in size)
