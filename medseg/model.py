"""What training hands to prediction, as data: weights and everything needed to use them.

A model folder holds ``model.safetensors`` and ``model.json``. Nothing in it is code, and nothing is
left to be worked out at prediction time: spacing and intensity numbers are the resolved ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medseg.errors import ModelError
from medseg.files import write_atomically
from medseg.geometry import Geometry
from medseg.labels import Labels

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
Normalization = Literal["zscore", "foreground", "minmax", "none"]
Weighting = Literal["gaussian", "constant"]
Crop = Literal["air", "body", "none"]


@dataclass(frozen=True)
class Intensity:
    """What happens to the values of one channel, in this order.

    Args:
        clip: Lowest and highest value kept (HU in CT); None: no clipping.
        normalize: ``zscore`` by the scan's own mean and deviation, ``foreground`` by `mean` and
            `std`, ``minmax`` to [0, 1] by the scan's own range (or by `clip`), ``none``.
        mean: Mean of the training cases' foreground, for ``foreground``.
        std: Its standard deviation.
    """

    clip: tuple[float, float] | None = None
    normalize: Normalization = "zscore"
    mean: float | None = None
    std: float | None = None


@dataclass(frozen=True)
class Preprocessing:
    """How a scan becomes the network's input; all numbers resolved.

    Args:
        orientation: Axes the array is brought to, e.g. ``"RAS"``.
        spacing_mm: Voxel size after resampling, in that orientation; None: the scan's own.
        intensity: One entry a channel.
        select_volume: Which volume of a 4D file is the image; None: the last axis are channels.
        assume_spacing_mm: Spacing for files that state none.
        allow_missing_slices: Whether slices that a DICOM series lacks are interpolated.
    """

    orientation: str = "RAS"
    spacing_mm: tuple[float, ...] | None = None
    intensity: tuple[Intensity, ...] = (Intensity(),)
    select_volume: int | None = None
    assume_spacing_mm: tuple[float, ...] | None = None
    allow_missing_slices: bool = False

    def geometry(self, source: Geometry) -> Geometry:
        """The network's grid for a scan: straightened, oriented, resampled; the same field of view."""
        straight = source if source.is_orthogonal else source.straightened()
        oriented = straight.oriented(self.orientation)
        return oriented.resampled(self.spacing_mm) if self.spacing_mm else oriented

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        def pair(value: Any) -> Any:
            return tuple(value) if value is not None else None

        intensity = tuple(Intensity(**{**entry, "clip": pair(entry["clip"])}) for entry in data["intensity"])
        return cls(
            orientation=data["orientation"],
            spacing_mm=pair(data["spacing_mm"]),
            intensity=intensity,
            select_volume=data["select_volume"],
            assume_spacing_mm=pair(data["assume_spacing_mm"]),
            allow_missing_slices=data["allow_missing_slices"],
        )


@dataclass(frozen=True)
class Window:
    """How the network slides over a volume.

    Args:
        patch_size: Voxels the network sees at once. Two entries: a 2D network on slices.
        overlap: Share of a patch that the next one covers again, along each axis.
        weighting: Weight of a voxel within its patch.
        slice_axis: For 2D networks on volumes, the axis (after orientation) the slices are cut along.
        context_slices: For 2D networks on volumes, neighbours on either side given as channels.
        mirror_axes: Axes mirrored at prediction, all combinations averaged; empty: none.
        crop: Of a CT or MR: ``air`` passes over windows with nothing but air in them, which changes no label in the
            patient; ``body`` puts the windows on the box around the patient, which are fewer, but stand elsewhere;
            ``none``: everywhere.
    """

    patch_size: tuple[int, ...]
    overlap: float = 0.5
    weighting: Weighting = "gaussian"
    slice_axis: int = 2
    context_slices: int = 0
    mirror_axes: tuple[int, ...] = ()
    crop: Crop = "air"


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a trained model but its weights.

    Args:
        network: Name in NETS.
        network_args: Its arguments, without spatial_dims, in_channels and out_channels.
        spatial_dims: 2 or 3.
        channels: What each input channel is, e.g. ``("CT",)``.
        labels: The label map, regions and pairs.
        preprocessing: How a scan becomes the network's input.
        window: How the network slides over it.
        postprocess: Steps on the label map, as in the workflow.
        provenance: Run, data hash, fold, versions, git commit: for people, not read by prediction.
    """

    network: str
    network_args: Mapping[str, Any]
    spatial_dims: int
    channels: tuple[str, ...]
    labels: Labels
    preprocessing: Preprocessing
    window: Window
    postprocess: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "network": {"name": self.network, "args": dict(self.network_args), "spatial_dims": self.spatial_dims},
            "channels": list(self.channels),
            **self.labels.to_dict(),
            "preprocessing": self.preprocessing.to_dict(),
            "window": asdict(self.window),
            "postprocess": dict(self.postprocess),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        window = {**data["window"]}
        for key in ("patch_size", "mirror_axes"):
            window[key] = tuple(window[key])
        return cls(
            network=data["network"]["name"],
            network_args=data["network"]["args"],
            spatial_dims=data["network"]["spatial_dims"],
            channels=tuple(data["channels"]),
            labels=Labels.from_dict(data),
            preprocessing=Preprocessing.from_dict(data["preprocessing"]),
            window=Window(**window),
            postprocess=data["postprocess"],
            provenance=data["provenance"],
        )


def save_model(folder: Path, spec: ModelSpec, weights: Mapping[str, Tensor]) -> None:
    """Write a model folder; only complete files are ever visible.

    Args:
        folder: Made if need be.
        spec: Goes to model.json, with the sha256 of the weights.
        weights: The network's state dict.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    described = {
        **spec.to_dict(),
        "weights": {"file": "model.safetensors", "sha256": hashlib.sha256(content).hexdigest()},
    }
    write_atomically(folder / "model.safetensors", content)
    write_atomically(folder / "model.json", json.dumps(described, indent=2).encode() + b"\n")


def set_postprocess(folder: Path, steps: Mapping[str, Any]) -> None:
    """Write other post-processing into a model's folder.

    Raises:
        ModelError: See `load_spec`.
    """
    described = {**_read_json(folder), "postprocess": dict(steps)}
    write_atomically(folder / "model.json", json.dumps(described, indent=2).encode() + b"\n")


def load_spec(folder: Path) -> ModelSpec:
    """Read model.json alone.

    Raises:
        ModelError: If it is missing, not JSON, of another format, or incomplete.
    """
    return ModelSpec.from_dict(_read_json(folder))


def load_model(folder: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Read a model folder.

    Returns:
        What model.json says, and the weights.

    Raises:
        ModelError: If a file is missing, cannot be read, or the weights are not those model.json names.
    """
    from safetensors.torch import load

    data = _read_json(folder)
    path = folder / "model.safetensors"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(
            "E-MODEL-WEIGHTS", f"cannot be read ({error.strerror}); copy the whole model folder", where=str(path)
        ) from None
    found, expected = hashlib.sha256(content).hexdigest(), data["weights"]["sha256"]
    if found != expected:
        raise ModelError(
            "E-MODEL-WEIGHTS",
            f"sha256 {found[:12]}… but model.json names {expected[:12]}…: truncated, or of another model; copy the folder again",
            where=str(path),
        )
    return ModelSpec.from_dict(data), load(content)


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(
            "E-MODEL",
            f"cannot be read ({error.strerror}); a model folder holds model.json and model.safetensors",
            where=str(path),
        ) from None
    except ValueError as error:
        raise ModelError("E-MODEL", f"is not JSON ({error}); copy the folder again", where=str(path)) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ModelError("E-MODEL", f"is not of format {FORMAT}, the one this version of medseg reads", where=str(path))
    missing = sorted(
        {"network", "channels", "labels", "preprocessing", "window", "weights", "postprocess", "provenance"}
        - data.keys()
    )
    if missing:
        raise ModelError(
            "E-MODEL", f"lacks {', '.join(missing)}; train again or copy the folder again", where=str(path)
        )
    return data
