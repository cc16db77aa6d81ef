"""The corrections behind `medseg check --fix`: a new description of the data set, the originals untouched.

Corrected is what leaves no choice: numbering, types and names. No voxel is moved: a label map that
stands on another grid than its image is left out, not resampled.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medseg.data.lint.case import CaseFacts, Expected, LabelFacts, mask_mapping
from medseg.data.lint.draft import SPLITS, Draft, read_draft
from medseg.data.lint.rows import Row
from medseg.data.lint.sides import named_pairs
from medseg.data.lint.voxels import exchanged
from medseg.data.lint.whole import (
    Terms,
    duplicates,
    folds_of,
    manifest_rows,
    of_one_patient,
    same_labels,
)
from medseg.data.manifest import Case
from medseg.data.volume_io import is_series, read_label, write_volume
from medseg.display import track
from medseg.errors import DataError
from medseg.files import write_atomically
from medseg.geometry import Volume

MANIFEST = "dataset.json"
CHANGES = "changes.json"
LABELS = "labels"


@dataclass(frozen=True)
class Fixed:
    """What a correction wrote.

    Args:
        manifest: The corrected description.
        changes: What differs from the original, a sentence each.
        left_out: Case id to the reason why it cannot be used.
        mapping: Label value in the original files to label value in the corrected ones.
        remaining: What the data set still has against it, and only a person can decide.
    """

    manifest: Path
    changes: tuple[str, ...]
    left_out: Mapping[str, str]
    mapping: Mapping[int, int]
    remaining: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "manifest": str(self.manifest),
            "changes": list(self.changes),
            "left_out": dict(self.left_out),
            "mapping": {str(old): new for old, new in self.mapping.items()},
            "remaining_errors": sum(row.severity == "error" for row in self.remaining),
            "remaining": [row.to_dict() for row in self.remaining],
        }


def check_free(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Raises:
        DataError: If it does, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError("E-OUTPUT-EXISTS", "is not an empty folder; choose another", where=f"--fix {folder}")


def write_fixed(draft: Draft, facts: Sequence[CaseFacts], folder: Path, *, expected: Expected) -> Fixed:
    """Write a corrected manifest, and the label files that had to change.

    Args:
        draft: The manifest as it was read.
        facts: What its cases hold.
        folder: Empty, or not there yet; it gets dataset.json, changes.json and labels/.
        expected: What the cases were read with.

    Raises:
        DataError: If the folder is not empty, or no training case is left.
    """
    check_free(folder)
    plan = _plan(draft, facts)
    if not any(found.is_training for found in plan.kept):
        reasons = [f"{name}: {reason}" for name, reason in plan.left_out.items()] or [*draft.changes]
        listed = "; ".join(reasons[:3]) or "it lists none"
        raise DataError("E-FIX", f"no training case can be used: {listed}", where=str(draft.manifest.path))
    (folder / LABELS).mkdir(parents=True, exist_ok=True)
    after = [_rewritten(found, draft, plan, folder, expected) for found in track(plan.kept, "writing corrected labels")]
    if not any((folder / LABELS).iterdir()):
        (folder / LABELS).rmdir()
    manifest = _manifest(draft, plan, after)
    changes = [*draft.changes, *plan.changes]
    record = {
        "original": str(draft.manifest.path),
        "changes": changes,
        "left_out": plan.left_out,
        "label_mapping": {str(old): new for old, new in draft.mapping.items()},
    }
    write_atomically(folder / CHANGES, _json(record))
    write_atomically(folder / MANIFEST, _json(manifest))  # last: where it stands, everything it names stands too
    corrected = read_draft(folder / MANIFEST)
    remaining = manifest_rows(corrected.manifest, Terms.of(corrected), after)
    return Fixed(folder / MANIFEST, tuple(changes), plan.left_out, draft.mapping, (*corrected.rows, *remaining))


@dataclass
class _Plan:
    """What will be done: filled while it is worked out."""

    kept: list[CaseFacts] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    folds: dict[str, int] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)


def left_out(draft: Draft, facts: Sequence[CaseFacts]) -> tuple[str, ...]:
    """The cases that a correction would leave out."""
    return tuple(_plan(draft, facts).left_out)


def _plan(draft: Draft, facts: Sequence[CaseFacts]) -> _Plan:
    plan = _Plan()
    for found in facts:
        fault = next((row for row in found.rows if row.severity == "error" and not row.fixable), None)
        if fault:
            plan.left_out[found.case.id] = f"{fault.error_id} {fault.message}"
    usable = [found for found in facts if found.case.id not in plan.left_out]
    for found, original in _leaking_copies(draft, usable):
        plan.left_out[found.case.id] = f"E-DUPLICATE-SCAN has the same voxels and label as {original.case.id}"
    plan.kept = [found for found in usable if found.case.id not in plan.left_out]
    plan.changes += [f"case {name} is left out: {reason}" for name, reason in plan.left_out.items()]
    _join_patients(plan)
    labels = draft.manifest.labels
    declared = {frozenset(pair) for pair in labels.pairs}
    plan.pairs = [(p.left, p.right) for p in named_pairs(labels.names) if frozenset((p.left, p.right)) not in declared]
    plan.changes += [
        f"pairs names {labels.names[a]!r} and {labels.names[b]!r} as left and right" for a, b in plan.pairs
    ]
    return plan


def _leaking_copies(draft: Draft, facts: Sequence[CaseFacts]) -> list[tuple[CaseFacts, CaseFacts]]:
    """Training cases that a test case or an earlier case of another fold repeats; test cases always stay."""
    folds = folds_of(draft.manifest)
    copies = []
    for group in duplicates(facts):
        kept = next((found for found in group if not found.is_training), group[0])
        sides = {(found.is_training, folds.get(found.case.id)) for found in group}
        if same_labels(group) and len(sides) > 1:
            copies += [(found, kept) for found in group if found.is_training and found is not kept]
    return copies


def _join_patients(plan: _Plan) -> None:
    """Give all cases of a patient one name for it, and the fold that most of them have."""
    for group in of_one_patient(plan.kept):
        first, *others = [found.case for found in group]
        for case in others:
            if case.patient != first.patient:
                plan.patients[case.id] = first.patient
                plan.changes.append(f"case {case.id} is of the patient of case {first.id}, as their DICOM files say")
        cases = [found.case for found in group if found.is_training and found.case.fold is not None]
        numbers = Counter(case.fold for case in cases if case.fold is not None)
        fold = min(numbers, key=lambda n: (-numbers[n], n), default=None)
        for case in cases:
            if fold is not None and case.fold != fold:
                plan.folds[case.id] = fold
                plan.changes.append(f"case {case.id} moves from fold {case.fold} to fold {fold}, where its patient is")


def _rewritten(found: CaseFacts, draft: Draft, plan: _Plan, folder: Path, expected: Expected) -> CaseFacts:
    """The case as the corrected manifest has it; its label is written anew if its numbers or its type change."""
    name = found.case.id
    case = replace(
        found.case,
        fold=plan.folds.get(name, found.case.fold),
        patient=plan.patients.get(name, found.case.patient),
    )
    if found.label is None or case.label is None:
        return replace(found, case=case, rows=())
    mask = mask_mapping(found.label, expected)
    mapping = {old: new for old, new in (mask or draft.mapping).items() if old in found.label.voxels and old != new}
    if not mapping and not found.label.is_float:
        return replace(found, case=case, rows=())
    if is_series(case.label):  # its structures have names, and so no numbers that could be wrong
        return replace(found, case=case, label=_facts_after(found.label, mapping), rows=())
    target = folder / LABELS / f"{case.id}.nii.gz"
    label = read_label(case.label, image=case.images[0], assume_spacing_mm=expected.assume_spacing_mm)
    write_volume(target, Volume(exchanged(label.array, mapping), label.geometry))
    changed = ", ".join(f"{old} → {new}" for old, new in mapping.items())
    parts = [f"values {changed}"] if mapping else []
    parts += ["stored as integers instead of floating-point numbers"] if found.label.is_float else []
    plan.changes.append(f"label of case {case.id} is rewritten: {'; '.join(parts)}")
    return replace(found, case=replace(case, label=target), label=_facts_after(found.label, mapping), rows=())


def _facts_after(facts: LabelFacts, mapping: Mapping[int, int]) -> LabelFacts:
    voxels: Counter[int] = Counter()
    for value, count in facts.voxels.items():
        voxels[mapping.get(value, value)] += count
    centers = {mapping.get(value, value): center for value, center in facts.centers_mm.items()}
    return replace(facts, voxels=dict(voxels), centers_mm=centers, is_float=False)


def _manifest(draft: Draft, plan: _Plan, after: Sequence[CaseFacts]) -> dict[str, Any]:
    """The original's own keys, with labels and cases as corrected."""
    original = draft.manifest
    labels = original.labels.to_dict()
    labels["pairs"] += [list(pair) for pair in plan.pairs]
    data = {key: value for key, value in original.source.items() if key not in ("root", "phantom", *labels, *SPLITS)}
    data |= {"name": original.name, "format": 1}
    data |= {key: value for key, value in labels.items() if value not in (None, [], {})}
    if draft.is_renumbered:
        data["label_mapping"] = {str(old): new for old, new in draft.mapping.items()}
    for split, is_training in zip(SPLITS, (True, False), strict=True):
        cases = [found.case for found in after if found.is_training == is_training]
        data[split] = [_entry(case, draft) for case in cases]
        count = "num" + split.capitalize()  # the Decathlon's own
        if count in data:
            data[count] = len(cases)
    return data


def _entry(case: Case, draft: Draft) -> dict[str, Any]:
    entry = dict(draft.entries[case.id])
    images = [str(image) for image in case.images]
    entry |= {"id": case.id, "image": images if isinstance(entry["image"], list) else images[0]}
    if case.patient != case.id:
        entry["patient"] = case.patient
    if case.fold is not None:
        entry["fold"] = case.fold
    if case.label:
        before = next((c.label for c in (*draft.manifest.training, *draft.manifest.test) if c.id == case.id), None)
        is_new = case.label != before
        entry["label"] = f"{LABELS}/{case.label.name}" if is_new else str(case.label)
        if is_new and isinstance(entry.get("sha256"), dict):
            entry["sha256"] = {key: value for key, value in entry["sha256"].items() if key != "label"}
    return entry


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
