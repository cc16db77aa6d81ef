"""All cases of a data set examined, and what only the data set as a whole can tell.

===================== ==================================================================
E-LABEL-ABSENT        a declared label that no training case has
W-LABEL-ABSENT        one that the training side of a fold, or the labeled test cases, lack
E-DUPLICATE-SCAN      the same voxels in two folds, or in training and test
W-DUPLICATE-SCAN      the same voxels twice on the same side
E-LEAKAGE             a patient in two folds, or in training and test
W-PATIENT-ID          one PatientID in the DICOM files of most cases
E-SPATIAL-DIMS        a picture among volumes, or the other way round
W-SPACING             a voxel size far from the data set's median
W-ORIENTATION         axes that point elsewhere than in most cases
E-OUTSIDE-ROOT        a file outside the manifest's root
E-SHA256              a file that changed since the manifest was written
===================== ==================================================================
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg.data.lint.case import CaseFacts, Expected, examine
from medseg.data.lint.draft import Draft
from medseg.data.lint.rows import Row, WarningLog, warnings_kept
from medseg.data.lint.sides import side_rows, sided_pairs
from medseg.data.manifest import Case, Manifest
from medseg.display import track
from medseg.errors import MedsegError
from medseg.files import sha256_of
from medseg.wording import listed

MIN_SPACING_FACTOR = 2.0
"""Voxels this many times as large as the median, or as small, are worth a look …"""

SPACING_DEVIATIONS = 3.0
"""… unless the data set varies so much that they are within so many robust standard deviations."""

RARE_SHARE = 0.1
"""Orientations that fewer cases have than this, where most share another, are worth a look."""

_SAME_PERSON = "their DICOM files bear one PatientID: give them one 'patient' and one fold"


@dataclass(frozen=True, eq=False)
class Terms:
    """What the numbers in a data set's label files mean.

    Args:
        names: Declared label value to name, as the files have them.
        ignore_label: Value of voxels that nobody annotated.
        pairs: Left and right label of paired organs.
    """

    names: Mapping[int, str]
    ignore_label: int | None = None
    pairs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, draft: Draft) -> Terms:
        """Those of a manifest, before any renumbering."""
        labels, old = draft.manifest.labels, {new: old for old, new in draft.mapping.items()}
        return cls(
            names={old.get(value, value): name for value, name in labels.names.items()},
            ignore_label=None if labels.ignore_label is None else old.get(labels.ignore_label, labels.ignore_label),
            pairs=tuple((old.get(left, left), old.get(right, right)) for left, right in labels.pairs),
        )

    @property
    def values(self) -> frozenset[int]:
        return frozenset(self.names) | ({self.ignore_label} if self.ignore_label is not None else set())


def expected_of(
    draft: Draft,
    *,
    select_volume: int | None = None,
    assume_spacing_mm: Sequence[float] | None = None,
    allow_missing_slices: bool = False,
) -> Expected:
    """What a manifest, and the workflow that names it, say of every case."""
    terms = Terms.of(draft)
    sided = {value for pair in sided_pairs(terms.names, terms.pairs) for value in (pair.left, pair.right)}
    return Expected(
        values=terms.values,
        channels=draft.manifest.channels,
        ignore_label=terms.ignore_label,
        select_volume=select_volume,
        assume_spacing_mm=tuple(assume_spacing_mm) if assume_spacing_mm else None,
        allow_missing_slices=allow_missing_slices,
        sided=frozenset(sided),
        labels=draft.manifest.labels,
        numbers={new: old for old, new in draft.mapping.items() if old != new},
    )


def examine_manifest(draft: Draft, expected: Expected) -> list[CaseFacts]:
    """Read every case of a data set, with a progress bar; training cases first, in the manifest's order."""
    manifest = draft.manifest

    def one(case: Case, warned: WarningLog, *, is_training: bool) -> CaseFacts:
        facts = examine(case, warned, expected=expected, is_training=is_training)
        of_manifest = (*_outside(case, manifest), *_changed(case, draft.entries[case.id]))
        return replace(facts, rows=(*facts.rows, *of_manifest))

    return _examined([(case, True) for case in manifest.training] + [(case, False) for case in manifest.test], one)


def examine_scans(cases: Sequence[Case]) -> list[CaseFacts]:
    """Read scans that belong to no data set, with a progress bar."""

    def one(case: Case, warned: WarningLog, *, is_training: bool) -> CaseFacts:
        return examine(case, warned, expected=Expected(), is_training=is_training)

    return _examined([(case, False) for case in cases], one)


def manifest_rows(manifest: Manifest, terms: Terms, facts: Sequence[CaseFacts]) -> list[Row]:
    """What only the data set as a whole can tell."""
    folds = folds_of(manifest)
    return [
        *_absent_rows(terms, facts, folds),
        *_patient_rows(facts, folds),
        *_duplicate_rows(facts, folds),
        *side_rows(terms.names, terms.pairs, facts),
        *scan_rows(facts),
    ]


def folds_of(manifest: Manifest) -> dict[str, int]:
    """The fold of each training case; none where the manifest's own cannot be used."""
    try:
        return manifest.folds() if manifest.training else {}
    except MedsegError:  # told with the manifest
        return {}


def scan_rows(facts: Sequence[CaseFacts]) -> list[Row]:
    """Scans that differ from the others."""
    return [*_dims_rows(facts), *_spacing_rows(facts), *_orientation_rows(facts)]


def folder_rows(facts: Sequence[CaseFacts]) -> list[Row]:
    """As `manifest_rows`, for scans that belong to no data set."""
    return [*_duplicate_rows(facts, {}), *scan_rows(facts)]


def spacings_ras(facts: Iterable[CaseFacts]) -> dict[str, tuple[float, ...]]:
    """Voxel size of each case, along its axes brought to RAS."""
    return {f.case.id: f.geometry.oriented("RAS").spacing_mm for f in facts if f.geometry}


def duplicates(facts: Sequence[CaseFacts]) -> list[list[CaseFacts]]:
    """Cases with the same voxels, in groups."""
    groups: dict[str, list[CaseFacts]] = defaultdict(list)
    for found in facts:
        if found.digest:
            groups[found.digest].append(found)
    return [group for group in groups.values() if len(group) > 1]


def same_labels(facts: Sequence[CaseFacts]) -> bool:
    """Whether nobody has to decide which of several cases has the right label."""
    return len({found.label.digest if found.label else None for found in facts}) == 1


def _examined(cases: Sequence[tuple[Case, bool]], examine_one: Callable[..., CaseFacts]) -> list[CaseFacts]:
    """One case a thread in memory: reading, zlib and numpy let go of the interpreter lock."""
    with warnings_kept() as warned, ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda entry: examine_one(entry[0], warned, is_training=entry[1]), cases)
        return list(track(found, "checking cases", total=len(cases)))


def _outside(case: Case, manifest: Manifest) -> Iterator[Row]:
    """Files that the manifest may not name; whether they are meant, only a person knows."""
    for file in manifest.outside[case.id]:
        yield Row("E-OUTSIDE-ROOT", manifest.why_not_outside, case.id, str(file))


def _changed(case: Case, entry: Mapping[str, Any]) -> Iterator[Row]:
    """Files whose hash the manifest states, and that have another."""
    stated = entry.get("sha256")
    if not stated:
        return
    known = stated if isinstance(stated, dict) else {"image": stated}
    images = known.get("image") or []
    images = images if isinstance(images, list) else [images]
    expected: list[tuple[Path, Any]] = list(zip(case.images, images, strict=False))
    if case.label and known.get("label"):
        expected.append((case.label, known["label"]))
    for file, digest in expected:
        if file.is_file() and sha256_of(file) != digest:
            message = (
                "its sha256 is not the one in the manifest: the file changed; fetch it again or update the manifest"
            )
            yield Row("E-SHA256", message, case.id, str(file))


def _absent_rows(terms: Terms, facts: Sequence[CaseFacts], folds: Mapping[str, int]) -> Iterator[Row]:
    labeled = [found for found in facts if found.label]
    training = [found for found in labeled if found.is_training]
    test = [found for found in labeled if not found.is_training]
    if not training:
        return
    for value, name in terms.names.items():
        if value == 0:
            continue
        bearers = [found for found in training if found.label and value in found.label.voxels]
        if not bearers:
            message = (
                f"label {value} ({name}) is declared, but no training case has it; remove it or correct the labels"
            )
            yield Row("E-LABEL-ABSENT", message)
            continue
        held_out = {folds[found.case.id] for found in bearers if found.case.id in folds}
        if len(held_out) == 1 and len(set(folds.values())) > 1:
            message = (
                f"label {value} ({name}) stands in fold {held_out.pop()} alone ({len(bearers)} cases): with that fold "
                "held out, nothing teaches it"
            )
            yield Row("W-LABEL-ABSENT", message)
        if test and not any(found.label and value in found.label.voxels for found in test):
            yield Row("W-LABEL-ABSENT", f"label {value} ({name}) stands in no test case: its test scores will be empty")


def _patient_rows(facts: Sequence[CaseFacts], folds: Mapping[str, int]) -> Iterator[Row]:
    """Patients on two sides; told by their cases, for the patient's own name may be private."""
    for group in of_one_patient(facts):
        training = [found for found in group if found.is_training]
        named = listed(found.case.id for found in group)
        used = sorted({folds[found.case.id] for found in training if found.case.id in folds})
        if len(used) > 1:
            advice = "give them one fold" if len({found.case.patient for found in group}) == 1 else _SAME_PERSON
            message = f"{named} are of one patient, but stand in folds {', '.join(map(str, used))}; {advice}"
            yield Row("E-LEAKAGE", message, group[0].case.id, fixable=True)
        if training and len(training) < len(group):
            message = f"{named} are of one patient, but stand in training and in test; keep them on one side"
            yield Row("E-LEAKAGE", message, group[0].case.id)
    for group in _hidden_by_one_id(facts):
        message = (
            f"{listed(found.case.id for found in group)} bear one PatientID: a placeholder, or one patient? If they are one, say so in the manifest "
            "('patient'), or they stand on both sides of a fold"
        )
        yield Row("W-PATIENT-ID", message)


def of_one_patient(facts: Sequence[CaseFacts]) -> list[list[CaseFacts]]:
    """The cases of each patient: by the manifest, or by the PatientID of their DICOM files."""
    placeholders = {group[0].person for group in _hidden_by_one_id(facts)}
    group_of: dict[tuple[str, str], tuple[set[tuple[str, str]], list[CaseFacts]]] = {}
    for found in facts:
        keys = {("manifest", found.case.patient)} | (
            {("dicom", found.person)} if found.person and found.person not in placeholders else set()
        )
        joined = {id(group_of[key]): group_of[key] for key in keys if key in group_of}.values()
        group = (
            keys.union(*(known for known, _ in joined)),
            [*(member for _, members in joined for member in members), found],
        )
        group_of.update(dict.fromkeys(group[0], group))
    return [members for _, members in {id(group): group for group in group_of.values()}.values()]


def _hidden_by_one_id(facts: Sequence[CaseFacts]) -> list[list[CaseFacts]]:
    """Cases with one PatientID that may be a placeholder, as anonymizers write them.

    So where most cases bear it, which the manifest takes for three patients or more, for hardly any data set shows one
    person in most of its cases; and where the manifest states that each is another patient.
    """
    bearers: dict[str, list[CaseFacts]] = defaultdict(list)
    for found in facts:
        if found.person:
            bearers[found.person].append(found)
    most = max(2, len(facts) / 2)
    hidden = []
    for group in bearers.values():
        patients = {found.case.patient for found in group}
        are_stated = all(found.case.patient != found.case.id for found in group)  # the id stands where nothing is said
        if len(patients) > most or (are_stated and len(patients) == len(group) > 1):
            hidden.append(group)
    return hidden


def _duplicate_rows(facts: Sequence[CaseFacts], folds: Mapping[str, int]) -> Iterator[Row]:
    for group in duplicates(facts):
        first, *copies = group
        label = "" if same_labels(group) else ", but their labels differ: decide which is right"
        for copy in copies:
            sides = [_side(found, folds) for found in (first, copy)]
            message = f"has the same voxels as {first.case.id}{label}"
            file = str(copy.case.images[0])
            if sides[0] == sides[1]:
                yield Row("W-DUPLICATE-SCAN", f"{message}; remove one", copy.case.id, file)
            else:
                where = f"{message}; {first.case.id} stands in {sides[0]}, {copy.case.id} in {sides[1]}: leakage; remove one"
                yield Row("E-DUPLICATE-SCAN", where, copy.case.id, file, fixable=not label)


def _side(found: CaseFacts, folds: Mapping[str, int]) -> str:
    if found.is_training:
        return f"fold {folds[found.case.id]}" if found.case.id in folds else "training"
    return "test"


def _dims_rows(facts: Sequence[CaseFacts]) -> Iterator[Row]:
    dims = {found.case.id: found.geometry.spatial_dims for found in facts if found.geometry}
    if len(set(dims.values())) < 2:
        return
    usual = Counter(dims.values()).most_common(1)[0][0]
    for found in facts:
        if found.geometry and found.geometry.spatial_dims != usual:
            message = f"{found.geometry.spatial_dims}D data of shape {found.geometry.shape}; most cases are {usual}D"
            yield Row("E-SPATIAL-DIMS", message, found.case.id, str(found.case.images[0]))


def _spacing_rows(facts: Sequence[CaseFacts]) -> Iterator[Row]:
    spacings = {name: spacing for name, spacing in spacings_ras(facts).items() if len(spacing) == 3}
    if len(spacings) < 3:
        return
    logs = np.log(list(spacings.values()))  # (cases, 3): a factor up weighs as much as a factor down
    median = np.median(logs, axis=0)
    deviation = 1.4826 * np.median(np.abs(logs - median), axis=0)
    limit = np.maximum(math.log(MIN_SPACING_FACTOR) - 1e-6, SPACING_DEVIATIONS * deviation)
    file_of = {found.case.id: str(found.case.images[0]) for found in facts}
    for (name, spacing), log in zip(spacings.items(), logs, strict=True):
        far = np.flatnonzero(np.abs(log - median) >= limit)
        if len(far):
            parts = ", ".join(
                f"{spacing[axis]:.3g} mm along {'RAS'[axis]}, {math.exp(log[axis] - median[axis]):.2g} × the median "
                f"{math.exp(median[axis]):.3g}"
                for axis in far
            )
            message = f"{parts}; right unit, right series?"
            yield Row("W-SPACING", message, name, file_of[name])


def _orientation_rows(facts: Sequence[CaseFacts]) -> Iterator[Row]:
    codes = {found.case.id: found.geometry.orientation for found in facts if found.geometry}
    numbers = Counter(codes.values())
    if len(codes) < 4 or len(numbers) < 2:
        return
    usual, how_many = numbers.most_common(1)[0]
    for found in facts:
        code = codes.get(found.case.id)
        rare = code is not None and code != usual and numbers[code] <= max(1, RARE_SHARE * len(codes))
        if rare and how_many > len(codes) / 2:
            message = (
                f"axes point to {code}, but to {usual} in {how_many} of {len(codes)} cases; medseg turns them by the "
                "header, so look whether the header is right"
            )
            yield Row("W-ORIENTATION", message, found.case.id, str(found.case.images[0]))
