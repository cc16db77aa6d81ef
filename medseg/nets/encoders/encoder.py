"""What every encoder has in common: features at falling resolutions, and the names of its published weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from medseg.nets.blocks import PerAxis, per_axis


class Encoder(nn.Module, ABC):
    """The first half of a network: from an image to features, finest first.

    A subclass names its modules as the published checkpoint of its architecture does, so that a 2D state
    dict fits by name; what differs (a prefix, the classifier's own layers) `published` and `unused` say.

    Args:
        channels: Of each feature, finest first.
        strides: By how much each feature is coarser than the image, along each axis.
    """

    published: ClassVar[Mapping[str, str]] = {}
    """Prefixes of published names → prefixes of ours, where they differ."""

    unused: ClassVar[Sequence[str]] = ()
    """Prefixes of published names that we can do without, e.g. ``fc.``: dropped where nothing here has that name and shape."""

    def __init__(self, channels: Sequence[int], strides: Sequence[PerAxis], spatial_dims: int) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.strides = tuple(per_axis(stride, spatial_dims) for stride in strides)

    def fitted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published weights in the form that this encoder takes, or is inflated from."""
        return dict(weights)

    @abstractmethod
    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of an image.

        Args:
            x: (B, C, I, J[, K]), divisible by the last of `strides`.

        Returns:
            One (B, channels[n], I / strides[n][0], …) for each of `channels`.
        """


def plane_stride(stride: int, spatial_dims: int, *, in_plane: bool) -> tuple[int, ...]:
    """A stride along all axes, or along the first two alone: the third then runs across thick slices."""
    return (stride,) * (2 if in_plane else spatial_dims) + (1,) * (spatial_dims - 2 if in_plane else 0)
