"""Training-time augmentation: medseg's default recipe beside nnU-Net's (batchgeneratorsv2) and MONAI's equivalents.

    python benchmarks/augmentation.py [--samples 40] [--rounds 5]

Samples a second on one core, from a source to a patch of one channel and three labels, labels by the
nearest voxel on every side. The sides take turns, so that a busy machine slows all of them; CPU time
counts. Memory is what a process adds at its peak. Needs ``pip install -e ".[bench]"`` for nnU-Net's part.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from monai import transforms as mt
from torch import Tensor

from medseg.data.augment import augmentation
from medseg.labels import Labels

Size = tuple[int, ...]
Sample = dict[str, Tensor]
Side = Callable[[Sample, int], object]

SETTINGS: tuple[tuple[Size, Size], ...] = (
    ((160, 160, 160), (128, 128, 128)),
    ((120, 120, 120), (96, 96, 96)),
    ((50, 70, 50), (40, 56, 40)),
)


def medseg_side(patch: Size) -> Side:
    """The default recipe."""
    return augmentation("default", patch_size=patch, labels=Labels(names={0: "background", 1: "liver", 2: "tumour"}))


def nnunet_side(patch: Size) -> Side:
    """The transforms of nnU-Net's default 3D trainer, with nearest labels as the others have."""
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    radians = 30 / 180 * np.pi
    factor, gamma = BGContrast((0.75, 1.25)), BGContrast((0.7, 1.5))
    spatial = SpatialTransform(
        patch,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_rotation=0.2,
        rotation=(-radians, radians),
        p_scaling=0.2,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
        mode_seg="nearest",
    )
    by_chance = (
        (GaussianNoiseTransform((0, 0.1), p_per_channel=1, synchronize_channels=True), 0.1),
        (GaussianBlurTransform((0.5, 1.0), False, False, p_per_channel=0.5, benchmark=True), 0.2),
        (MultiplicativeBrightnessTransform(factor, False, p_per_channel=1), 0.15),
        (ContrastTransform(factor, True, False, p_per_channel=1), 0.15),
        (SimulateLowResolutionTransform((0.5, 1), False, True, None, None, p_per_channel=0.5), 0.25),
        (GammaTransform(gamma, p_invert_image=1, synchronize_channels=False, p_per_channel=1, p_retain_stats=1), 0.1),
        (GammaTransform(gamma, p_invert_image=0, synchronize_channels=False, p_per_channel=1, p_retain_stats=1), 0.3),
    )
    mirror = MirrorTransform(allowed_axes=(0, 1, 2))
    compose = ComposeTransforms(
        [spatial, *[RandomTransform(part, apply_probability=prob) for part, prob in by_chance], mirror]
    )

    def run(sample: Sample, seed: int) -> object:
        np.random.seed(seed)  # noqa: NPY002 - nnU-Net draws from the global state
        torch.manual_seed(seed)
        # It works in place, on a private copy in its own loader too.
        return compose(image=sample["image"].clone(), segmentation=sample["label"])

    return run


def monai_side(patch: Size) -> Side:
    """MONAI's transforms with nnU-Net's chances and ranges."""
    radians = float(np.pi / 6)
    keys, mode = ("image", "label"), ("bilinear", "nearest")
    rotate, scale = (radians,) * 3, ((-0.3, 0.4),) * 3
    affine = {"keys": keys, "spatial_size": patch, "mode": mode, "padding_mode": "border"}
    compose = mt.Compose(
        [
            # Each alone with the chance nnU-Net has for it; both in one resampling, as there.
            mt.OneOf(
                [
                    mt.RandAffined(prob=1, rotate_range=rotate, scale_range=scale, **affine),
                    mt.RandAffined(prob=1, rotate_range=rotate, **affine),
                    mt.RandAffined(prob=1, scale_range=scale, **affine),
                    mt.CenterSpatialCropd(keys, patch),
                ],
                weights=[0.04, 0.16, 0.16, 0.64],
            ),
            mt.RandGaussianNoised("image", prob=0.1, std=0.1),
            mt.RandGaussianSmoothd("image", prob=0.1, sigma_x=(0.5, 1), sigma_y=(0.5, 1), sigma_z=(0.5, 1)),
            mt.RandScaleIntensityd("image", prob=0.15, factors=0.25),
            mt.RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
            mt.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
            mt.RandScaleIntensityFixedMeand("image", prob=0.15, factors=0.25, preserve_range=True),
            mt.RandSimulateLowResolutiond("image", prob=0.125, zoom_range=(0.5, 1)),
            *[mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)],
        ]
    )

    def run(sample: Sample, seed: int) -> object:
        compose.set_random_state(seed=seed)
        return compose(sample)

    return run


SIDES: dict[str, Callable[[Size], Side]] = {"medseg": medseg_side, "nnU-Net": nnunet_side, "MONAI": monai_side}


def make_sample(size: Size) -> Sample:
    """Noise, the hardest on caches and branches, with three labels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *size, generator=generator)
    return {"image": image, "label": torch.bucketize(image, torch.tensor([0.5, 1.5])).to(torch.int16)}


def cpu_seconds(side: Side, sample: Sample, seeds: range) -> float:
    """CPU time for one sample a seed."""
    start = time.process_time()
    for seed in seeds:
        side(sample, seed)
    return time.process_time() - start


def peak_mb(side: Side, sample: Sample, seeds: range) -> float:
    """Memory that a process of its own adds at its peak."""

    def child(result: multiprocessing.Queue[float]) -> None:  # type: ignore[type-arg]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cpu_seconds(side, sample, seeds)
        result.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    context = multiprocessing.get_context("fork")
    result = context.Queue()
    process = context.Process(target=child, args=(result,))
    process.start()
    peak = result.get()
    process.join()
    return peak


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--samples", type=int, default=40, help="a round, each with its own draw; small patches take more"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for source, patch in SETTINGS:
        sample, sides = make_sample(source), {}
        for name, make in SIDES.items():
            try:
                sides[name] = make(patch)
            except ImportError as error:
                print(f'{name} is left out ({error}); install it with: pip install -e ".[bench]"')
        peaks = {name: peak_mb(side, sample, range(30)) for name, side in sides.items()}
        count = options.samples * max(1, min(10, 96**3 // int(np.prod(patch))))
        for side in sides.values():
            cpu_seconds(side, sample, range(20))  # warm up; nnU-Net chooses its blur by trial
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range(options.rounds):
            seeds = range(round_ * count, (round_ + 1) * count)
            for name, side in sides.items():
                seconds[name].append(cpu_seconds(side, sample, seeds))
        print(
            f"\n{source} to {patch}, {options.rounds} rounds of {count} samples, one thread, torch {torch.__version__}"
        )
        print(f"{'':10s} {'samples/s':>10s} {'range':>15s} {'medseg is faster by':>20s} {'peak MB':>8s}")
        ours = median(seconds["medseg"])
        for name, times in seconds.items():
            rates = sorted(count / t for t in times)
            ratio = median(times) / ours
            print(
                f"{name:10s} {median(rates):10.1f} {rates[0]:6.1f} – {rates[-1]:6.1f} {ratio:19.2f}× {peaks[name]:8.0f}"
            )


if __name__ == "__main__":
    main()
