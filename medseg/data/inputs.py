"""What a person names on the command line (files, folders, manifests) as cases."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from medseg.data.manifest import Case, Manifest, case_id, told_apart
from medseg.data.volume_io import PICTURE_SUFFIXES, READABLE_SUFFIXES
from medseg.errors import DataError, MedsegError, Problems, WorkflowError
from medseg.registry import did_you_mean

MANIFEST_SUFFIX = ".json"

PROBABILITIES = "_probabilities"
"""Appended to a case's id, names the file of its probabilities, beside its segmentation."""

ENTROPY = "_entropy"
"""The same for the entropies of its voxels."""

BESIDE = (PROBABILITIES, ENTROPY)
"""What stands beside segmentations and is none."""


def find_cases(inputs: Sequence[Path], *, split: str | None = None) -> list[Case]:
    """The cases that the inputs mean.

    Scans whose files share a name are told apart by their folders, see `told_apart`; those of manifests come last.

    Args:
        inputs: Files, folders (searched recursively) and manifests, in any mixture.
        split: Part of a manifest, see `manifest_cases`; None: its test cases, or all where it has none.

    Raises:
        Problems: Inputs that do not exist, and folders without scans.
        DataError: If a manifest cannot be used.
        WorkflowError: If a split is asked for that no manifest has.
    """
    absent = [path for path in inputs if not path.exists()]
    if absent:
        raise Problems([DataError("E-MISSING-FILE", "does not exist", where=str(path)) for path in absent])
    manifests = [path for path in inputs if path.suffix == MANIFEST_SUFFIX]
    if split and not manifests:
        raise WorkflowError("E-SPLIT", f"{split!r} is part of a manifest, but the input is none", where="--split")
    described: list[Case] = []
    found: list[Case] = []
    for path in inputs:
        if path in manifests:
            manifest = Manifest.load(path)
            described += manifest_cases(manifest, split or ("test" if manifest.test else "training"))
        else:
            found += _folder_cases(path) if path.is_dir() else [_file_case(path, case_id(path))]
    names = told_apart([case.id for case in found], [Path(os.path.abspath(case.images[0])) for case in found])
    return [
        *(replace(case, id=name, patient=name) for case, name in zip(found, names, strict=True)),
        *described,
    ]


def manifest_cases(manifest: Manifest, split: str) -> tuple[Case, ...]:
    """Part of a manifest; the cases of a phantom are made if they are not there.

    Args:
        manifest: The data set.
        split: ``training``, ``test``, or ``fold_N``: the cases held out in fold N.

    Raises:
        WorkflowError: If there is no such part.
    """
    if manifest.phantom:
        from medseg.data import phantom  # SciPy takes a while to import

        phantom.make_cases(manifest.root, spec=manifest.phantom)
    parts = {"training": manifest.training, "test": manifest.test}
    known = [name for name, cases in parts.items() if cases]
    if split in known:
        return parts[split]
    known += [f"fold_{fold}" for fold in sorted(set(manifest.folds().values()))]
    if split not in known:
        raise WorkflowError("E-SPLIT", f"{manifest.path} has no {split!r}{did_you_mean(split, known)}", where="--split")
    return manifest.split(int(split.removeprefix("fold_")))[1]


def check_unique(cases: Sequence[Case]) -> None:
    """Refuse cases that share an id, for their outputs would share a name, and ids that are no file name.

    Raises:
        Problems: If there are any.
    """
    problems: list[MedsegError] = []
    number_of = Counter(case.id for case in cases)
    for name, number in number_of.items():
        if number > 1:
            files = [str(case.images[0]) for case in cases if case.id == name]
            message = f"{' and '.join(files)} would both be called {name!r}"
            remedy = "move one of them into a folder of its own, or give a manifest with ids"
            if len(set(files)) == 1:
                message, remedy = f"{files[0]} is given {number} times", "give it once"
            problems.append(DataError("E-OUTPUT-NAME", f"{message}; {remedy}"))
        if name != Path(name).name:
            problems.append(DataError("E-OUTPUT-NAME", f"case id {name!r} is no file name; change it in the manifest"))
    if problems:
        raise Problems(problems)


def _folder_cases(folder: Path) -> list[Case]:
    """Every scan below a folder, called after its file.

    Pictures count where there is nothing else: beside scans they are previews and screenshots.
    """
    files = sorted(_scans(folder))
    volumes = [path for path in files if not path.name.lower().endswith(PICTURE_SUFFIXES)]
    series = _series_cases(folder)
    num_pictures, num_scans = len(files) - len(volumes), len(volumes) + len(series)
    if num_pictures and num_scans:
        logging.getLogger("medseg").warning(
            "W-PICTURES %s: %d pictures beside %d scans are passed over; name them to use them",
            folder, num_pictures, num_scans,
        )  # fmt: skip
    files = files if not num_scans else volumes
    if not (files or series):
        known = ", ".join(READABLE_SUFFIXES)
        raise DataError("E-NO-INPUT", f"holds no {known} file and no DICOM series", where=str(folder))
    return [*(_file_case(path, case_id(path)) for path in files), *series]


def _series_cases(folder: Path) -> list[Case]:
    """Every DICOM series below a folder, called after the folder that holds its files.

    Nothing that the files say of the patient becomes a name; series that share a folder are told apart by
    modality and a digest of their uid.
    """
    from medseg.data.dicom.folder import find_series  # pydicom takes a while to import

    found = find_series(folder).series
    shared = Counter(series.home for series in found)
    cases = []
    for series in found:
        names = series.home.relative_to(folder).parts or (folder.resolve().name,)
        if shared[series.home] > 1:
            names = (*names, series.modality, hashlib.sha256(series.name.encode()).hexdigest()[:8])
        cases.append(_file_case(series.path, "_".join(names)))
    return cases


def _scans(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):  # does not follow links, so loops of them do no harm
        for name in names:
            if name.lower().endswith(READABLE_SUFFIXES) and not name.startswith("."):
                yield Path(parent) / name


def _file_case(path: Path, name: str) -> Case:
    return Case(name, (path,), None, name)
