"""Left and right: whether paired organs lie on the side that their names say.

===================== ==================================================================
W-LEFT-RIGHT          the left organ lies on the patient's right of its counterpart
W-PAIRS               labels that are named left and right, but that the manifest's pairs leave out
===================== ==================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from medseg.data.lint.case import CaseFacts
from medseg.data.lint.rows import Row

_SIDES = {"left": "right", "l": "r", "lt": "rt", "sin": "dex", "sinister": "dexter", "sinistra": "dextra"}

_KNOWN_SIDES = (("spleen", "liver"), ("stomach", "liver"))
"""Organs of one kind that lie left and right of each other (but for situs inversus, one person in 10,000)."""


@dataclass(frozen=True)
class SidedPair:
    """Two labels of which one lies to the left of the other.

    Args:
        left: Label value of the organ on the patient's left.
        right: Label value of its counterpart.
    """

    left: int
    right: int


def named_pairs(names: Mapping[int, str]) -> list[SidedPair]:
    """Labels whose names differ in the side alone: ``kidney_left`` and ``kidney_right``, ``lung L`` and ``lung R``."""
    value_of = {_words(name): value for value, name in names.items()}
    pairs = []
    for words, value in value_of.items():
        for at, word in enumerate(words):
            counterpart = (*words[:at], _SIDES.get(word, ""), *words[at + 1 :])
            if word in _SIDES and counterpart in value_of:
                pairs.append(SidedPair(value, value_of[counterpart]))
    return pairs


def sided_pairs(names: Mapping[int, str], pairs: Sequence[tuple[int, int]]) -> list[SidedPair]:
    """Every two labels of which one must lie left of the other; where names tell the side, they count.

    Args:
        names: Label value to name.
        pairs: The manifest's own, left before right.
    """
    by_name = named_pairs(names)
    told = {frozenset((pair.left, pair.right)) for pair in by_name}
    by_manifest = [SidedPair(left, right) for left, right in pairs if frozenset((left, right)) not in told]
    value_of = {name.strip().lower(): value for value, name in names.items()}
    known = [SidedPair(value_of[a], value_of[b]) for a, b in _KNOWN_SIDES if a in value_of and b in value_of]
    return by_name + by_manifest + known


def side_rows(names: Mapping[int, str], pairs: Sequence[tuple[int, int]], facts: Sequence[CaseFacts]) -> Iterator[Row]:
    """Suspicions, case by case, and one for the data set where most of its cases are suspect.

    A mirrored scan, its label mirrored along, looks sound in every viewer and every metric.

    Args:
        names: Label value to name, as the files have them.
        pairs: The manifest's, in the same values.
        facts: All cases.
    """
    declared = {frozenset(pair) for pair in pairs}
    for pair in named_pairs(names):
        if frozenset((pair.left, pair.right)) not in declared:
            message = (
                f"labels {names[pair.left]!r} and {names[pair.right]!r} look like a pair that the manifest's pairs "
                "leaves out: where scans are flipped left to right, one would be taught as the other; add "
                f'"pairs": [[{pair.left}, {pair.right}]]'
            )
            yield Row("W-PAIRS", message, fixable=True)
    judged, swapped = 0, []
    for found in facts:
        wrong, seen = _swapped(found, sided_pairs(names, pairs))
        judged += seen
        if wrong:
            swapped.append(found)
            parts = [
                f"the {names[p.left]} lies {d:.0f} mm to the patient's right of the {names[p.right]}" for p, d in wrong
            ]
            message = f"{'; '.join(parts)}: mirrored scan, wrong orientation in the header, or sides exchanged"
            file = str(found.case.label) if found.case.label else None
            yield Row("W-LEFT-RIGHT", message, found.case.id, file)
    if judged and len(swapped) > judged / 2:
        message = (
            f"LEFT AND RIGHT ARE EXCHANGED in {len(swapped)} of {judged} cases: either every scan is mirrored, or the "
            "names of the labels are. Do not train on this before you know which: a model would name the wrong side"
        )
        yield Row("W-LEFT-RIGHT", message)


def _swapped(found: CaseFacts, pairs: Sequence[SidedPair]) -> tuple[list[tuple[SidedPair, float]], bool]:
    """The pairs of a case that stand on the wrong sides, by how many mm, and whether it has any pair at all."""
    if found.label is None:
        return [], False
    centers, least = found.label.centers_mm, max(found.label.geometry.spacing_mm)
    present = [pair for pair in pairs if pair.left in centers and pair.right in centers]
    distances = [(pair, centers[pair.left][0] - centers[pair.right][0]) for pair in present]  # x grows to the Right
    return [(pair, distance) for pair, distance in distances if distance > least], bool(present)


def _words(name: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[^a-z0-9]+", name.lower()) if word)
