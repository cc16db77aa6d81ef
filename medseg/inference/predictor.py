"""A trained model that segments scans and pictures: preprocessing, windows, restoring, post-processing."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import RLock
from typing import Literal

import numpy as np
import torch
from torch import nn

from medseg.data.checks import check_modalities, hounsfield_fault
from medseg.data.sources import Source
from medseg.data.transforms import Prepared, preprocess
from medseg.errors import DataError
from medseg.geometry import Geometry, Volume
from medseg.inference.ensemble import Averaged, Member, Strip, Strips, averaged, grouped, voted
from medseg.inference.plan import Plan, WindowCost, logits_bytes, plan_of, window_cost
from medseg.inference.postprocess import check_steps, crf_of, postprocess
from medseg.inference.refine import refined
from medseg.inference.resampling import has_bands, mirrored, resampled
from medseg.inference.restore import PICTURE_AXIS, Place, restored, room_for_probabilities, solid
from medseg.inference.sliding_window import Clock, slabs
from medseg.inference.tta import Mirrored
from medseg.inference.uncertainty import Uncertainty, Votes
from medseg.inference.warmup import MIN_WINDOWS, lay_out
from medseg.inference.windows import Windows
from medseg.memory import free_bytes, is_out_of_memory
from medseg.model import ModelSpec, Preprocessing

Precision = Literal["auto", "fp32", "bf16"]

log = logging.getLogger("medseg")

SLICES_AT_ONCE = 8
"""Windows in a batch for networks on slices; a single slice keeps no processor busy."""


TOWARDS_THE_HEAD = 2
"""The axis that points the same way in every orientation that preprocessing offers."""


@dataclass(frozen=True)
class Segmentation:
    """What a model found in a scan.

    Args:
        label: (1, I, J[, K]), uint8 or int16, on the scan's own grid.
        probabilities: (R, I, J[, K]), float32, on the same grid, if they were asked for. They are the
            network's, or those of the CRF after it; all other post-processing changes the label map alone.
        num_windows: What the network was asked for.
        num_in_air: Windows that it was spared, see `medseg.model.Window`.
        network_seconds: How long networks computed.
        waited_seconds: How long they waited for another scan's to be done.
        uncertainty: Of the case, 0 to 1, if asked for: the higher, the sooner a person should look at it. See
            `medseg.inference.uncertainty`; a scan that shows nothing has 1.
        uncertainties: Of each organ.
        agreement: Of the models of an ensemble, else of mirrored copies: share of the voxels that one of them gives to
            an organ on which all say the same. Within models that share windows, of the windows' voxels. None where
            there is one model and no mirroring, where nothing was found, or if no uncertainty was asked for.
        entropy: (1, I, J[, K]), uint8, on the same grid, if asked for: of each voxel's probabilities, from 0 (certain)
            to 100 (no idea).
        crf: Of each network's CRF, where post-processing names one: its voxels, whether it was exact, its seconds.
    """

    label: Volume
    probabilities: Volume | None = None
    num_windows: int = 0
    num_in_air: int = 0
    network_seconds: float = 0.0
    waited_seconds: float = 0.0
    uncertainty: float | None = None
    uncertainties: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    entropy: Volume | None = None
    crf: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What a segmentation is to have beside its label map; see `Predictor.segment`."""

    probabilities: bool = False
    probabilities_to: Path | None = None
    uncertainty: bool = False
    entropy: bool = False


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


def ways(device: torch.device, batch_size: int, *, logits_fit: bool = True) -> tuple[Way, ...]:
    """How to predict, from the fastest way to the one that needs least memory, or least of the GPU's.

    Args:
        device: Where the network is at best.
        batch_size: Windows at once at best.
        logits_fit: Whether the device has room for what is held of the logits.
    """
    cpu = torch.device("cpu")
    together = [Way(batch_size, device, device), Way(1, device, device)]
    apart = [Way(1, device, cpu)] if logits_fit else [Way(batch_size, device, cpu), Way(1, device, cpu)]
    return tuple(dict.fromkeys([*(together if logits_fit else []), *apart, Way(1, cpu, cpu)]))


@dataclass(frozen=True, eq=False)
class _Part:
    """A network that sees windows of its own.

    Args:
        spec: Says which.
        network: Of one model, or of several that see the same.
        count: How many.
        preparation: Number of the way that scans are prepared for it.
    """

    spec: ModelSpec
    network: nn.Module
    count: int
    preparation: int

    def batch_shape(self, batch_size: int) -> tuple[int, ...]:
        """Of a batch of its windows, (B, C, I, J, K)."""
        window = self.spec.window
        patch = list(window.patch_size)
        if len(patch) == 2:
            patch.insert(window.slice_axis, 1 + 2 * window.context_slices)
        return batch_size, len(self.spec.channels), *patch


class Predictor:
    """A trained model, or several whose predictions are averaged, ready to segment.

    Several threads may segment scans at once: their networks predict in turn, and while one does the others bring back
    what theirs have said.

    Args:
        spec: What the model is.
        network: With its weights; put into eval mode and on the device.
        name: What messages call it beside others.
        others: Models to be averaged with it. Those with its preprocessing and window cost their networks' time and
            no more; the others' probabilities are averaged on the scan's grid. Post-processing is what most of them say.
        device: ``cpu``, ``cuda``, ``cuda:1`` …
        precision: ``auto`` is bf16 where the hardware has it, else fp32.
        batch_size: Windows predicted at once; None: 1, or `SLICES_AT_ONCE` for networks on slices.

    Raises:
        WorkflowError: If the model names unknown post-processing, or cannot be mirrored as it says.
        ModelError: If the models do not find the same organs in the same channels.
    """

    def __init__(
        self,
        spec: ModelSpec,
        network: nn.Module,
        *,
        name: str = "the first model",
        others: Sequence[Member] = (),
        device: str | torch.device = "cpu",
        precision: Precision = "auto",
        batch_size: int | None = None,
    ) -> None:
        members = [Member(spec, network, name), *others]
        self.device = torch.device(device)
        groups = grouped(members)
        num_channels = len(spec.channels)
        for member in members:
            check_steps(member.spec.postprocess, spec.labels, num_channels=num_channels)
        self.spec = replace(spec, postprocess=voted([member.spec.postprocess for member in members]))
        self._preparations: list[Preprocessing] = []
        for of_group, *_ in groups:
            if of_group.preprocessing not in self._preparations:
                self._preparations.append(of_group.preprocessing)
        self._parts = [
            _Part(of_group, net.to(self.device).eval(), count, self._preparations.index(of_group.preprocessing))
            for of_group, net, count in groups
        ]
        if precision == "auto":
            precision = "bf16" if has_bf16(self.device.type) else "fp32"
        self.autocast = torch.bfloat16 if precision == "bf16" else None
        on_slices = all(part.spec.spatial_dims == 2 for part in self._parts)
        self.batch_size = batch_size or (SLICES_AT_ONCE if on_slices else 1)
        self._steps = check_steps(self.spec.postprocess, spec.labels, num_channels=num_channels)
        self._crf = crf_of(self.spec.postprocess, spec.labels, num_channels=num_channels)
        self._turn = RLock()
        self._laid_out: set[_Part] = set()
        self._costs: dict[_Part, WindowCost] = {}

    def segment(
        self,
        images: Sequence[Source],
        *,
        with_probabilities: bool = False,
        probabilities_to: Path | None = None,
        with_uncertainty: bool = False,
        with_entropy: bool = False,
    ) -> Segmentation:
        """Segment a scan.

        Args:
            images: One file (or volume in memory) with all channels, or one a channel.
            with_probabilities: Whether to return them too.
            probabilities_to: File to hold them instead of memory, to be deleted when they are no longer needed.
            with_uncertainty: Whether to say how sure the prediction is.
            with_entropy: Whether to do so for each voxel too.

        Raises:
            DataError: If the scan cannot be used.
        """
        return self.segment_prepared(
            self.prepare(images), with_probabilities=with_probabilities, probabilities_to=probabilities_to,
            with_uncertainty=with_uncertainty, with_entropy=with_entropy,
        )  # fmt: skip

    def prepare(self, images: Sequence[Source], *, any_modality: bool = False) -> Prepared:
        """Read and preprocess a scan: the part that needs no network, and may run ahead in a thread.

        Args:
            images: One file (or volume in memory) with all channels, or one a channel.
            any_modality: Only warn of a scan whose modality is not the model's.

        Raises:
            DataError: If the scan cannot be used, or is not like those that the model was trained on.
        """
        try:
            prepared, *others = (
                preprocess(images, None, preprocessing, body_in=self._body_in(preprocessing))
                for preprocessing in self._preparations
            )
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
        self._check_dims(prepared.source, prepared.name)
        return replace(prepared, others=tuple(others)) if others else prepared

    def segment_prepared(
        self,
        prepared: Prepared,
        *,
        with_probabilities: bool = False,
        probabilities_to: Path | None = None,
        with_uncertainty: bool = False,
        with_entropy: bool = False,
    ) -> Segmentation:
        """Segment what `prepare` returned, as `segment` does; of a scan that shows nothing, nothing is segmented."""
        wanted = Wanted(
            with_probabilities or probabilities_to is not None,
            probabilities_to,
            with_uncertainty or with_entropy,
            with_entropy,
        )
        shows_something = any(np.ptp(channel) for seen in (prepared, *prepared.others) for channel in seen.image)
        if shows_something:
            found = self._segmented(prepared, wanted)
        else:
            log.warning("W-EMPTY %s: all its voxels are equal once clipped: nothing is segmented in it", prepared.name)
            found = self._collected((), prepared, PICTURE_AXIS, wanted)
            if wanted.uncertainty:
                found = replace(found, uncertainty=1.0)
        self._postprocess(found.label, prepared.name)
        if shows_something and not found.label.array.any():
            log.warning("W-EMPTY-PREDICTION %s: nothing was found in it", prepared.name)
        if not prepared.source.is_orthogonal:
            log.warning(
                "W-SHEARED %s: its slices are tilted, and its segmentation stands on the same sheared grid, which ITK's "
                "tools refuse to open; segment what medseg data convert makes of it to have both straight",
                prepared.name,
            )
        return found

    def postprocessed(self, label: Volume) -> Volume:
        """A label map (1, I, J[, K]) after the model's post-processing."""
        after = replace(label, array=label.array.copy())
        self._postprocess(after, "a label map")
        return after

    def _postprocess(self, label: Volume, name: str) -> None:
        is_picture = label.geometry.spatial_dims == 2
        if is_picture and any(step.name == "min_volume_ml" for step in self._steps):
            log.warning("W-POSTPROCESS %s: min_volume_ml has no meaning in a picture and is left out", name)
        voxel_ml = math.nan if is_picture else label.geometry.voxel_ml
        postprocess(label.array[0], self._steps, voxel_ml)

    def _segmented(self, prepared: Prepared, wanted: Wanted) -> Segmentation:
        """What the network says, in the first of the ways that memory suffices for."""
        possible = ways(self.device, self.batch_size, logits_fit=self._logits_fit(prepared))
        for way, easier in pairwise(possible):
            try:
                return self._predicted(prepared, way, wanted)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            log.warning("W-MEMORY %s: out of memory with %s; going on with %s", prepared.name, way, easier)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return self._predicted(prepared, possible[-1], wanted)

    def _logits_fit(self, prepared: Prepared) -> bool:
        """Whether a GPU has room for a scan and its logits; whether the network has beside them is found by trying."""
        on_gpu = self.device.type == "cuda"
        needed = sum(logits_bytes(part.spec, prepared.source, on_gpu=on_gpu) for part in self._parts)
        needed += sum(seen.image.nbytes for seen in (prepared, *prepared.others))
        fit = needed < free_bytes(self.device)
        if not fit:
            log.info(
                "%s: %.1f GB of logits are put together on the host, not on %s",
                prepared.name,
                needed / 1e9,
                self.device,
            )
        return fit

    def _predicted(self, prepared: Prepared, way: Way, wanted: Wanted) -> Segmentation:
        every = self._windows(prepared)
        is_picture = prepared.source.spatial_dims == 2
        axis = PICTURE_AXIS if is_picture else every[0].outer
        clock, votes = Clock(), Votes() if wanted.uncertainty else None
        crf: list[str] = []
        with ExitStack() as stack:
            streams = [
                stack.enter_context(
                    closing(self._strips(part, prepared, windows, way, axis=axis, clock=clock, votes=votes, crf=crf))
                )
                for part, windows in zip(self._parts, every, strict=True)
            ]
            of_models = votes if len(streams) > 1 else None
            strips = averaged(streams, [part.count for part in self._parts], self.spec.labels, of_models)
            found = self._collected(strips, prepared, axis, wanted)
        return replace(
            found,
            num_windows=sum(windows.num_computed for windows in every),
            num_in_air=sum(windows.num_in_air for windows in every),
            network_seconds=clock.seconds,
            waited_seconds=clock.waited,
            agreement=votes.share if votes else None,
            crf=tuple(crf),
        )

    def plan(self, source: Geometry, name: str = "the scan") -> Plan:
        """What a scan on this grid will take; the first call computes some windows to find out.

        Raises:
            DataError: If it is a picture and the model takes volumes.
        """
        self._check_dims(source, name)
        way, total = Way(self.batch_size, self.device, self.device), Plan(0, 0.0, 0, 0)
        for part in self._parts:
            if part not in self._costs:
                shape = part.batch_shape(way.batch_size)
                self._costs[part] = window_cost(part.network, shape, device=way.device, autocast=self.autocast)
            on_gpu = way.device.type == "cuda"
            total += plan_of(part.spec, source, self._costs[part], batch_size=way.batch_size, on_gpu=on_gpu)
        return total

    @contextmanager
    def _turn_of(self, part: _Part, way: Way, num_windows: int, clock: Clock) -> Iterator[None]:
        """The time in which a scan's windows are predicted, and no other's."""
        asked = time.perf_counter()
        with self._turn:
            clock.waited += time.perf_counter() - asked
            part.network.to(way.device)
            if num_windows >= MIN_WINDOWS and part not in self._laid_out and way.device == self.device:
                self._laid_out.add(part)
                if part.spec.spatial_dims == 3:
                    shape = part.batch_shape(way.batch_size)
                    lay_out(part.network, shape, device=way.device, autocast=self.autocast)
            yield

    def _windows(self, prepared: Prepared) -> list[Windows]:
        """Of each part; all in order along the same axis, and in the same direction."""
        directions = {part.spec.preprocessing.orientation for part in self._parts}
        assert len({direction[TOWARDS_THE_HEAD] for direction in directions}) == 1
        outer = TOWARDS_THE_HEAD if len(directions) > 1 else None
        found = []
        for part in self._parts:
            seen = (prepared, *prepared.others)[part.preparation]
            found.append(Windows.over(seen.image.shape[1:], part.spec.window, body=seen.body, outer=outer))
            outer = found[0].outer
        return found

    def _strips(
        self,
        part: _Part,
        prepared: Prepared,
        windows: Windows,
        way: Way,
        *,
        axis: int,
        clock: Clock,
        votes: Votes | None,
        crf: list[str],
    ) -> Strips:
        """What a part says, on the scan's grid, its axes laid as those of the first part's."""
        seen = (prepared, *prepared.others)[part.preparation]
        network = part.network
        votes_here = votes if len(self._parts) == 1 and isinstance(network, Averaged | Mirrored) else None
        grid = solid(seen.geometry)
        target = Place(prepared.source, self.spec.preprocessing.orientation, axis).target
        in_bands = len(self._parts) == 1 and has_bands(grid, target)  # several are averaged in order of their rows
        image = torch.from_numpy(seen.image).to(way.sums_on)
        predicted = slabs(
            image,
            partial(network, votes=votes_here) if votes_here else network,
            windows,
            background=self.spec.labels.background,
            batch_size=way.batch_size,
            autocast=self.autocast if way.device == self.device or has_bf16(way.device.type) else None,
            device=way.device,
            clock=clock,
            in_bands=in_bands,
            turn=self._turn_of(part, way, windows.num_computed, clock),
        )
        if self._crf:
            predicted = refined(
                predicted, image, self._crf, self.spec.labels, windows,
                spacing_mm=seen.geometry.spacing_mm, told=crf,
            )  # fmt: skip
        box = windows.box
        if prepared.source.spatial_dims == 2:
            box = tuple(slice(0, n) for n in grid.shape)
        elif part.spec.preprocessing.orientation != self.spec.preprocessing.orientation:
            predicted, box, grid = mirrored(predicted, box, grid, self.spec.preprocessing.orientation, axis)
        return resampled(predicted, self.spec.labels.background, box=box, grid=grid, target=target, axis=axis)

    def _collected(self, strips: Iterable[Strip], prepared: Prepared, axis: int, wanted: Wanted) -> Segmentation:
        """Strips on the scan's grid, and what they say of it."""
        labels, source = self.spec.labels, prepared.source
        place = Place(source, self.spec.preprocessing.orientation, axis)
        chances = room_for_probabilities(labels, place, wanted.probabilities_to) if wanted.probabilities else None
        uncertainty = Uncertainty(labels) if wanted.uncertainty else None
        entropy = np.zeros((1, *source.shape), np.uint8) if wanted.entropy else None
        label = restored(strips, labels, place, chances=chances, uncertainty=uncertainty, entropy=entropy)
        doubts = uncertainty.result() if uncertainty else None
        return Segmentation(
            label,
            None if chances is None else Volume(chances, source),
            uncertainty=doubts.case if doubts else None,
            uncertainties=doubts.organs if doubts else {},
            entropy=None if entropy is None else Volume(entropy, source),
        )

    def _body_in(self, preprocessing: Preprocessing) -> Sequence[str]:
        """The channels in which the body is looked for, where a network is to be spared the air."""
        crops = [part.spec.window.crop for part in self._parts if part.spec.preprocessing == preprocessing]
        return self.spec.channels if any(crop != "none" for crop in crops) else ()

    def _check_dims(self, source: Geometry, name: str) -> None:
        takes_pictures = all(
            part.spec.spatial_dims == 2 and not part.spec.window.context_slices for part in self._parts
        )
        if source.spatial_dims != 3 and not takes_pictures:
            raise DataError(
                "E-SPATIAL-DIMS",
                f"{source.spatial_dims}D image of shape {source.shape}; the model takes volumes: "
                "stack the slices into one file",
                where=name,
            )

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


def has_bf16(device_type: str) -> bool:
    """Whether the hardware computes in bf16; emulated, it is slower than fp32."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
