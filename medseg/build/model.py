"""From names and numbers to a network, and from a model folder to a predictor."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg.data.manifest import Manifest
from medseg.errors import ModelError, WorkflowError
from medseg.inference.ensemble import Member
from medseg.inference.predictor import Precision, Predictor
from medseg.memory import keep_freed_memory
from medseg.model import Crop, ModelSpec, Preprocessing, Window, load_model
from medseg.nets import NETS
from medseg.nets.slices import OnSlices
from medseg.registry import check_arguments
from medseg.tracking.models import model_folder
from medseg.training.run_folder import FOLDS
from medseg.workflow import Workflow

log = logging.getLogger("medseg")

NETWORK_PARAMETERS = ("spatial_dims", "in_channels", "out_channels", "deep_supervision")
"""What medseg passes to every network itself."""


@dataclass(frozen=True)
class Hardware:
    """What to compute on.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    device: str = "auto"

    @property
    def accelerator(self) -> str:
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise WorkflowError(
                "E-DEVICE", "no CUDA device is visible to torch; use --device cpu, or install torch with CUDA"
            )
        return self.device


def specification(
    workflow: Workflow,
    source: Manifest,
    preprocessing: Preprocessing | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """Everything about the model but its weights; without `preprocessing`, enough to build its network."""
    return ModelSpec(
        network=workflow.network.name,
        network_args=workflow.network.args,
        spatial_dims=len(workflow.train.patch_size),
        channels=source.channels,
        labels=source.labels,
        preprocessing=preprocessing or Preprocessing(),
        window=Window(
            patch_size=workflow.train.patch_size,
            overlap=workflow.infer.overlap,
            weighting=workflow.infer.weighting,
            slice_axis=workflow.data.slice_axis,
            context_slices=workflow.data.context_slices,
            mirror_axes=workflow.infer.mirror_axes,
            crop=workflow.infer.crop,
        ),
        postprocess=workflow.infer.steps,
        provenance=provenance or {},
    )


def network(spec: ModelSpec, *, deep_supervision: bool = False) -> nn.Module:
    """The network of a model, untrained; a 2D network comes wrapped for volumes."""
    entry = NETS[spec.network]
    check_arguments(f"network {spec.network!r}", entry.network, spec.network_args, NETWORK_PARAMETERS)
    if spec.spatial_dims == 2 and spec.network_args.get("in_plane"):
        message = (
            f"network {spec.network!r}: in_plane is for thick slices of volumes; a 2D network has no axis across them"
        )
        raise WorkflowError("E-ARGUMENT", message)
    window = spec.window
    extra = {"deep_supervision": True} if deep_supervision else {}
    channels = len(spec.channels) * (1 if spec.spatial_dims == 3 else 1 + 2 * window.context_slices)
    try:
        made = entry.network(
            spatial_dims=spec.spatial_dims,
            in_channels=channels,
            out_channels=spec.labels.num_outputs,
            **spec.network_args,
            **extra,
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise WorkflowError("E-ARGUMENT", f"network {spec.network!r}: {error}") from None
    return made if spec.spatial_dims == 3 else OnSlices(made, window.slice_axis, window.context_slices)


def predictor(
    model: str | Sequence[str],
    *,
    device: str = "auto",
    overlap: float | None = None,
    crop: Crop | None = None,
    tta: bool | None = None,
    pruned_at: int | None = None,
    tracking_uri: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    precision: Precision = "auto",
) -> Predictor:
    """A trained model, or several whose predictions are averaged, ready to segment.

    The process keeps what memory it frees from now on, see `medseg.memory.keep_freed_memory`.

    Args:
        model: A model folder, a run folder, an MLflow run id, or ``models:/name@alias``; of a cross-validation's run
            folder all folds. Or several of them.
        device: ``auto``, ``cpu`` or ``cuda``.
        overlap: Instead of the model's own, as is `crop`.
        crop: See `medseg.model.Window`.
        tta: Mirror along the axes that the model names, or all if it names none; or not at all. None: as it says.
        pruned_at: The level at which a UNet++ stops.
        tracking_uri: Where to look for run ids.
        weights: Instead of the stored ones of the one model.
        precision: ``auto``, ``fp32`` or ``bf16``.

    Raises:
        ModelError: If a model cannot be found or read, was not trained to be pruned, or finds other organs than the
            others.
    """
    keep_freed_memory()
    named = [model] if isinstance(model, str) else model
    folders = list(dict.fromkeys(folder for name in named for folder in find_models(name, tracking_uri)))
    members = [
        _member(folder, overlap=overlap, crop=crop, tta=tta, pruned_at=pruned_at, weights=weights) for folder in folders
    ]
    first, *others = members
    chosen = Hardware(device).accelerator
    return Predictor(first.spec, first.network, name=first.name, others=others, device=chosen, precision=precision)


def _member(
    folder: Path,
    *,
    overlap: float | None,
    crop: Crop | None,
    tta: bool | None,
    pruned_at: int | None,
    weights: Mapping[str, Tensor] | None,
) -> Member:
    model = str(folder)
    spec, stored = load_model(folder)
    if pruned_at is not None:
        spec = _pruned(spec, stored, pruned_at, model)
    window = spec.window
    if overlap is not None:
        window = replace(window, overlap=overlap)
    if crop is not None:
        window = replace(window, crop=crop)
    if tta and not window.mirror_axes:
        axes = tuple(a for a in range(3) if spec.spatial_dims == 3 or a != window.slice_axis)
        window = replace(window, mirror_axes=axes)
    if tta is False:
        window = replace(window, mirror_axes=())
    net = network(spec)
    _load(net, weights or stored, model)
    return Member(replace(spec, window=window), net, model)


def _pruned(spec: ModelSpec, weights: Mapping[str, Tensor], level: int, model: str) -> ModelSpec:
    prunable = "pruned_at" in inspect.signature(NETS[spec.network].network).parameters
    if not (prunable and any("extra_heads." in name for name in weights)):
        raise ModelError(
            "E-PRUNE",
            f"this {spec.network} was not trained to be stopped early; a unet_plus_plus with "
            "train.deep_supervision: true is",
            where=model,
        )
    return replace(spec, network_args={**spec.network_args, "pruned_at": level})


def _load(net: nn.Module, weights: Mapping[str, Tensor], model: str) -> None:
    try:
        net.load_state_dict(dict(weights))
    except RuntimeError as error:
        differing = "; ".join(line.strip() for line in str(error).splitlines()[1:5])
        raise ModelError(
            "E-MODEL-WEIGHTS", f"the weights are not those of the network in model.json: {differing}", where=model
        ) from None


def find_model(model: str, tracking_uri: str | None = None) -> Path:
    """The folder with model.json that a MODEL argument means, where it can be but one."""
    folders = find_models(model, tracking_uri)
    if len(folders) > 1:
        message = f"holds a model for each of {len(folders)} folds; name one of them, e.g. {folders[0].parent}"
        raise ModelError("E-MODEL", message, where=model)
    return folders[0]


def find_models(model: str, tracking_uri: str | None = None) -> list[Path]:
    """The folders with model.json that a MODEL argument means: one, or of a cross-validation one a fold.

    Raises:
        ModelError: If there is none.
    """
    path = Path(model)
    for folder in (path, path / "model"):
        if (folder / "model.json").exists():
            return [folder]
    folds = sorted(file.parent for file in path.glob("fold_*/model/model.json"))
    if folds:
        _tell_missing_folds(path, len(folds))
        return folds
    if path.is_dir():
        raise ModelError(
            "E-MODEL", "holds no model.json; name a model folder, or a run folder whose training has ended", where=model
        )
    return [model_folder(model, tracking_uri)]


def _tell_missing_folds(run: Path, num_found: int) -> None:
    try:
        num_folds = len(json.loads((run / FOLDS).read_text()))
    except (OSError, ValueError):  # models that somebody has put together
        return
    if num_found < num_folds:
        log.warning("W-FOLDS %s: %d of its %d folds have a model; they are averaged", run, num_found, num_folds)
