"""`medseg check`: a workflow, a manifest or a folder of scans → every problem with the data, before any work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from medseg.data import phantom
from medseg.data.inputs import MANIFEST_SUFFIX, find_cases
from medseg.data.lint.case import CaseFacts
from medseg.data.lint.draft import Draft, read_draft
from medseg.data.lint.fix import Fixed, check_free, left_out, write_fixed
from medseg.data.lint.rows import Row, row_of, warnings_kept
from medseg.data.lint.whole import (
    Terms,
    examine_manifest,
    examine_scans,
    expected_of,
    folder_rows,
    manifest_rows,
    spacings_ras,
)
from medseg.data.manifest import expand_variables
from medseg.display import progress_bar
from medseg.errors import WorkflowError
from medseg.wording import counted
from medseg.workflow import Workflow

SHOWN_ALIKE = 3
"""Cases that are named of those with the same problem."""

WORKFLOW_SUFFIXES = (".yaml", ".yml")

DECATHLON = "dataset.json"
"""What the manifest of a folder is called."""

SHOWN_CASES = 20
"""Rows of one kind that people see; the JSON has all."""

Result = dict[str, Any]


def check(path: Path, *, fix: Path | None = None) -> Result:
    """Read everything once and tell what is wrong with it.

    Args:
        path: A workflow, a manifest, a folder with its manifest (`DECATHLON`), a folder of scans, or one scan.
        fix: An empty folder for a corrected description of the data set; the originals stay as they are.

    Returns:
        ``manifest, checked, errors, warnings, rows, labels, orientations, spacing_mm, scans, needs, left_out, fixed``;
        `left_out` are the cases that a correction would do without.

    Raises:
        MedsegError: If the workflow or the manifest cannot be read at all, or `fix` cannot be written.
    """
    if fix:
        check_free(fix)
    if path.suffix.lower() in WORKFLOW_SUFFIXES:
        return _check_workflow(path, fix)
    if path.suffix.lower() == MANIFEST_SUFFIX:
        return _check_manifest(path, fix)
    if (path / DECATHLON).is_file():
        return _check_manifest(path / DECATHLON, fix)
    if fix:
        raise WorkflowError("E-FIX", "scans alone have nothing that could be corrected; give a manifest", where="--fix")
    with warnings_kept() as warned:
        cases = find_cases([path])
        rows = [row_of(message) for message in warned.take()]
    facts = examine_scans(cases)
    return _result(facts, [*rows, *folder_rows(facts), *(row for found in facts for row in found.rows)])


def _check_manifest(path: Path, fix: Path | None) -> Result:
    draft = _draft(path)
    expected = expected_of(draft)
    facts = examine_manifest(draft, expected)
    fixed = write_fixed(draft, facts, fix, expected=expected) if fix else None
    return _result(facts, _rows_of_data(draft, facts), draft=draft, fixed=fixed)


def _check_workflow(path: Path, fix: Path | None) -> Result:
    from medseg.build.needs import machine_rows, needs, workflow_rows  # loads torch, which a manifest does without

    plan = Workflow.load(path)
    with plan.blamed("data", "manifest"):
        draft = _draft(plan.file.parent / expand_variables(plan.data.manifest))
    expected = expected_of(
        draft,
        select_volume=plan.data.select_volume,
        assume_spacing_mm=plan.data.assume_spacing_mm,
        allow_missing_slices=plan.data.allow_missing_slices,
    )
    facts = examine_manifest(draft, expected)
    needed = needs(plan, draft.manifest, facts)
    rows = [*workflow_rows(plan, draft.manifest, facts), *machine_rows(plan, needed), *_rows_of_data(draft, facts)]
    fixed = write_fixed(draft, facts, fix, expected=expected) if fix else None
    return _result(facts, rows, draft=draft, fixed=fixed, needs=needed)


def _draft(path: Path) -> Draft:
    """The manifest; the cases of a phantom are made if they are not there."""
    draft = read_draft(path)
    if draft.manifest.phantom:
        with progress_bar() as bar:
            task = bar.add_task("making phantom cases", total=draft.manifest.phantom.get("cases"))
            phantom.make_cases(draft.manifest.root, spec=draft.manifest.phantom, on_case=lambda: bar.advance(task))
    return draft


def _rows_of_data(draft: Draft, facts: Sequence[CaseFacts]) -> list[Row]:
    of_cases = [row for found in facts for row in found.rows]
    return [*draft.rows, *manifest_rows(draft.manifest, Terms.of(draft), facts), *of_cases]


def _result(
    facts: Sequence[CaseFacts],
    rows: Sequence[Row],
    *,
    draft: Draft | None = None,
    fixed: Fixed | None = None,
    needs: Result | None = None,
) -> Result:
    spacings = [spacing for spacing in spacings_ras(facts).values() if len(spacing) == 3]
    return {
        "manifest": str(draft.manifest.path) if draft else None,
        "checked": len(facts),
        "errors": sum(row.severity == "error" for row in rows),
        "warnings": sum(row.severity == "warning" for row in rows),
        "rows": [row.to_dict() for row in _worst_first(rows)],
        "labels": _histogram(facts, Terms.of(draft)) if draft else {},
        "orientations": {
            found.case.id: found.geometry.orientation for found in facts if found.geometry and _is_3d(found)
        },
        "spacing_mm": {
            name: [round(float(s), 4) for s in function(spacings, axis=0)]
            for name, function in (("median", np.median), ("min", np.min), ("max", np.max))
            if spacings
        },
        "scans": {
            found.case.id: {
                "file": str(found.case.images[0]),
                "shape": list(found.geometry.shape),
                "spacing_mm": list(found.geometry.spacing_mm),
                "orientation": found.geometry.orientation if _is_3d(found) else None,
            }
            for found in facts
            if found.geometry
        },
        "needs": needs,
        "left_out": left_out(draft, facts) if draft else (),
        "fixed": fixed.to_dict() if fixed else None,
    }


def _worst_first(rows: Sequence[Row]) -> list[Row]:
    """Errors before warnings, of the whole data set before of cases, the most frequent kind first."""
    number_of = Counter(row.error_id for row in rows)
    whole = {row.error_id for row in rows if row.case is None}
    return sorted(
        rows,
        key=lambda row: (
            row.severity != "error",
            row.error_id not in whole,
            -number_of[row.error_id],
            row.error_id,
            row.case is not None,
        ),
    )


def _histogram(facts: Sequence[CaseFacts], terms: Terms) -> Result:
    """Voxels, volume and cases of each label value, declared ones and others; pictures have no volume."""
    labels = [found.label for found in facts if found.label]
    names = dict(terms.names) | ({terms.ignore_label: "(ignored)"} if terms.ignore_label is not None else {})
    found = sorted({*names, *(value for label in labels for value in label.voxels)})
    has_volume = all(label.geometry.spatial_dims == 3 for label in labels)
    return {
        str(value): {
            "name": names.get(value),
            "voxels": sum(label.voxels.get(value, 0) for label in labels),
            "ml": sum(label.voxels.get(value, 0) * label.geometry.voxel_ml for label in labels) if has_volume else None,
            "cases": sum(value in label.voxels for label in labels),
        }
        for value in found
    }


def check_table(result: Mapping[str, Any]) -> RenderableType:
    """What people see: a line, the problems worst first, the labels, and what was corrected."""
    parts: list[RenderableType] = [Text(_summary(result))]
    if result["rows"]:
        parts.append(_problem_table(result["rows"]))
    if result["rows"] and not result["fixed"] and result["manifest"]:
        parts.append(Text(_fixable_text(result)))
    if result["labels"]:
        parts.append(_label_table(result["labels"]))
    elif result["scans"]:
        parts.append(_scan_table(result["scans"]))
    if result["needs"]:
        parts.append(Text(_needs_text(result["needs"])))
    if result["fixed"]:
        parts.append(Text(_fixed_text(result["fixed"])))
    return Group(*parts)


def _fixable_text(result: Mapping[str, Any]) -> str:
    """What --fix would do about the problems."""
    fixable, unusable = sum(row["fixable"] for row in result["rows"]), len(result["left_out"])
    if not fixable and not unusable:
        return "--fix would correct none of them: only a person can\n" if result["errors"] else ""
    parts = [f"corrects {counted(fixable, 'problem')}"] * bool(fixable)
    parts += [f"leaves out {counted(unusable, 'case')} that cannot be used"] * bool(unusable)
    return f"--fix OUT writes a new description that {' and '.join(parts)}; the files stay as they are\n"


def _summary(result: Mapping[str, Any]) -> str:
    counts = f"{counted(result['errors'], 'error')}, {counted(result['warnings'], 'warning')}"
    lines = [f"{counted(result['checked'], 'case')} checked: {counts}"]
    if result["manifest"]:
        lines.append(f"as {result['manifest']} lists them")
    elif result["checked"] > 1:
        lines.append(
            "NO LABEL WAS LOOKED AT: every file counts as a scan. To check images with their labels, give the manifest "
            "(dataset.json) or the workflow"
        )
    codes = Counter(result["orientations"].values()).most_common()
    if codes:
        lines.append("orientation: " + ", ".join(f"{code} in {number}" for code, number in codes))
    if result["spacing_mm"]:
        low, middle, high = (_spacing(result["spacing_mm"][name]) for name in ("min", "median", "max"))
        reach = f" (median; {low} to {high})" if low != high else ""
        lines.append(f"spacing along R, A, S: {middle} mm{reach}")
    return "\n".join(lines)


def _grouped(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Cases, and what is wrong with them; those of more than `SHOWN_ALIKE` with the same sentence once."""
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        alike.setdefault(row["message"], []).append(row)
    lines = []
    for message, group in alike.items():
        names = list(dict.fromkeys(row["case"] for row in group if row["case"]))
        if len(names) > SHOWN_ALIKE:
            first = f"{len(names)} cases: {', '.join(names[:SHOWN_ALIKE])} …"
            lines.append((first, _short(group[0]).replace(": ", " …: ") + message))
        else:
            lines += [(row["case"] or "–", f"{_short(row)}{message}") for row in group]
    return lines


def _problem_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("problem", Column("case", overflow="fold"), Column("what", overflow="fold"))
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["error_id"], []).append(row)
    for error_id, group in groups.items():
        style = "red" if group[0]["severity"] == "error" else "yellow"
        lines = _grouped(group)
        for n, (cases, what) in enumerate(lines[:SHOWN_CASES]):
            title = Text(f"{error_id}\n{counted(len(group), group[0]['severity'])}" if n == 0 else "", style)
            table.add_row(title, cases, what)
        if len(lines) > SHOWN_CASES:
            table.add_row("", "", f"… and {len(lines) - SHOWN_CASES} more; --json lists all")
        table.add_section()
    return table


def _is_3d(found: CaseFacts) -> bool:
    return found.geometry is not None and found.geometry.spatial_dims == 3


def _short(row: Mapping[str, Any]) -> str:
    """The file a row is about, by its last two names: image and label are often called the same."""
    if not row["file"]:
        return ""
    return "/".join(Path(row["file"]).parts[-2:]) + ": "


def _label_table(labels: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("label", "name", title="labels")
    has_volume = any(found["ml"] is not None for found in labels.values())
    for heading in ("cases", "voxels", *(("ml", "ml a case") if has_volume else ())):
        table.add_column(heading, justify="right")
    undeclared = [value for value, found in labels.items() if found["name"] is None]
    hidden = set(undeclared[SHOWN_CASES:])
    for value, found in labels.items():
        if value in hidden:
            continue
        name = "(not declared)" if found["name"] is None else found["name"]
        volumes = (
            [f"{found['ml']:,.1f}", f"{found['ml'] / found['cases']:,.1f}" if found["cases"] else "–"]
            if has_volume
            else []
        )
        table.add_row(value, name, str(found["cases"]), f"{found['voxels']:,}", *volumes)
    if hidden:
        table.add_row("…", f"{len(hidden)} more, not declared; --json lists all")
    return table


def _scan_table(scans: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(Column("scan", overflow="fold"), "size", "spacing mm", "axes")
    for name, scan in list(scans.items())[:SHOWN_CASES]:
        size = " × ".join(map(str, scan["shape"]))
        table.add_row(name, size, _spacing(scan["spacing_mm"]), scan["orientation"] or "–")
    if len(scans) > SHOWN_CASES:
        table.add_row(f"… and {len(scans) - SHOWN_CASES} more; --json lists all")
    return table


def _needs_text(needs: Mapping[str, Any]) -> str:
    memory = f"{needs['ram_gb']:.2f} GB of memory" if needs["ram_gb"] else "none in memory"
    return (
        f"the training needs, for {needs['cases']} cases: {needs['cache_gb']:.2f} GB on disk in {needs['cache_folder']} "
        f"({needs['free_disk_gb']:.0f} GB free), {memory} (the machine has {needs['machine_ram_gb']:.0f} GB); "
        f"{needs['iterations']:,} iterations of {needs['batch_gb'] * 1000:.1f} MB of patches, {needs['patches_gb']:.0f} GB "
        f"in all. {_hours_text(needs)}"
    )


def _hours_text(needs: Mapping[str, Any]) -> str:
    if needs["hours"] is None:
        return f"How long that takes, tells: {needs['rehearsal']}"
    duration = f"{needs['hours']:.1f} hours" if needs["hours"] >= 1 else f"{60 * needs['hours']:.0f} minutes"
    return (
        f"That takes roughly {duration} ({needs['hours_from']}; validation included, reading not); "
        f"measured with the data: {needs['rehearsal']}"
    )


def _fixed_text(fixed: Mapping[str, Any]) -> str:
    nothing = [] if fixed["changes"] else ["nothing had to be corrected: it says what the original says"]
    lines = [
        f"corrected description: {fixed['manifest']}",
        *nothing,
        *(f"  {change}" for change in fixed["changes"][:SHOWN_CASES]),
    ]
    if len(fixed["changes"]) > SHOWN_CASES:
        lines.append(f"  … and {len(fixed['changes']) - SHOWN_CASES} more; changes.json beside it lists all")
    remaining = [row for row in fixed["remaining"] if row["severity"] == "error"]
    if remaining:
        lines.append("not corrected, for only a person can decide:")
        lines += [f"  {row['error_id']} {row['case'] or ''}: {row['message']}" for row in remaining[:SHOWN_CASES]]
    return "\n".join(lines)


def _spacing(spacing_mm: Sequence[float]) -> str:
    return " × ".join(f"{s:.3g}" for s in spacing_mm)
