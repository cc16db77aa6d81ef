"""From a workflow to everything that trains: trainer, loss, validator, tracker."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from medseg.build.balance import with_class_weights
from medseg.build.data import TrainingData
from medseg.build.loss import check_loss, loss
from medseg.build.memory import check_step_fits
from medseg.build.model import Hardware, find_model, network, specification
from medseg.build.scoring import check_metrics
from medseg.data.augment import Augmentation, augmentation
from medseg.data.dataset import CachedCase, PatchDataset, StepSampler, patch_loader
from medseg.data.manifest import Manifest, expand_variables
from medseg.errors import WorkflowError
from medseg.geometry import Volume
from medseg.inference.postprocess import check_steps
from medseg.inference.predictor import SLICES_AT_ONCE, has_bf16
from medseg.inference.sliding_window import label_map, slabs
from medseg.inference.tta import LEFT_RIGHT_AXIS, mirrored_channels
from medseg.inference.windows import Windows
from medseg.labels import Labels
from medseg.model import ModelSpec, load_model
from medseg.nets import NETS
from medseg.nets.slices import OnSlices
from medseg.nets.weights import encoder_of, load_encoder_weights
from medseg.reporting.overlay import contour_picture
from medseg.tracking.mlflow_tracker import MlflowTracker
from medseg.tracking.tensorboard import EventFiles, MlflowAndTensorBoard
from medseg.tracking.uri import without_password
from medseg.training import optim
from medseg.training.loading import lasting_batches
from medseg.training.signals import leave_to_parent
from medseg.training.state import Batch, Observer, Settings, Target, Tracker
from medseg.training.trainer import Trainer
from medseg.training.validator import Validator
from medseg.workflow import Workflow


def check_parts(workflow: Workflow, source: Manifest, hardware: Hardware | None = None) -> None:
    """Build network, loss and augmentation once without memory, so that a slip is told before any case is read.

    Args:
        workflow: The workflow.
        source: Its manifest.
        hardware: What it is to train on; None: the best there is.

    Raises:
        WorkflowError: For the first part that cannot be built, with its line, and for a step that does not fit.
    """
    spec = specification(workflow, source)
    with torch.device("meta"):
        net = _network(workflow, spec)
    _published_weights(workflow, net)
    check_step_fits(workflow, net, len(source.channels), hardware or Hardware())
    any_weights = (1.0,) * source.labels.num_outputs
    check_loss(with_class_weights(workflow, any_weights), source.labels)
    _augmentation(workflow, source.labels, spec)
    with workflow.blamed("validate", "metrics"):
        check_metrics(workflow.validate_.metrics)
    with workflow.blamed("infer", "postprocess"):
        check_steps(workflow.infer.steps, source.labels, num_channels=len(source.channels))
    with workflow.blamed("infer", "mirror_axes"):
        mirrored_channels(source.labels) if LEFT_RIGHT_AXIS in workflow.infer.mirror_axes else ()
    for name, values in workflow.validate_.unions.items():
        unknown = sorted(set(values) - set(source.labels.names))
        if unknown:
            raise WorkflowError(
                "E-UNION",
                f"labels {unknown} are not declared; the manifest has {dict(source.labels.names)}",
                where=workflow.where("validate", "unions", name),
            )
        if name in source.labels.organ_values:
            raise WorkflowError(
                "E-UNION",
                f"{name!r} is an organ already; give the union a name of its own",
                where=workflow.where("validate", "unions", name),
            )


def trainer(
    workflow: Workflow,
    data: TrainingData,
    *,
    observer: Observer,
    hardware: Hardware,
) -> Trainer:
    """Everything that trains, ready to `fit`; nothing is written yet. Class weights must be numbers, see `balance`."""
    options = workflow.train
    spec = specification(workflow, data.manifest, data.preprocessing)
    net = _network(workflow, spec)
    _published_weights(workflow, net)
    with workflow.blamed("init"):
        _start_from(workflow, net)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces its precision on the console
    fabric = Fabric(accelerator=hardware.accelerator, devices=1, precision=_precision(workflow, hardware))
    parameters = options.optimizer
    optimizer = optim.make_optimizer(
        parameters.name,
        net.parameters(),
        lr=parameters.lr,
        weight_decay=parameters.weight_decay,
        momentum=parameters.momentum,
        betas=parameters.betas,
    )
    return Trainer(
        fabric,
        net,
        loss=loss(workflow, _unwrapped(net).extra_weights),
        optimizer=optimizer,
        rate=_rate(workflow),
        batches=_batches(workflow, data, spec, fabric),
        target=_target(workflow, data),
        validate=validator(workflow, data, spec, hardware),
        settings=Settings(
            iterations=options.iterations,
            validate_every=options.validate_every,
            lr=parameters.lr,
            clip_grad_norm=options.clip_grad_norm,
            accumulate=options.accumulate,
            early_stop=options.early_stop,
            ema=options.ema,
            seed=options.seed,
            scored=data.labels.organs,
        ),
        observer=observer,
    )


def _network(workflow: Workflow, spec: ModelSpec) -> nn.Module:
    """The network with its first weights, which the seed decides."""
    options = workflow.train
    torch.manual_seed(options.seed)
    with workflow.blamed("network", "name"):
        entry = NETS[spec.network]
    with workflow.blamed("train", "deep_supervision"):
        if options.deep_supervision and "deep_supervision" not in inspect.signature(entry.network).parameters:
            raise WorkflowError("E-ARGUMENT", f"network {spec.network!r} has no deep supervision; set it to false")
    with workflow.blamed("network", "args"):
        net = network(spec, deep_supervision=options.deep_supervision)
        if any(axis.margin for axis in _unwrapped(net).sizes):
            raise WorkflowError(
                "E-ARGUMENT",
                "unpadded convolutions give less than the patch, which labels do not fit; use padding: same",
            )
    with workflow.blamed("train", "patch_size"):
        _unwrapped(net).check_size(options.patch_size)
    return net


def validator(workflow: Workflow, data: TrainingData, spec: ModelSpec, hardware: Hardware) -> Validator:
    """Scores a network on the held-out cases, on the preprocessed grid."""
    chosen = workflow.validate_
    window = replace(spec.window, overlap=chosen.overlap, mirror_axes=())

    autocast = torch.bfloat16 if _precision(workflow, hardware) == "bf16-mixed" else None
    batch_size = SLICES_AT_ONCE if spec.spatial_dims == 2 else 1

    def segment(net: nn.Module, image: Tensor) -> Tensor:
        windows, background = Windows.over(image.shape[1:], window), data.labels.background
        predicted = slabs(image, net, windows, background=background, batch_size=batch_size, autocast=autocast)
        return label_map(predicted, data.labels, windows)

    def draw(case: CachedCase, predicted: npt.NDArray[Any], title: str) -> npt.NDArray[np.uint8]:
        # Of a colored picture its brightness: one of its colors may show nothing.
        is_picture = case.geometry.spatial_dims == 2
        shown = case.image.mean(axis=0, dtype=np.float32) if is_picture else case.image[0]
        image = np.asarray(shown, dtype=np.float32)
        seen = [Volume(a[None], case.geometry).oriented("RAS") for a in (image, case.label[0], predicted)]
        image, reference, prediction = (volume.array[0] for volume in seen)
        spacing_mm = seen[0].geometry.spacing_mm
        return contour_picture(image, reference, prediction, labels=data.labels, spacing_mm=spacing_mm, title=title)

    cases = data.validation
    if len(cases) > chosen.max_cases:  # evenly spread, the same ones each time
        cases = [cases[n] for n in np.linspace(0, len(cases) - 1, chosen.max_cases).round().astype(int)]
    return Validator(
        cases, data.labels, segment=segment, draw=draw, unions=chosen.unions, device=torch.device(hardware.accelerator)
    )


def tracker(
    workflow: Workflow, folder: Path, *, run_name: str, tags: Mapping[str, str], parent_run_id: str | None = None
) -> MlflowTracker:
    """The MLflow run of a run folder: a new one, or the folder's own reopened."""
    return MlflowTracker.start(
        folder,
        uri=workflow.track.uri,
        experiment=workflow.track.experiment or workflow.name,
        run_name=run_name,
        params=_flat(recorded(workflow).model_dump(mode="json", by_alias=True)),
        tags=tags,
        parent_run_id=parent_run_id,
    )


def listener(workflow: Workflow, folder: Path, mlflow: MlflowTracker) -> Tracker:
    """Who a training tells its numbers: MLflow, and TensorBoard's event files where the workflow asks for them."""
    if not workflow.track.tensorboard:
        return mlflow
    return MlflowAndTensorBoard(mlflow, EventFiles(folder / "tensorboard"))


def recorded(workflow: Workflow) -> Workflow:
    """The workflow as it may be written down: without the password of a tracking server."""
    if not workflow.track.uri:
        return workflow
    track = workflow.track.model_copy(update={"uri": without_password(workflow.track.uri)})
    return workflow.model_copy(update={"track": track})


def _published_weights(workflow: Workflow, net: nn.Module) -> None:
    """Start the encoder from published weights; of a network on the meta device, only see that they fit."""
    if (file := workflow.network.encoder_weights) is None:
        return
    with workflow.blamed("network", "encoder_weights"):
        load_encoder_weights(encoder_of(_unwrapped(net)), workflow.file.parent / expand_variables(file))


def _start_from(workflow: Workflow, net: nn.Module) -> None:
    if workflow.init is None:
        return
    path = workflow.file.parent / expand_variables(workflow.init.model)
    _, weights = load_model(find_model(str(path) if path.exists() else workflow.init.model, workflow.track.uri))
    own = net.state_dict()
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if not name.startswith(workflow.init.skip) and (name in own or not _is_for_training(name))
    }
    wrong = [
        f"{name} {tuple(tensor.shape)} → {tuple(own[name].shape) if name in own else 'absent here'}"
        for name, tensor in kept.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    fresh = [name for name in own if name not in weights and not _is_for_training(name)]
    missing = [name for name in fresh if not name.startswith(workflow.init.skip)]
    if wrong or missing:
        listed = "; ".join([*wrong, *[f"{name} missing in the model" for name in missing]][:8])
        raise WorkflowError(
            "E-INIT", f"{len(wrong) + len(missing)} weights do not fit: {listed}; list their beginnings in init.skip"
        )
    net.load_state_dict({**own, **kept})


def _is_for_training(name: str) -> bool:
    """Whether a weight is that of a head which only deep supervision has; see `medseg.nets.network`."""
    return "extra_heads" in name.split(".")


def _batches(workflow: Workflow, data: TrainingData, spec: ModelSpec, fabric: Fabric) -> Callable[[int], Iterable[Any]]:
    options = workflow.train
    grid = data.training[0].geometry
    dataset = PatchDataset(
        data.training,
        _augmentation(workflow, data.labels, spec, spacing_mm=grid.spacing_mm),
        foreground_ratio=options.foreground_ratio,
        seed=options.seed,
        slice_axis=workflow.data.slice_axis if workflow.data.context_slices else None,
    )
    workers = _num_workers(workflow)
    last = options.iterations * options.accumulate

    def loader(first: int) -> Iterable[Any]:
        sampler = StepSampler(first, last, batch_size=options.batch_size)
        pin_memory = fabric.device.type == "cuda"
        return patch_loader(dataset, sampler, workers=workers, pin_memory=pin_memory, worker_init=leave_to_parent)

    def batches(first: int) -> Iterable[Any]:
        loaded = lasting_batches(loader, first, where=workflow.where("train", "workers"))
        return loaded if grid.spatial_dims == 3 else map(_as_slices, loaded)

    def _as_slices(batch: Batch) -> Batch:
        """Pictures (B, C, I, J) as what a network on slices takes, e.g. (B, C, I, J, 1)."""
        axis = 2 + workflow.data.slice_axis
        return {**batch, "image": batch["image"].unsqueeze(axis), "label": batch["label"].unsqueeze(axis)}

    return batches


def _target(workflow: Workflow, data: TrainingData) -> Target:
    context, axis = workflow.data.context_slices, workflow.data.slice_axis + 2
    if len(workflow.train.patch_size) == 3 or not context:
        return data.labels.target
    return lambda label: data.labels.target(label.narrow(axis, context, 1))  # the slice between its neighbors


def _augmentation(
    workflow: Workflow, labels: Labels, spec: ModelSpec, *, spacing_mm: Sequence[float] | None = None
) -> Augmentation:
    recipe: Any = workflow.augment
    if not isinstance(recipe, str):
        recipe = [{"name": part.name, "args": part.args} for part in recipe]
    patch = list(spec.window.patch_size)
    is_picture = spacing_mm is not None and len(spacing_mm) == 2
    if spec.spatial_dims == 2 and not is_picture:
        patch.insert(spec.window.slice_axis, 1 + 2 * spec.window.context_slices)
    with workflow.blamed("augment"):
        return augmentation(
            recipe,
            patch_size=tuple(patch),
            labels=labels,
            spacing_mm=spacing_mm,
            num_channels=len(spec.channels),
        )


def _num_workers(workflow: Workflow) -> int:
    if workflow.train.workers != "auto":
        return workflow.train.workers
    return min(8, max(1, len(os.sched_getaffinity(0)) - 1))


def _precision(workflow: Workflow, hardware: Hardware) -> Any:
    chosen = workflow.train.precision
    if chosen == "auto":
        chosen = "bf16" if has_bf16(hardware.accelerator) else "fp32"
    return {"bf16": "bf16-mixed", "fp32": "32-true"}[chosen]


def _rate(workflow: Workflow) -> optim.Rate:
    chosen = workflow.train.schedule
    rate = {
        "poly": lambda: optim.poly(workflow.train.iterations, power=chosen.power),
        "cosine": lambda: optim.cosine(workflow.train.iterations),
        "plateau": lambda: optim.plateau(patience=chosen.patience, factor=chosen.factor),
        "constant": optim.constant,
    }[chosen.name]()
    return optim.with_warmup(rate, chosen.warmup)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _unwrapped(net: nn.Module) -> Any:
    return net.network if isinstance(net, OnSlices) else net
