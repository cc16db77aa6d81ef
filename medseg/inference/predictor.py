"""A trained model that segments scans and pictures: preprocessing, windows, restoring, post-processing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import nn

from medseg.data.checks import check_modalities, hounsfield_fault
from medseg.data.sources import Source
from medseg.data.transforms import Prepared, preprocess
from medseg.errors import DataError
from medseg.geometry import Geometry, Volume
from medseg.inference.postprocess import check_steps
from medseg.inference.restore import restored
from medseg.inference.sliding_window import slabs
from medseg.inference.tta import Mirrored
from medseg.inference.windows import Windows
from medseg.memory import is_out_of_memory
from medseg.model import ModelSpec

Precision = Literal["auto", "fp32", "bf16"]

log = logging.getLogger("medseg")

SLICES_AT_ONCE = 8
"""Windows in a batch for networks on slices; a single slice keeps no processor busy."""


@dataclass(frozen=True)
class Segmentation:
    """What a model found in a scan.

    Args:
        label: (1, I, J[, K]), uint8 or int16, on the scan's own grid.
        probabilities: (R, I, J[, K]), float32, on the same grid, if they were asked for. They are the
            network's: post-processing changes the label map alone.
        num_windows: What the network was asked for.
        num_in_air: Windows that it was spared, see `medseg.model.Window`.
    """

    label: Volume
    probabilities: Volume | None = None
    num_windows: int = 0
    num_in_air: int = 0


@dataclass(frozen=True)
class Way:
    """How a scan is predicted.

    Args:
        batch_size: Windows given to the network at once.
        device: Where the network is.
        sums_on: Where the scan is, and the logits are put together.
    """

    batch_size: int
    device: torch.device
    sums_on: torch.device

    def __str__(self) -> str:
        sums = "" if self.sums_on == self.device else f", put together on {self.sums_on}"
        return f"{self.batch_size} window{'s' * (self.batch_size > 1)} at once on {self.device}{sums}"


def ways(device: torch.device, batch_size: int) -> tuple[Way, ...]:
    """How to predict, from the fastest way to the one that needs least memory, or least of the GPU's."""
    cpu = torch.device("cpu")
    found = [Way(batch_size, device, device), Way(1, device, device), Way(1, device, cpu), Way(1, cpu, cpu)]
    return tuple(dict.fromkeys(found))


class Predictor:
    """A trained model, ready to segment.

    Args:
        spec: What the model is.
        network: With its weights; put into eval mode and on the device.
        device: ``cpu``, ``cuda``, ``cuda:1`` …
        precision: ``auto`` is bf16 where the hardware has it, else fp32.
        batch_size: Windows predicted at once; None: 1, or `SLICES_AT_ONCE` for networks on slices.

    Raises:
        WorkflowError: If the model names unknown post-processing, or cannot be mirrored as it says.
    """

    def __init__(
        self,
        spec: ModelSpec,
        network: nn.Module,
        *,
        device: str | torch.device = "cpu",
        precision: Precision = "auto",
        batch_size: int | None = None,
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        if spec.window.mirror_axes:
            network = Mirrored(network, spec.window.mirror_axes, spec.labels)
        self.network = network.to(self.device).eval()
        if precision == "auto":
            precision = "bf16" if has_bf16(self.device.type) else "fp32"
        self.autocast = torch.bfloat16 if precision == "bf16" else None
        self.batch_size = batch_size or (SLICES_AT_ONCE if spec.spatial_dims == 2 else 1)
        self._ways = ways(self.device, self.batch_size)
        self._steps = check_steps(spec.postprocess, spec.labels)

    def segment(self, images: Sequence[Source], *, with_probabilities: bool = False) -> Segmentation:
        """Segment a scan.

        Args:
            images: One file (or volume in memory) with all channels, or one a channel.
            with_probabilities: Whether to return them too.

        Raises:
            DataError: If the scan cannot be used.
        """
        return self.segment_prepared(self.prepare(images), with_probabilities=with_probabilities)

    def prepare(self, images: Sequence[Source], *, any_modality: bool = False) -> Prepared:
        """Read and preprocess a scan: the part that needs no network, and may run ahead in a thread.

        Args:
            images: One file (or volume in memory) with all channels, or one a channel.
            any_modality: Only warn of a scan whose modality is not the model's.

        Raises:
            DataError: If the scan cannot be used, or is not like those that the model was trained on.
        """
        try:
            body_in = self.spec.channels if self.spec.window.crop != "none" else ()
            prepared = preprocess(images, None, self.spec.preprocessing, body_in=body_in)
        except DataError as error:
            if error.error_id == "E-CHANNELS":
                error.message += (
                    f"; this model takes {', '.join(self.spec.channels)}: "
                    'give a manifest whose cases name them, {"test": [{"image": [FILE, …]}]}'
                )
            raise
        self._check_modality(prepared, any_modality=any_modality)
        for channel, (low, high) in zip(self.spec.channels, prepared.ranges, strict=False):
            if fault := hounsfield_fault(channel, low, high):
                log.warning("W-HU %s: %s", prepared.name, fault)
        takes_pictures = self.spec.spatial_dims == 2 and not self.spec.window.context_slices
        if prepared.source.spatial_dims != 3 and not takes_pictures:
            raise DataError(
                "E-SPATIAL-DIMS",
                f"{prepared.source.spatial_dims}D image of shape {prepared.source.shape}; the model takes volumes: "
                "stack the slices into one file",
                where=prepared.name,
            )
        return prepared

    def segment_prepared(self, prepared: Prepared, *, with_probabilities: bool = False) -> Segmentation:
        """Segment what `prepare` returned; of a scan that shows nothing, nothing is segmented."""
        shows_something = any(np.ptp(channel) for channel in prepared.image)
        if shows_something:
            found = self._segmented(prepared, with_probabilities=with_probabilities)
        else:
            log.warning("W-EMPTY %s: shows nothing after clipping; so does the segmentation", prepared.name)
            found = self._nothing(prepared.source, with_probabilities=with_probabilities)
        array = found.label.array[0]
        for step, values in self._steps:
            array = step(array, values)
        if shows_something and not array.any():
            log.warning("W-EMPTY-PREDICTION %s: nothing was found in it", prepared.name)
        if not prepared.source.is_orthogonal:
            log.warning(
                "W-SHEARED %s: its slices are tilted, and its segmentation stands on the same sheared grid, which ITK's "
                "tools refuse to open; segment what medseg data convert makes of it to have both straight",
                prepared.name,
            )
        return replace(found, label=Volume(array[None], found.label.geometry))

    def _segmented(self, prepared: Prepared, *, with_probabilities: bool) -> Segmentation:
        """What the network says, in the first of the ways that memory suffices for."""
        for way, easier in pairwise(self._ways):
            try:
                return self._predicted(prepared, way, with_probabilities=with_probabilities)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            log.warning("W-MEMORY %s: out of memory with %s; going on with %s", prepared.name, way, easier)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return self._predicted(prepared, self._ways[-1], with_probabilities=with_probabilities)

    def _predicted(self, prepared: Prepared, way: Way, *, with_probabilities: bool) -> Segmentation:
        image = torch.from_numpy(prepared.image).to(way.sums_on)
        windows = Windows.over(image.shape[1:], self.spec.window, body=prepared.body)
        predicted = slabs(
            image,
            self.network.to(way.device),
            windows,
            background=self.spec.labels.background,
            batch_size=way.batch_size,
            autocast=self.autocast,
            device=way.device,
        )
        label, probabilities = restored(
            predicted,
            self.spec.labels,
            axis=windows.outer,
            grid=prepared.geometry,
            source=prepared.source,
            orientation=self.spec.preprocessing.orientation,
            box=windows.box,
            with_probabilities=with_probabilities,
        )
        return Segmentation(label, probabilities, windows.num_computed, windows.num_in_air)

    def _check_modality(self, prepared: Prepared, *, any_modality: bool) -> None:
        try:
            check_modalities(prepared.modalities, self.spec.channels, prepared.name)
        except DataError as error:
            if not any_modality:
                raise DataError(
                    error.error_id,
                    f"{error.message}; add --force to segment it anyway",
                    where=error.where,
                ) from None
            log.warning("W-MODALITY %s: %s", prepared.name, error.message)

    def _nothing(self, source: Geometry, *, with_probabilities: bool) -> Segmentation:
        """Background, with certainty."""
        labels = self.spec.labels
        label = Volume(np.zeros((1, *source.shape), labels.dtype), source)
        if not with_probabilities:
            return Segmentation(label)
        probabilities = np.zeros((labels.num_outputs, *source.shape), np.float32)
        if not labels.regions:
            probabilities[0] = 1
        return Segmentation(label, Volume(probabilities, source))


def has_bf16(device_type: str) -> bool:
    """Whether the hardware computes in bf16; emulated, it is slower than fp32."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
