"""Random changes of intensity, of the image alone: noise, blur, brightness, contrast, gamma, low resolution.

MONAI dictionary transforms. Each channel is changed by a draw of its own, relative to its own
statistics, so that the recipes suit any normalisation. Nothing is changed in place. The functions
behind the classes take one channel, float32 (I, J[, K]), and what was drawn.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor

from medseg.data.draws import check_factors, check_interval, check_probability, draw_factor, plain, resampled_axes


class RandIntensityd(MapTransform, RandomizableTransform, abc.ABC):
    """A change of intensity that happens by chance.

    Args:
        keys: Images, each (C, I, J[, K]); the result is float32.
        prob: Probability that a sample is changed.
        channel_prob: Probability that, in such a sample, a channel is.
    """

    def __init__(self, keys: KeysCollection = "image", *, prob: float, channel_prob: float = 1.0) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, check_probability("prob", prob))
        self.channel_prob = check_probability("channel_prob", channel_prob)

    @abc.abstractmethod
    def change(self, channel: Tensor) -> Tensor:
        """Draw from ``self.R`` and give the changed channel, (I, J[, K]); the one given stays as it is."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        self.randomize(None)
        for key in self.key_iterator(result):
            image = result[key] = plain(result[key]).float()
            if self._do_transform:
                changed = [self.change(c) if self.R.random_sample() < self.channel_prob else c for c in image]
                result[key] = torch.stack(changed) if len(changed) > 1 else changed[0][None]
        return result


class RandNoised(RandIntensityd):
    """Add Gaussian noise.

    Args:
        keys: Images, each (C, I, J[, K]).
        prob: Probability that a sample is changed.
        channel_prob: Probability that, in such a sample, a channel is.
        std: Least and largest standard deviation, in standard deviations of the channel.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        prob: float = 0.1,
        channel_prob: float = 1.0,
        std: Sequence[float] = (0.0, 0.1),
    ) -> None:
        super().__init__(keys, prob=prob, channel_prob=channel_prob)
        self.std = check_interval("std", std, within=(0.0, math.inf))

    def change(self, channel: Tensor) -> Tensor:
        std = self.R.uniform(*self.std)
        return add_noise(channel, std, seed=int(self.R.randint(2**31)))


class RandBlurd(RandIntensityd):
    """Blur with a Gaussian.

    Args:
        keys: Images, each (C, I, J[, K]).
        prob: Probability that a sample is changed.
        channel_prob: Probability that, in such a sample, a channel is.
        sigma: Least and largest width in voxels, drawn for each axis.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        prob: float = 0.2,
        channel_prob: float = 0.5,
        sigma: Sequence[float] = (0.5, 1.0),
    ) -> None:
        super().__init__(keys, prob=prob, channel_prob=channel_prob)
        self.sigma = check_factors("sigma", sigma)

    def change(self, channel: Tensor) -> Tensor:
        return blur(channel, [self.R.uniform(*self.sigma) for _ in channel.shape])


class RandBrightnessd(RandIntensityd):
    """Multiply the values by a factor.

    Args:
        keys: Images, each (C, I, J[, K]).
        prob: Probability that a sample is changed.
        channel_prob: Probability that, in such a sample, a channel is.
        factor: Least and largest factor.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        prob: float = 0.15,
        channel_prob: float = 1.0,
        factor: Sequence[float] = (0.75, 1.25),
    ) -> None:
        super().__init__(keys, prob=prob, channel_prob=channel_prob)
        self.factor = check_factors("factor", factor)

    def change(self, channel: Tensor) -> Tensor:
        return channel * draw_factor(self.R, self.factor)


class RandContrastd(RandIntensityd):
    """Spread the values about their mean, within their range.

    Args:
        keys: Images, each (C, I, J[, K]).
        prob: Probability that a sample is changed.
        channel_prob: Probability that, in such a sample, a channel is.
        factor: Least and largest factor; below 1 contrast is lost.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        prob: float = 0.15,
        channel_prob: float = 1.0,
        factor: Sequence[float] = (0.75, 1.25),
    ) -> None:
        super().__init__(keys, prob=prob, channel_prob=channel_prob)
        self.factor = check_factors("factor", factor)

    def change(self, channel: Tensor) -> Tensor:
        return adjust_contrast(channel, draw_factor(self.R, self.factor))


class RandGammad(RandIntensityd):
    """Bend the grey values, keeping their mean and standard deviation.

    Args:
        keys: Images, each (C, I, J[, K]).
        prob: Probability that a sample is changed.
        channel_prob: Probability that, in such a sample, a channel is.
        gamma: Least and largest exponent.
        invert: Bend from the bright end.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        prob: float = 0.3,
        channel_prob: float = 1.0,
        gamma: Sequence[float] = (0.7, 1.5),
        invert: bool = False,
    ) -> None:
        super().__init__(keys, prob=prob, channel_prob=channel_prob)
        self.gamma = check_factors("gamma", gamma)
        self.invert = invert

    def change(self, channel: Tensor) -> Tensor:
        return adjust_gamma(channel, draw_factor(self.R, self.gamma), invert=self.invert)


class RandLowResolutiond(RandIntensityd):
    """Sample coarsely and interpolate back, as if scanned at a lower resolution.

    Args:
        keys: Images, each (C, I, J[, K]).
        prob: Probability that a sample is changed.
        channel_prob: Probability that, in such a sample, a channel is.
        factor: Least and largest share of the voxels kept along an axis.
        spacing_mm: Voxel size along each axis; None: isotropic. Slices lose resolution within, not across.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        prob: float = 0.25,
        channel_prob: float = 0.5,
        factor: Sequence[float] = (0.5, 1.0),
        spacing_mm: Sequence[float] | None = None,
    ) -> None:
        super().__init__(keys, prob=prob, channel_prob=channel_prob)
        self.factor = check_interval("factor", factor, within=(0.01, 1.0))
        self.spacing_mm = spacing_mm

    def change(self, channel: Tensor) -> Tensor:
        axes = resampled_axes(channel.shape, self.spacing_mm or [1.0] * channel.ndim)
        return lower_resolution(channel, self.R.uniform(*self.factor), axes=axes)


def mean_and_std(channel: Tensor) -> tuple[float, float]:
    """Mean and standard deviation; 20 times as fast as `torch.std_mean`, which does not vectorise on a CPU."""
    mean = float(channel.mean())
    return mean, float(torch.linalg.vector_norm(channel - mean)) / math.sqrt(channel.numel())


def add_noise(channel: Tensor, std: float, *, seed: int) -> Tensor:
    """Add Gaussian noise of `std` standard deviations of the channel."""
    noise = torch.empty_like(channel).normal_(generator=torch.Generator().manual_seed(seed))
    return noise.mul_(std * mean_and_std(channel)[1]).add_(channel)


def adjust_contrast(channel: Tensor, factor: float) -> Tensor:
    """Multiply the distances from the mean; what would leave the range stays at its end."""
    mean = float(channel.mean())
    low, high = torch.aminmax(channel)
    return (channel * factor).add_(mean * (1 - factor)).clamp_(float(low), float(high))


def adjust_gamma(channel: Tensor, gamma: float, *, invert: bool = False) -> Tensor:
    """Raise the values, scaled to [0, 1], to a power; then restore their mean and standard deviation.

    Args:
        channel: Constant ones stay as they are.
        gamma: Above 1 the dark values are drawn together, below 1 the bright ones.
        invert: The other way round.
    """
    low, high = (float(value) for value in torch.aminmax(channel))
    if not high > low:
        return channel
    scaled = (high - channel) if invert else (channel - low)
    # Rounding may leave a hair above 1, which does no harm; below 0 cannot be.
    bent = scaled.mul_(1 / (high - low)).pow_(gamma)
    (mean, std), (bent_mean, bent_std) = mean_and_std(channel), mean_and_std(bent)
    slope = (-std if invert else std) / bent_std
    return bent.mul_(slope).add_(mean - slope * bent_mean)


def blur(channel: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Gaussian blur, cut off at three sigma, the border repeated.

    Args:
        channel: (I, J[, K]).
        sigmas: Width along each axis, in voxels.
    """
    for axis, sigma in enumerate(sigmas):
        size, radius = channel.shape[axis], math.ceil(3 * sigma)
        if size == 1:
            continue
        weights = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(radius + 1)]
        total = weights[0] + 2 * sum(weights[1:])
        border = [channel.narrow(axis, 0, 1)] * radius, [channel.narrow(axis, size - 1, 1)] * radius
        padded = torch.cat([*border[0], channel, *border[1]], dim=axis)
        # Shifted additions run at the speed of memory; a convolution with so short a kernel takes five times as long.
        channel = channel * (weights[0] / total)
        for distance in range(1, radius + 1):
            for start in (radius - distance, radius + distance):
                channel.add_(padded.narrow(axis, start, size), alpha=weights[distance] / total)
    return channel


def lower_resolution(channel: Tensor, factor: float, *, axes: Sequence[int]) -> Tensor:
    """Keep the nearest voxel of each coarser one, then interpolate linearly.

    Args:
        channel: (I, J[, K]).
        factor: Share of the voxels kept along each of `axes`.
        axes: Where resolution is lost.
    """
    size = channel.shape
    coarse = [max(1, round(n * factor)) if axis in axes else n for axis, n in enumerate(size)]
    kept = F.interpolate(channel[None, None], coarse, mode="nearest-exact")
    return F.interpolate(kept, size, mode="trilinear" if len(size) == 3 else "bilinear", align_corners=False)[0, 0]
