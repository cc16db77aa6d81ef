"""Random changes that pictures call for: local contrast, edges, the negative, and the colors of RGB.

MONAI dictionary transforms that change the image alone, never in place. CLAHE, sharpening, embossing and
the negative are relative to each channel, as `intensity_augment` is, and suit any normalization. Hue,
saturation and gray read three channels as red, green and blue on one scale: clip to [0, 255] with minmax, or
imagenet, but not a zscore of each channel for itself, which leaves no colors.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor

from medseg.data.draws import check_factors, check_interval, check_probability, draw_factor, plain
from medseg.data.intensity_augment import RandIntensityd, blur, mean_and_std
from medseg.errors import WorkflowError

LUMA = (0.299, 0.587, 0.114)
"""Share of red, green and blue in the brightness (ITU-R BT.601)."""

BINS = 256
TILE_VOXELS = 4  # along an axis; the histogram of fewer says nothing


class RandClahed(RandIntensityd):
    """Contrast-limited adaptive histogram equalization: local contrast, tile by tile.

    Args:
        keys: Images, each (C, I, J[, K]).
        prob: Probability that a sample is changed.
        channel_prob: Probability that, in such a sample, a channel is.
        clip_limit: Least and largest limit of a histogram bin, in times the mean bin; 1 changes next to nothing.
        tiles: Along each axis.

    Reference:
        Zuiderveld 1994, doi:10.1016/B978-0-12-336156-1.50061-6.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        prob: float = 0.15,
        channel_prob: float = 1.0,
        clip_limit: Sequence[float] = (1.5, 4.0),
        tiles: int = 8,
    ) -> None:
        super().__init__(keys, prob=prob, channel_prob=channel_prob)
        self.clip_limit = check_interval("clip_limit", clip_limit, within=(1.0, 1000.0))
        self.tiles = int(check_interval("tiles", (tiles, tiles), within=(1, 1000))[0])

    def change(self, channel: Tensor) -> Tensor:
        return clahe(channel, draw_factor(self.R, self.clip_limit), tiles=self.tiles)


class RandSharpend(RandIntensityd):
    """Sharpen by an unsharp mask; what would leave the range stays at its end.

    Args:
        keys: Images, each (C, I, J[, K]).
        prob: Probability that a sample is changed.
        channel_prob: Probability that, in such a sample, a channel is.
        amount: Least and largest share of the detail that is added once more.
        sigma: Least and largest width of the blur that tells detail, in voxels.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        prob: float = 0.15,
        channel_prob: float = 1.0,
        amount: Sequence[float] = (0.2, 1.0),
        sigma: Sequence[float] = (0.5, 1.5),
    ) -> None:
        super().__init__(keys, prob=prob, channel_prob=channel_prob)
        self.amount = check_interval("amount", amount, within=(0.0, 100.0))
        self.sigma = check_factors("sigma", sigma)

    def change(self, channel: Tensor) -> Tensor:
        return sharpen(channel, self.R.uniform(*self.amount), sigma=self.R.uniform(*self.sigma))


class RandEmbossd(RandIntensityd):
    """Light the picture from one side, as a relief; what would leave the range stays at its end.

    Args:
        keys: Images, each (C, I, J[, K]).
        prob: Probability that a sample is changed.
        channel_prob: Probability that, in such a sample, a channel is.
        strength: Least and largest share of the slope, in values a voxel, that is added.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        prob: float = 0.15,
        channel_prob: float = 1.0,
        strength: Sequence[float] = (0.2, 0.8),
    ) -> None:
        super().__init__(keys, prob=prob, channel_prob=channel_prob)
        self.strength = check_interval("strength", strength, within=(0.0, 100.0))

    def change(self, channel: Tensor) -> Tensor:
        direction = self.R.normal(size=channel.ndim) * (np.array(channel.shape) > 1)
        direction /= max(float(np.linalg.norm(direction)), 1e-9)
        return emboss(channel, self.R.uniform(*self.strength) * direction)


class RandInvertd(RandIntensityd):
    """The negative: mirror the values at their mean, so that mean and deviation stay.

    Args:
        keys: Images, each (C, I, J[, K]).
        prob: Probability that a sample is inverted.
        channel_prob: Probability that, in such a sample, a channel is.
    """

    def __init__(self, keys: KeysCollection = "image", *, prob: float = 0.1, channel_prob: float = 1.0) -> None:
        super().__init__(keys, prob=prob, channel_prob=channel_prob)

    def change(self, channel: Tensor) -> Tensor:
        return 2 * mean_and_std(channel)[0] - channel


class RandColord(MapTransform, RandomizableTransform, abc.ABC):
    """A change of color that happens by chance.

    Args:
        keys: Images, each red, green and blue (3, I, J[, K]); the result is float32.
        num_channels: Of the images.
        prob: Probability that a sample is changed.
    """

    def __init__(self, keys: KeysCollection = "image", *, num_channels: int = 3, prob: float) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, check_probability("prob", prob))
        if num_channels != 3:
            raise WorkflowError("E-ARGUMENT", f"{num_channels} channels have no color; expected red, green and blue")

    @abc.abstractmethod
    def change(self, image: Tensor) -> Tensor:
        """Draw from ``self.R`` and give the changed image (3, I, J[, K]); the one given stays as it is."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        self.randomize(None)
        for key in self.key_iterator(result):
            image = result[key] = plain(result[key]).float()
            if self._do_transform:
                result[key] = self.change(image)
        return result


class RandHued(RandColord):
    """Turn the hue, keeping saturation and value (HSV).

    Args:
        keys: Images, each (3, I, J[, K]).
        num_channels: Of the images.
        prob: Probability that a sample is changed.
        shift_deg: Largest turn, either way; 180° makes red cyan.
    """

    def __init__(
        self, keys: KeysCollection = "image", *, num_channels: int = 3, prob: float = 0.3, shift_deg: float = 20.0
    ) -> None:
        super().__init__(keys, num_channels=num_channels, prob=prob)
        self.shift_deg = check_interval("shift_deg", (0.0, shift_deg), within=(0.0, 180.0))[1]

    def change(self, image: Tensor) -> Tensor:
        return shift_hue(image, self.R.uniform(-self.shift_deg, self.shift_deg))


class RandSaturationd(RandColord):
    """Multiply the distances from gray; what would leave the range stays at its end.

    Args:
        keys: Images, each (3, I, J[, K]).
        num_channels: Of the images.
        prob: Probability that a sample is changed.
        factor: Least and largest factor; 0 would be gray.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        num_channels: int = 3,
        prob: float = 0.3,
        factor: Sequence[float] = (0.7, 1.4),
    ) -> None:
        super().__init__(keys, num_channels=num_channels, prob=prob)
        self.factor = check_factors("factor", factor)

    def change(self, image: Tensor) -> Tensor:
        return saturate(image, draw_factor(self.R, self.factor))


class RandGrayd(RandColord):
    """Take the colors away: every channel becomes the brightness.

    Args:
        keys: Images, each (3, I, J[, K]).
        num_channels: Of the images.
        prob: Probability that a sample is changed.
    """

    def __init__(self, keys: KeysCollection = "image", *, num_channels: int = 3, prob: float = 0.1) -> None:
        super().__init__(keys, num_channels=num_channels, prob=prob)

    def change(self, image: Tensor) -> Tensor:
        return saturate(image, 0.0)


def clahe(channel: Tensor, clip_limit: float, *, tiles: int = 8, bins: int = BINS) -> Tensor:
    """Each value's rank within its tile, as a value of the channel's range, interpolated between tiles.

    Args:
        channel: float32, (I, J[, K]); constant ones stay as they are.
        clip_limit: What a histogram bin may hold, in times the tile's mean bin; the rest goes to all bins.
        tiles: Along each axis, fewer where there are less than `TILE_VOXELS` voxels for each.
        bins: Of the histograms, between the channel's lowest and highest value.
    """
    low, high = (float(value) for value in torch.aminmax(channel))
    if not high > low:
        return channel
    level = ((channel - low) * (bins / (high - low))).long().clamp_(0, bins - 1)
    counts = [max(1, min(tiles, n // TILE_VOXELS)) for n in channel.shape]
    mapping = _tile_mappings(level, counts, clip_limit, bins)  # (*counts, bins)
    corners = []  # along each axis, for both neighbors: number of the tile, and its weight
    for axis, (n, count) in enumerate(zip(channel.shape, counts, strict=True)):
        place = ((torch.arange(float(n)) + 0.5) * (count / n) - 0.5).clamp_(0, count - 1)
        first = place.long().clamp_(max=max(0, count - 2))
        shape = [-1 if a == axis else 1 for a in range(channel.ndim)]
        share = (place - first).view(shape)
        corners.append(((first.view(shape), 1 - share), ((first + 1).clamp_(max=count - 1).view(shape), share)))
    rank = torch.zeros_like(channel)
    for corner in itertools.product(*corners):
        numbers, weights = zip(*corner, strict=True)
        rank += mapping[(*numbers, level)] * math.prod(weights)
    return rank.mul_(high - low).add_(low)


def sharpen(channel: Tensor, amount: float, *, sigma: float) -> Tensor:
    """Add `amount` times what a Gaussian blur of `sigma` voxels takes away; the range stays."""
    low, high = torch.aminmax(channel)
    return (channel + amount * (channel - blur(channel, [sigma] * channel.ndim))).clamp_(low, high)


def emboss(channel: Tensor, slope: npt.NDArray[np.float64]) -> Tensor:
    """Add the slope along a direction; the range stays.

    Args:
        channel: float32, (I, J[, K]).
        slope: What is added for a rise of one a voxel along each axis.
    """
    result = channel.clone()
    for axis, share in enumerate(slope.tolist()):
        if share:
            n = channel.shape[axis]
            ahead, behind = torch.arange(1, n + 1).clamp_(max=n - 1), torch.arange(-1, n - 1).clamp_(min=0)
            result.add_(channel.index_select(axis, ahead) - channel.index_select(axis, behind), alpha=share / 2)
    low, high = torch.aminmax(channel)
    return result.clamp_(low, high)


def shift_hue(image: Tensor, degrees: float) -> Tensor:
    """Turn the hue of red, green and blue (3, …); the largest and the least of the three stay what they are.

    The hue depends on the channels' differences alone, so that any common scale and offset will do.
    """
    red, green, blue = image
    low, high = image.amin(dim=0), image.amax(dim=0)
    chroma = high - low
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    hue = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    channels = []
    for start in (5.0, 3.0, 1.0):
        place = (hue + degrees / 60 + start) % 6
        channels.append(high - chroma * torch.minimum(place, 4 - place).clamp_(0, 1))
    return torch.stack(channels)


def saturate(image: Tensor, factor: float) -> Tensor:
    """Multiply the distances of red, green and blue (3, …) from their brightness; the range of all stays."""
    gray = torch.tensordot(torch.tensor(LUMA), image, dims=1)
    low, high = torch.aminmax(image)
    return (gray + factor * (image - gray)).clamp_(low, high)


def _tile_mappings(level: Tensor, counts: Sequence[int], clip_limit: float, bins: int) -> Tensor:
    """For each tile the share of its voxels at or below each level, after limiting: (*counts, bins)."""
    tile = torch.zeros_like(level)
    for axis, (n, count) in enumerate(zip(level.shape, counts, strict=True)):
        number = torch.arange(n) * count // n
        tile = tile * count + number.view([-1 if a == axis else 1 for a in range(level.ndim)])
    num_tiles = math.prod(counts)
    histogram = torch.bincount((tile * bins + level).flatten(), minlength=num_tiles * bins)
    histogram = histogram.view(num_tiles, bins).double()
    size = histogram.sum(dim=1, keepdim=True)
    limited = histogram.minimum(clip_limit * size / bins)
    limited += (size - limited.sum(dim=1, keepdim=True)) / bins
    return (limited.cumsum(dim=1) / size).float().view(*counts, bins)
