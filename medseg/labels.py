"""What the numbers of a label map mean, and what a network is asked to output for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.errors import DataError

if TYPE_CHECKING:  # a manifest is read in milliseconds; torch takes a second and a half
    import torch
    from torch import Tensor


MAX_LABEL = 32_767
"""Largest label value: label maps are uint8 or int16."""

CERTAIN = 30.0
"""A logit that leaves no doubt: the probability against it is 1e-13."""

SEG_THRESHOLD = 0.5
"""Share of a voxel from which on it belongs to a segment of a fractional DICOM SEG, if a data set says nothing else."""


@dataclass(frozen=True)
class Labels:
    """The label map of a data set.

    With regions the network has one sigmoid output a region (organs may overlap); without, one
    softmax output a label, background first.

    Args:
        names: Label value to name; 0 is the background, values run 0, 1, 2 … without a gap.
        regions: Region name to the label values it unites, in output order; empty: no regions.
        region_order: Label value written for each region when a prediction becomes a label map;
            later regions overwrite earlier ones. Where structures of a DICOM SEG or RTSTRUCT overlap,
            later values lie on top.
        ignore_label: Value of voxels that nobody annotated: neither loss nor metric counts them.
        pairs: Left and right label of each paired organ, exchanged by a left-right flip.
        structures: Label value of what a DICOM SEG or RTSTRUCT calls otherwise than `names` do; 0 leaves it out.
        seg_threshold: A voxel of a fractional DICOM SEG counts where its share is at least this.
    """

    names: Mapping[int, str]
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    region_order: tuple[int, ...] = ()
    ignore_label: int | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    structures: Mapping[str, int] = field(default_factory=dict)
    seg_threshold: float = SEG_THRESHOLD

    def __post_init__(self) -> None:
        values = sorted(self.names)
        if values != list(range(len(values))) or len(values) < 2:
            raise DataError(
                "E-LABELS",
                f"labels {values}; expected 0 (background), 1, 2 … without a gap and at least one organ; "
                "renumber them in the manifest and the files",
            )
        if len(set(self.names.values())) < len(values):
            raise DataError("E-LABELS", f"two labels share a name: {list(self.names.values())}")
        if self.ignore_label is not None and self.ignore_label in self.names:
            raise DataError(
                "E-LABELS", f"ignore_label {self.ignore_label} is also the label {self.names[self.ignore_label]!r}"
            )
        if self.ignore_label is not None and not 0 < self.ignore_label <= MAX_LABEL:
            raise DataError("E-LABELS", f"ignore_label {self.ignore_label}; it must be from 1 to {MAX_LABEL}")
        if not 0 < self.seg_threshold <= 1:
            raise DataError("E-LABELS", f"seg_threshold {self.seg_threshold}; it must be above 0 and at most 1")
        used = [v for united in self.regions.values() for v in united]
        used += [*self.region_order, *[v for pair in self.pairs for v in pair], *self.structures.values()]
        unknown = sorted({v for v in used if v not in self.names})
        if unknown:
            raise DataError(
                "E-LABELS",
                f"regions, region_order, pairs or structures name label {unknown}, which labels do not declare",
            )
        if self.regions and len(self.region_order) != len(self.regions):
            raise DataError(
                "E-LABELS",
                f"region_order {list(self.region_order)} must give one label value for each of the regions "
                f"{list(self.regions)}, the last written on top",
            )
        for value, (name, united) in zip(self.region_order, self.regions.items(), strict=False):
            if value not in united:
                raise DataError(
                    "E-LABELS", f"region_order gives {value} for region {name!r}, which unites {list(united)}"
                )

    @property
    def organs(self) -> tuple[str, ...]:
        """What is scored: the regions, or every label but the background."""
        return tuple(self.regions) or tuple(self.names[v] for v in sorted(self.names) if v != 0)

    @property
    def organ_values(self) -> dict[str, tuple[int, ...]]:
        """Label values that make up each organ or region."""
        return dict(self.regions) or {self.names[v]: (v,) for v in sorted(self.names) if v != 0}

    def scored(self, unions: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Label values of each organ, and of each of the unions that are scored beside them."""
        return self.organ_values | {name: tuple(values) for name, values in unions.items()}

    @property
    def dtype(self) -> type[np.uint8 | np.int16]:
        """Of label maps."""
        return np.uint8 if max(self.names) <= np.iinfo(np.uint8).max else np.int16

    @property
    def num_outputs(self) -> int:
        """Channels of the network's output."""
        return len(self.regions) or len(self.names)

    @property
    def background(self) -> list[float]:
        """Logits that say background with certainty, one for each output."""
        if self.regions:
            return [-CERTAIN] * self.num_outputs
        return [CERTAIN] + [0.0] * (self.num_outputs - 1)

    def target(self, label: Tensor) -> tuple[Tensor, Tensor | None]:
        """A batch of label maps as losses want it.

        Args:
            label: Integer, (B, 1, I, J[, K]).

        Returns:
            Class indices (B, I, J[, K]), or for regions floats (B, R, I, J[, K]); and a boolean mask
            (B, 1, I, J[, K]) of the voxels that count, None if all do.
        """
        import torch

        mask = None
        if self.ignore_label is not None:
            mask = label != self.ignore_label
            label = label.where(mask, torch.zeros_like(label))
        if not self.regions:
            return label[:, 0].long(), mask
        united = [
            torch.isin(label, torch.tensor(v, device=label.device, dtype=label.dtype)) for v in self.regions.values()
        ]
        return torch.cat(united, dim=1).float(), mask

    def segment(self, logits: Tensor) -> Tensor:
        """Logits (B, C, I, J[, K]) as label maps (B, I, J[, K]), uint8 or int16."""
        import torch

        dtype = torch.uint8 if self.dtype is np.uint8 else torch.int16
        if not self.regions:
            return _argmax(logits, dtype)
        result = torch.zeros_like(logits[:, 0], dtype=dtype)
        for channel, value in enumerate(self.region_order):
            result[logits[:, channel] > 0] = value
        return result

    def to_dict(self) -> dict[str, Any]:
        """As in a manifest and in model.json."""
        return {
            "labels": {str(value): name for value, name in sorted(self.names.items())},
            "regions": {name: list(values) for name, values in self.regions.items()},
            "region_order": list(self.region_order),
            "ignore_label": self.ignore_label,
            "pairs": [list(pair) for pair in self.pairs],
            "structures": dict(self.structures),
            "seg_threshold": self.seg_threshold,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Labels:
        """From a manifest or model.json; also takes nnU-Net's ``{"liver": 1}`` way round."""
        names: dict[int, str] = {}
        for key, value in data["labels"].items():
            if isinstance(value, str):
                names[int(key)] = value
            else:
                names[int(value)] = str(key)
        threshold = data.get("seg_threshold")
        ignored = next((value for value, name in names.items() if name == "ignore"), None)  # as nnU-Net says it
        names = {value: name for value, name in names.items() if name != "ignore"}
        regions = {name: _values(values) for name, values in (data.get("regions") or {}).items()}
        return cls(
            names=names,
            regions=regions,
            region_order=tuple(data.get("region_order") or _own_values(regions)),
            ignore_label=ignored if ignored is not None else data.get("ignore_label"),
            pairs=tuple((int(left), int(right)) for left, right in data.get("pairs") or ()),
            structures={str(name): int(value) for name, value in (data.get("structures") or {}).items()},
            seg_threshold=SEG_THRESHOLD if threshold is None else float(threshold),
        )


def _argmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """``logits.argmax(dim=1)``; on a CPU ten times as fast: torch's own strides through memory from class to class."""
    import torch

    if logits.device.type != "cpu":
        return logits.argmax(1).to(dtype)
    first, *others = (channel.float().numpy() for channel in logits.detach().unbind(1))
    best, label = first.copy(), np.zeros(first.shape, np.uint8 if dtype is torch.uint8 else np.int16)
    higher, mine = np.empty(first.shape, bool), np.empty_like(label)
    for value, channel in enumerate(others, start=1):
        np.greater(channel, best, out=higher)
        np.multiply(higher.view(np.uint8), value, out=mine, dtype=label.dtype)
        np.maximum(label, mine, out=label)
        np.maximum(best, channel, out=best)
    return torch.from_numpy(label)


def _own_values(regions: Mapping[str, tuple[int, ...]]) -> list[int]:
    """For each region a label value that no later region unites: what remains of it in a label map."""
    order = []
    united = list(regions.items())
    for n, (name, values) in enumerate(united):
        own = [value for value in values if not any(value in later for _, later in united[n + 1 :])]
        if not own:
            raise DataError(
                "E-LABELS", f"region {name!r} lies within later ones; list larger regions first, or give region_order"
            )
        order.append(own[-1])
    return order


def _values(values: int | Sequence[int]) -> tuple[int, ...]:
    return (values,) if isinstance(values, int) else tuple(values)
