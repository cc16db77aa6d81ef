"""A manifest as it can be worked with, and everything that is wrong with it as it stands.

`Manifest.load` stops at the first fault. Here faults that can be mended in memory become rows, and
the rest of the data set is checked all the same:

===================== ==================================================================
E-MANIFEST            a case that is no case; it is left out
E-LABELS              label values with gaps; renumbered
E-DUPLICATE-CASE      two cases of one id; the later ones get a number
E-OUTPUT-NAME         an id that cannot name a file; other characters become ``_``
E-FOLD                a fold that is no whole number, or cases without one among others that have one
W-MANIFEST-KEY        a key that is nearly one that medseg knows
===================== ==================================================================
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from medseg.data.lint.rows import Row
from medseg.data.manifest import LEAVES_ROOT, Manifest, case_id, expand_variables
from medseg.errors import DataError

SPLITS = ("training", "test")

_KEYS = ("labels", "regions", "region_order", "ignore_label", "pairs", "modality", "root", LEAVES_ROOT, *SPLITS)
_ENTRY_KEYS = ("image", "label", "id", "patient", "fold", "sha256")
_KEY_LIKENESS = 0.8  # "ignore_lable" and "pair" are slips, "release" is somebody's own key
_IGNORE_LABEL = 255


@dataclass(frozen=True, eq=False)
class Draft:
    """A manifest whose own faults are mended in memory.

    Args:
        manifest: Ids are unique, label values run 0, 1, 2 …, every entry is a case.
        entries: Of each case id, the entry as the file has it.
        mapping: Label value in the files to label value in `manifest`, for every declared value.
        rows: What was wrong.
        changes: What was mended, a sentence each.
    """

    manifest: Manifest
    entries: Mapping[str, Mapping[str, Any]]
    mapping: Mapping[int, int]
    rows: tuple[Row, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def is_renumbered(self) -> bool:
        return any(old != new for old, new in self.mapping.items())


def read_draft(path: Path) -> Draft:
    """Read a manifest, mending what can be mended.

    Raises:
        DataError: If it is missing, no JSON, or lacks what a manifest needs.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict):
        return _draft(Manifest.load(path), {}, _Notes())  # which says what is wrong
    notes = _Notes([*_key_rows(data, path)])
    data, mapping = _without_gaps(data, path, notes)
    data = _with_usable_cases(data, path, notes)
    return _draft(Manifest.from_dict(data, path), mapping, notes)


@dataclass
class _Notes:
    """What is found, and what is mended, on the way."""

    rows: list[Row] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)


def _draft(manifest: Manifest, mapping: Mapping[int, int], notes: _Notes) -> Draft:
    entries: dict[str, Mapping[str, Any]] = {}
    for split, cases in zip(SPLITS, (manifest.training, manifest.test), strict=True):
        for case, entry in zip(cases, manifest.source.get(split) or (), strict=True):
            entries[case.id] = entry if isinstance(entry, dict) else {"image": entry}
    labels = manifest.labels
    same = {value: value for value in (*labels.names, labels.ignore_label) if value is not None}
    return Draft(manifest, entries, dict(mapping) or same, tuple(notes.rows), tuple(notes.changes))


def _without_gaps(data: dict[str, Any], path: Path, notes: _Notes) -> tuple[dict[str, Any], dict[int, int]]:
    """Label values renumbered 0, 1, 2 … wherever the manifest names them."""
    names = _label_names(data.get("labels"))
    if names is None or set(names) == set(range(len(names))):
        return data, {}
    organs = sorted(value for value in names if value != 0)
    mapping = {0: 0} | {old: new for new, old in enumerate(organs, 1)}
    ignore = data.get("ignore_label")
    if isinstance(ignore, int):
        mapping[ignore] = ignore if ignore > len(organs) else _IGNORE_LABEL
    changed = ", ".join(f"{old} → {new}" for old, new in mapping.items() if old != new) or "add 0, the background"
    message = (
        f"labels {', '.join(map(str, sorted(names)))}; expected 0 (background), 1, 2 … without a gap; "
        f"renumber them in manifest and files: {changed}"
    )
    notes.rows.append(Row("E-LABELS", message, file=str(path), fixable=True))
    notes.changes.append(f"labels are renumbered, in the manifest and in the files that hold them: {changed}")
    renumbered = {
        "labels": {"0": names.get(0, "background")} | {str(mapping[old]): names[old] for old in organs},
        "ignore_label": mapping[ignore] if isinstance(ignore, int) else None,
        "regions": {
            name: [mapping.get(v, v) for v in (values if isinstance(values, list) else [values])]
            for name, values in (data.get("regions") or {}).items()
        },
        "region_order": [mapping.get(v, v) for v in data.get("region_order") or ()],
        "pairs": [[mapping.get(v, v) for v in pair] for pair in data.get("pairs") or ()],
    }
    return {**data, **{key: value for key, value in renumbered.items() if key in data}}, mapping


def _label_names(labels: Any) -> dict[int, str] | None:
    """Value to name, whichever way round they are written; None where `Labels` will say what is wrong."""
    if not isinstance(labels, dict):
        return None
    try:
        names = {int(k): v for k, v in labels.items() if isinstance(v, str)}
        names |= {int(v): str(k) for k, v in labels.items() if not isinstance(v, str)}
    except (TypeError, ValueError):
        return None
    is_sound = len(names) == len(labels) and names and min(names) >= 0 and max(names) > 0
    return names if is_sound else None


def _with_usable_cases(data: dict[str, Any], path: Path, notes: _Notes) -> dict[str, Any]:
    """The manifest without entries that are no cases, and with ids that are unique and can name files."""
    seen: set[str] = set()
    usable: dict[str, Any] = {}
    for split in SPLITS:
        listed = data.get(split) or []
        if not isinstance(listed, list):
            raise DataError("E-MANIFEST", f"{split} must be a list of cases", where=str(path))
        kept = []
        for n, entry in enumerate(listed):
            where = f"{path}: {split}[{n}]"
            fault = _fault(entry)
            if fault:
                notes.rows.append(Row(*fault, file=where, fixable=True))
                notes.changes.append(f"{split}[{n}] is left out: {fault[1]}")
                continue
            kept.append(_named(entry, seen, where, notes))
        usable[split] = kept
    without = [entry for entry in usable["training"] if entry.get("fold") is None]
    if without and len(without) < len(usable["training"]):
        message = f"{len(without)} cases have no fold although others do; give all or none"
        notes.rows.append(Row("E-FOLD", message, file=str(path)))
    return {**data, **usable}


def _fault(entry: Any) -> tuple[str, str] | None:
    """Why an entry is no case: error id and message."""
    entry = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not entry.get("image"):
        return "E-MANIFEST", "a case needs an 'image'"
    images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    for text in (*images, *([entry["label"]] if entry.get("label") else [])):
        if not isinstance(text, str):
            return "E-MANIFEST", f"{text!r} is not a path"
        try:
            expand_variables(text)
        except DataError as error:
            return error.error_id, error.message
    fold = entry.get("fold")
    if fold is not None and (not isinstance(fold, int) or isinstance(fold, bool)):
        return "E-FOLD", f"fold {fold!r} is not a whole number"
    return None


def _named(entry: Any, seen: set[str], where: str, notes: _Notes) -> dict[str, Any]:
    """The entry, its id changed if it cannot name a file or is taken."""
    entry = {"image": entry} if isinstance(entry, str) else entry
    first = entry["image"][0] if isinstance(entry["image"], list) else entry["image"]
    name = given = str(entry.get("id") or case_id(Path(os.path.normpath(expand_variables(first)))))
    if name != Path(name).name or "\\" in name:
        name = re.sub(r"[^\w.-]+", "_", name).strip("._") or "case"
        message = f"case id {given!r} cannot name a file; use one without / and \\, e.g. {name!r}"
        notes.rows.append(Row("E-OUTPUT-NAME", message, given, where, fixable=True))
    if name in seen:
        message = f"two cases are called {name!r}; give each an 'id'"
        notes.rows.append(Row("E-DUPLICATE-CASE", message, name, where, fixable=True))
        name = next(free for n in range(2, len(seen) + 3) if (free := f"{name}_{n}") not in seen)
    seen.add(name)
    if name == given:
        return entry
    notes.changes.append(f"case {given!r} ({first}) is called {name!r}")
    return {**entry, "id": name}


def _key_rows(data: Mapping[str, Any], path: Path) -> Iterator[Row]:
    """Slips in optional keys, which would otherwise be passed over as somebody's own."""
    slips: dict[str, str] = {}
    entries = [entry for split in SPLITS for entry in _list(data.get(split)) if isinstance(entry, dict)]
    for known, used in ((_KEYS, data), (_ENTRY_KEYS, {key: None for entry in entries for key in entry})):
        for key in used:
            close = get_close_matches(str(key), known, n=1, cutoff=_KEY_LIKENESS)
            if key not in known and close and close[0] not in used:
                slips[key] = close[0]
    for key, meant in slips.items():
        yield Row("W-MANIFEST-KEY", f"{key!r} is not read; did you mean {meant!r}?", file=str(path))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
