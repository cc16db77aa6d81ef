"""Recipes of random transforms for training, each sample's draw decided by its seed alone.

The parts are MONAI dictionary transforms and compose with any other of MONAI's: `spatial_augment`,
`deform_augment`, `turn_augment`, `intensity_augment` and `color_augment`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import Randomizable

from medseg.data.color_augment import (
    RandClahed,
    RandEmbossd,
    RandGrayd,
    RandHued,
    RandInvertd,
    RandSaturationd,
    RandSharpend,
)
from medseg.data.deform_augment import (
    RandElasticd,
    RandGridDistortiond,
    RandOpticalDistortiond,
    RandPiecewiseAffined,
    RandShiftScaleRotated,
    merged,
)
from medseg.data.intensity_augment import (
    RandBlurd,
    RandBrightnessd,
    RandContrastd,
    RandGammad,
    RandLowResolutiond,
    RandNoised,
)
from medseg.data.spatial_augment import RandFlipLabelsd, RandSpatiald
from medseg.data.turn_augment import RandQuarterTurnd, RandTransposed
from medseg.errors import WorkflowError
from medseg.labels import Labels
from medseg.registry import Registry, check_arguments

Steps = Sequence[Mapping[str, Any]]

AUGMENTATIONS: Registry[type[Randomizable]] = Registry(
    "augmentation",
    {
        "spatial": RandSpatiald,
        "noise": RandNoised,
        "blur": RandBlurd,
        "brightness": RandBrightnessd,
        "contrast": RandContrastd,
        "low_resolution": RandLowResolutiond,
        "gamma": RandGammad,
        "flip": RandFlipLabelsd,
        "transpose": RandTransposed,
        "quarter_turn": RandQuarterTurnd,
        "shift_scale_rotate": RandShiftScaleRotated,
        "elastic": RandElasticd,
        "grid_distortion": RandGridDistortiond,
        "optical_distortion": RandOpticalDistortiond,
        "piecewise_affine": RandPiecewiseAffined,
        "clahe": RandClahed,
        "sharpen": RandSharpend,
        "emboss": RandEmbossd,
        "invert": RandInvertd,
        "hue": RandHued,
        "saturation": RandSaturationd,
        "gray": RandGrayd,
    },
)

RECIPES: Registry[Steps] = Registry(
    "augmentation recipe",
    {
        "none": (),
        # nnU-Net's order, probabilities and ranges, which are the transforms' defaults
        "default": (
            {"name": "spatial"},
            {"name": "noise"},
            {"name": "blur"},
            {"name": "brightness"},
            {"name": "contrast"},
            {"name": "low_resolution"},
            {"name": "gamma", "args": {"prob": 0.1, "invert": True}},
            {"name": "gamma"},
            {"name": "flip"},
        ),
        # For few cases or many scanners: twice as often, and further
        "strong": (
            {"name": "spatial", "args": {"rotate_prob": 0.5, "scale_prob": 0.5, "scale_axes_apart": True}},
            {"name": "noise", "args": {"prob": 0.2, "std": (0.0, 0.2)}},
            {"name": "blur", "args": {"prob": 0.3, "sigma": (0.5, 1.5)}},
            {"name": "brightness", "args": {"prob": 0.3, "factor": (0.6, 1.6)}},
            {"name": "contrast", "args": {"prob": 0.3, "factor": (0.6, 1.6)}},
            {"name": "low_resolution", "args": {"prob": 0.4, "factor": (0.3, 1.0)}},
            {"name": "gamma", "args": {"prob": 0.2, "gamma": (0.6, 1.8), "invert": True}},
            {"name": "gamma", "args": {"prob": 0.5, "gamma": (0.6, 1.8)}},
            {"name": "flip"},
        ),
    },
)

SET_BY_MEDSEG = frozenset(
    {"keys", "label_keys", "patch_size", "spacing_mm", "pairs", "left_right_axis", "num_channels"}
)
"""Arguments that follow from the data and the workflow, not from a recipe."""


class Augmentation:
    """Turns what was read around a patch into a training sample.

    Args:
        spatial: The first transform; cuts the patch out.
        others: Those after it, in order.
    """

    def __init__(self, spatial: RandSpatiald, others: Sequence[Randomizable] = ()) -> None:
        self.spatial = spatial
        self.others = tuple(others)
        self.patch_size = spatial.patch_size
        self.source_size = spatial.source_size

    def source_size_for(self, seed: int) -> tuple[int, ...]:
        """Voxels that the sample of this seed needs, between `patch_size` and `source_size`.

        `source_size` is what the rarest draw needs, easily eight times the patch; most need no more than the patch.
        """
        return self.spatial.set_random_state(state=_random_state(seed, 0)).drawn_source_size()

    def __call__(self, sample: Mapping[Any, Any], seed: int) -> dict[Any, Any]:
        """Draw and apply.

        Args:
            sample: ``image`` floating (C, I, J[, K]) and ``label`` integer (1, I, J[, K]), arrays or tensors
                around one centre, of `source_size` or `source_size_for(seed)`. They are not changed.
            seed: Decides everything that is drawn.

        Returns:
            The sample with tensors of `patch_size`, contiguous: ``image`` float32, ``label`` in its dtype.
        """
        result: dict[Any, Any] = dict(sample)
        for position, transform in enumerate((self.spatial, *self.others)):
            # A stream for each: what one draws does not shift what the next does.
            transform.set_random_state(state=_random_state(seed, position))
            result = transform(result)
        return result


def augmentation(
    recipe: str | Steps,
    *,
    patch_size: Sequence[int],
    labels: Labels,
    spacing_mm: Sequence[float] | None = None,
    num_channels: int = 1,
) -> Augmentation:
    """Build a recipe; deformations that stand next to each other become one, with one resampling.

    Args:
        recipe: Name in RECIPES, or a list of ``{"name": name in AUGMENTATIONS, "args": its arguments}``;
            ``spatial``, if wanted, comes first.
        patch_size: Voxels of a sample along each spatial axis, in RAS order.
        labels: Whose pairs a left-right flip exchanges.
        spacing_mm: Voxel size along each axis; None: isotropic.
        num_channels: Of the image.

    Raises:
        WorkflowError: If a name or argument is unknown or out of range, or ``spatial`` comes late or twice.
    """
    steps = RECIPES[recipe] if isinstance(recipe, str) else recipe
    names = [step["name"] for step in steps]
    if "spatial" in names[1:]:
        raise WorkflowError("E-AUGMENT-ORDER", "'spatial' cuts the patch out; put it first, and once")
    settings = {
        "patch_size": tuple(patch_size),
        "spacing_mm": tuple(spacing_mm or [1.0] * len(patch_size))[: len(patch_size)],
        "pairs": labels.pairs,
        "num_channels": num_channels,
    }
    parts = [_build(step["name"], step.get("args") or {}, settings) for step in steps]
    if names[:1] != ["spatial"]:
        parts.insert(0, RandSpatiald(patch_size=patch_size, rotate_prob=0.0, scale_prob=0.0))
    return Augmentation(parts[0], merged(parts[1:]))


def _build(name: str, args: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    transform = AUGMENTATIONS[name]
    check_arguments(f"augmentation {name!r}", transform, args, given=SET_BY_MEDSEG)
    taken = inspect.signature(transform).parameters.keys() & settings.keys()
    try:
        return transform(**{key: settings[key] for key in taken}, **args)
    except (TypeError, ValueError) as error:
        raise WorkflowError("E-ARGUMENT", f"augmentation {name!r}: {error}") from None


def _random_state(seed: int, position: int) -> np.random.RandomState:
    # SFC64 is ready in microseconds; the usual Mersenne Twister takes 75 to seed, for each transform of each sample.
    return np.random.RandomState(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(position,))))
