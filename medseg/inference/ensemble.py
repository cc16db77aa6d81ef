"""Several models as one: logits averaged window by window where they share windows, else probabilities on the scan."""

from __future__ import annotations

import statistics
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from medseg.errors import ModelError
from medseg.inference.postprocess import CRF_STEP
from medseg.inference.tta import Mirrored
from medseg.inference.uncertainty import Votes
from medseg.labels import Labels
from medseg.model import Intensity, ModelSpec, Preprocessing, Window

_LEAST = 1e-30  # a probability whose logarithm is still a number


@dataclass(frozen=True)
class Strip:
    """Rows of a plane on the scan's grid, of which all is known.

    Args:
        number: Which plane.
        first_row: Which row is the first.
        logits: (R, A, B), A rows.
    """

    number: int
    first_row: int
    logits: Tensor


Strips = Generator[Strip]
"""Those of all planes, each once; planes that are background alone may be left out."""


@dataclass(frozen=True)
class Member:
    """A model of an ensemble.

    Args:
        spec: What the model is.
        network: With its weights.
        name: What messages call it.
    """

    spec: ModelSpec
    network: nn.Module
    name: str = "a model"


class Averaged(nn.Module):
    """Networks whose logits are averaged: of a window, so that no more than one window's is held.

    Args:
        networks: All take and return the same: (B, C, patch) → (B, R, patch).
        labels: What the channels are.
    """

    def __init__(self, networks: Sequence[nn.Module], labels: Labels) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.labels = labels

    def forward(self, image: Tensor, votes: Votes | None = None) -> Tensor:
        maps, mean = [], torch.zeros((), device=image.device)
        for network in self.networks:
            logits = network(image).float()
            if votes:
                maps.append(self.labels.segment(logits))
            mean = torch.add(mean, logits, alpha=1 / len(self.networks))
        if votes:
            votes.count([*maps, self.labels.segment(mean)])
        return mean


class Renormalized(nn.Module):
    """A network that is given what was normalized for another one by the constants of that one's training cases.

    Folds differ in nothing else, and are the same network's windows then. (Zeros around a scan that is smaller than a
    patch become nearly zero.)

    Args:
        network: (B, C, patch) → (B, R, patch).
        given: How each channel was normalized.
        wanted: How the network's own would be.
    """

    def __init__(self, network: nn.Module, given: Sequence[Intensity], wanted: Sequence[Intensity]) -> None:
        super().__init__()
        self.network = network
        factors, shifts = [], []
        for one, other in zip(given, wanted, strict=True):
            (mean, std), (own_mean, own_std) = _constants(one), _constants(other)
            factors.append(std / own_std)
            shifts.append((mean - own_mean) / own_std)
        self.factor: Tensor
        self.shift: Tensor
        self.register_buffer("factor", torch.tensor(factors))
        self.register_buffer("shift", torch.tensor(shifts))

    def forward(self, image: Tensor) -> Tensor:
        shape = (-1, *[1] * (image.ndim - 2))
        return self.network(image * self.factor.reshape(shape) + self.shift.reshape(shape))


def _constants(intensity: Intensity) -> tuple[float, float]:
    """Mean and deviation that a channel is normalized by, as `medseg.data.intensity.normalize_` takes them."""
    if intensity.mean is None or intensity.std is None or intensity.normalize != "foreground":
        return 0.0, 1.0
    return intensity.mean, intensity.std if intensity.std > 0 else 1.0


def _view(spec: ModelSpec) -> tuple[Preprocessing, Window]:
    """What models must share to see the same windows, but for constants."""
    intensity = tuple(
        replace(channel, mean=None, std=None) if _constants(channel) != (0.0, 1.0) else channel
        for channel in spec.preprocessing.intensity
    )
    return replace(spec.preprocessing, intensity=intensity), spec.window


def grouped(members: Sequence[Member]) -> list[tuple[ModelSpec, nn.Module, int]]:
    """Models that see the same windows of the same voxels, as one network each, mirrored as their windows say.

    Returns:
        What the first of each group is, their network, and how many they are.

    Raises:
        ModelError: If the models do not find the same organs in the same channels.
        WorkflowError: If a model cannot be mirrored as it says.
    """
    _check_together(members)
    groups: list[list[Member]] = []
    for member in members:
        for group in groups:
            if _view(member.spec) == _view(group[0].spec):
                group.append(member)
                break
        else:
            groups.append([member])
    return [(group[0].spec, _as_one(group), len(group)) for group in groups]


def _as_one(group: Sequence[Member]) -> nn.Module:
    given = group[0].spec.preprocessing.intensity
    networks = [_mirrored(member, given) for member in group]
    return Averaged(networks, group[0].spec.labels) if len(networks) > 1 else networks[0]


def _mirrored(member: Member, given: Sequence[Intensity]) -> nn.Module:
    network, wanted = member.network, member.spec.preprocessing.intensity
    if wanted != given:
        network = Renormalized(network, given, wanted)
    axes = member.spec.window.mirror_axes
    return Mirrored(network, axes, member.spec.labels) if axes else network


def averaged(streams: Sequence[Strips], counts: Sequence[int], labels: Labels, votes: Votes | None = None) -> Strips:
    """The mean of several models' probabilities, strip by strip, while they are being made.

    Args:
        streams: The strips of each; those of several are cut alike, and come in order of planes and rows.
        counts: What each counts.
        labels: What the channels are.
        votes: Told how far the models agree.

    Yields:
        The mean, as logits: their softmax, or of regions their sigmoid, is the mean of the probabilities.
    """
    if len(streams) == 1:
        yield from streams[0]
        return
    heads = [next(stream, None) for stream in streams]
    while coming := [head for head in heads if head]:
        at, device = min((head.number, head.first_row) for head in coming), coming[0].logits.device
        maps, mean = [], torch.zeros((), device=device)
        for n, (head, count) in enumerate(zip(heads, counts, strict=True)):
            here = head is not None and (head.number, head.first_row) == at
            logits = head.logits if head and here else torch.tensor(labels.background, device=device)[:, None, None]
            if votes:
                maps.append(labels.segment(logits[None]))
            mean = mean + probabilities(logits, labels) * (count / sum(counts))
            if here:
                heads[n] = next(streams[n], None)
        logits = as_logits(mean, labels)
        if votes:
            votes.count([*maps, labels.segment(logits[None])])
        yield Strip(*at, logits)


def probabilities(logits: Tensor, labels: Labels) -> Tensor:
    """Of logits (R, …): each region's, or each label's."""
    return logits.sigmoid() if labels.regions else logits.softmax(dim=0)


def as_logits(mean: Tensor, labels: Labels) -> Tensor:
    """Logits (R, …) whose `probabilities` are these."""
    return torch.logit(mean, eps=1e-7) if labels.regions else mean.clamp(min=_LEAST).log()


def voted(choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The post-processing that more than half of the models ask for; of amounts the median, of a CRF the first.

    Args:
        choices: Of each model, as in the workflow.
    """
    if len(choices) == 1:
        return dict(choices[0])
    crfs = [choice[CRF_STEP] for choice in choices if CRF_STEP in choice]
    choices = [{step: organs for step, organs in choice.items() if step != CRF_STEP} for choice in choices]
    steps: dict[str, dict[str, list[Any]]] = {}
    for choice in choices:
        for step, organs in choice.items():
            for organ in organs:
                amount = organs[organ] if isinstance(organs, Mapping) else None
                steps.setdefault(step, {}).setdefault(organ, []).append(amount)
    chosen: dict[str, Any] = {CRF_STEP: crfs[0]} if 2 * len(crfs) > len(choices) else {}
    for step, organs in steps.items():
        wanted = {organ: amounts for organ, amounts in organs.items() if 2 * len(amounts) > len(choices)}
        if not wanted:
            continue
        has_amounts = all(None not in amounts for amounts in wanted.values())
        chosen[step] = {o: statistics.median(amounts) for o, amounts in wanted.items()} if has_amounts else list(wanted)
    return chosen


def _check_together(members: Sequence[Member]) -> None:
    first = members[0]
    for other in members[1:]:
        if difference := _difference(first.spec, other.spec):
            raise ModelError(
                "E-ENSEMBLE",
                f"{difference} in {first.name}; only models that find the same in the same channels can be averaged",
                where=other.name,
            )


def _organ_names(labels: Labels) -> dict[int, str]:
    return {value: name for value, name in labels.names.items() if value}  # what the background is called is no matter


def _told(what: str, found: Any, wanted: Any) -> str:
    if found is None:
        return f"there is no {what}, which is {wanted!r}"
    return f"{what} is {found!r}, " + ("which there is not" if wanted is None else f"but {wanted!r}")


def _difference(first: ModelSpec, other: ModelSpec) -> str:
    """The first thing that keeps two models from being averaged, or nothing."""
    compared: dict[str, tuple[Mapping[Any, Any], Mapping[Any, Any]]] = {
        "label": (_organ_names(first.labels), _organ_names(other.labels)),
        "region": (first.labels.regions, other.labels.regions),
        "region_order": (dict(enumerate(first.labels.region_order)), dict(enumerate(other.labels.region_order))),
        "channel": (dict(enumerate(first.channels)), dict(enumerate(other.channels))),
    }
    for what, (wanted, found) in compared.items():
        for key in [*wanted, *found]:
            if wanted.get(key) != found.get(key):
                return _told(f"{what} {key}", found.get(key), wanted.get(key))
        if list(wanted) != list(found):
            return f"its {what}s are {', '.join(map(str, found))}, in another order than"
    return ""
