"""A data set as one JSON file: cases, labels, patients and folds.

The format is a superset of the Medical Segmentation Decathlon's ``dataset.json`` and of MONAI's
datalists, both of which load as published.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from medseg.data.volume_io import READABLE_SUFFIXES, is_there
from medseg.errors import DataError, MedsegError, Problems
from medseg.labels import Labels
from medseg.registry import did_you_mean

NUM_FOLDS = 5
LEAVES_ROOT = "allow_outside_root"
KEYS = (
    *("name", "format", "labels", "regions", "region_order", "ignore_label", "pairs", "modality", "channel_names"),
    *(
        "structures",
        "seg_threshold",
        "root",
        LEAVES_ROOT,
        "training",
        "test",
        "phantom",
        "licence",
        "source",
        "download",
    ),
)

log = logging.getLogger("medseg")


@dataclass(frozen=True)
class Case:
    """One scan and, where somebody drew one, its label map.

    Args:
        id: Unique name within the manifest; names outputs and table rows.
        images: One file with all channels, or one file a channel.
        label: The label map; None for scans to predict.
        patient: Who it is; a patient's cases never stand on both sides of a fold.
        fold: The fold in which this case is held out; None: medseg assigns it.
        sha256: What the manifest states about its files; they are refused if they are others.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str
    fold: int | None = None
    sha256: Mapping[Path, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.images, self.label) if self.label else self.images


@dataclass(frozen=True)
class Manifest:
    """A data set.

    Args:
        name: What it is called.
        path: The file it was read from.
        labels: The label map.
        channels: What each channel is, e.g. ``("CT",)``.
        training: Cases with labels.
        test: Cases that are never trained on.
        root: The folder that relative paths start from.
        outside: Case id to those of its files that the manifest may not name, see `check_root`.
        phantom: How to make the cases, for synthetic data sets.
        source: The JSON as it was read.
    """

    name: str
    path: Path
    labels: Labels
    channels: tuple[str, ...]
    training: tuple[Case, ...]
    test: tuple[Case, ...]
    root: Path
    outside: Mapping[str, tuple[Path, ...]] = field(default_factory=dict, repr=False)
    phantom: Mapping[str, Any] | None = None
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            DataError: If it is missing, not JSON, or lacks what a manifest needs.
            Problems: If it names files outside its root, see `check_root`.
        """
        manifest = cls.from_dict(read_json(path), path)
        manifest.check_root()
        return manifest

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: Path) -> Manifest:
        """The manifest that some JSON is, wherever its paths lead.

        Args:
            data: The JSON.
            path: The file that it stands in; relative paths start from its folder.

        Raises:
            DataError: If it lacks what a manifest needs.
        """
        _warn_of_typos(data, path)
        missing = [key for key in ("labels", "training") if key not in data]
        if missing:
            hints = "".join(did_you_mean(key, data) for key in missing[:1])
            raise DataError("E-MANIFEST", f"lacks {' and '.join(map(repr, missing))}{hints}", where=str(path))
        if data.get("format", 1) != 1:
            raise DataError("E-MANIFEST", f"has format {data['format']}; this version reads format 1", where=str(path))
        try:
            labels = Labels.from_dict(data)
        except DataError as error:
            raise DataError(error.error_id, error.message, where=str(path)) from None
        except (TypeError, ValueError, AttributeError):
            raise DataError("E-LABELS", _labels_advice(data["labels"]), where=str(path)) from None
        root = _root(data, path)
        modality = data.get("modality") or data.get("channel_names") or {"0": "image"}
        channels = tuple(modality.values()) if isinstance(modality, dict) else tuple(modality)
        may_leave = data.get(LEAVES_ROOT, False)
        if not isinstance(may_leave, bool):
            raise DataError("E-MANIFEST", f"{LEAVES_ROOT} must be true or false, found {may_leave!r}", where=str(path))
        entries = {split: _entries(data, split, path) for split in ("training", "test")}
        names = iter(case_ids([*entries["training"], *entries["test"]]))
        cases: dict[str, tuple[Case, ...]] = {}
        outside: dict[str, tuple[Path, ...]] = {}
        for split, listed in entries.items():
            cases[split] = tuple(
                _case(entry, next(names), root, f"{path}: {split}[{n}]") for n, entry in enumerate(listed)
            )
            for case, entry in zip(cases[split], listed, strict=True):
                outside[case.id] = () if may_leave else _outside(case, entry, root, is_stated=bool(data.get("root")))
        manifest = cls(
            name=str(data.get("name") or path.stem),
            path=path,
            labels=labels,
            channels=channels,
            training=cases["training"],
            test=cases["test"],
            root=root,
            outside=outside,
            phantom=data.get("phantom"),
            source=data,
        )
        return _with_unique_ids(manifest)

    def check_root(self) -> None:
        """Refuse files outside the root, all at once, unless the manifest says that it may name them.

        A root that the manifest states holds all of its files. Without one, its own folder is the root of relative
        paths, and no ``..`` leads out of it; an absolute path then is as plain as a root, and what medseg itself
        writes. Links may lead anywhere: clusters keep the scans themselves elsewhere.

        Raises:
            Problems: If there are any.
        """
        message = self.why_not_outside
        problems = [
            DataError("E-OUTSIDE-ROOT", f"{file} {message}", where=f"case {name}")
            for name, files in self.outside.items()
            for file in files
        ]
        if problems:
            raise Problems(problems)

    @property
    def why_not_outside(self) -> str:
        """What is wrong with the files of `outside`, and what to do."""
        return (
            f"lies outside {os.path.normpath(self.root)}, the root of this manifest; correct the path or the root, or, "
            f'if it is meant, add "{LEAVES_ROOT}": true to {self.path.name}'
        )

    def check_files(self, cases: Sequence[Case] | None = None) -> None:
        """Report every missing file and every training case without a label, all at once.

        Args:
            cases: Those whose files are looked for; None: all.

        Raises:
            Problems: If there are any.
        """
        problems: list[MedsegError] = []
        for case in cases if cases is not None else (*self.training, *self.test):
            for file in case.files:
                if not is_there(file):
                    problems.append(
                        DataError(
                            "E-MISSING-FILE", f"{file} does not exist; check root and paths", where=f"case {case.id}"
                        )
                    )
        for case in self.training:
            if case.label is None:
                problems.append(
                    DataError(
                        "E-MISSING-LABEL", "a training case needs a label; move it to test", where=f"case {case.id}"
                    )
                )
        if problems:
            raise Problems(problems)

    def split(self, fold: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
        """The cases to train on and the cases held out.

        Folds come from the manifest; where it gives none, by nnU-Net's rule over sorted patients.

        Raises:
            DataError: If the fold does not exist, leaves no case on a side, or splits a patient.
        """
        folds = self.folds()
        validation = tuple(case for case in self.training if folds[case.id] == fold)
        training = tuple(case for case in self.training if folds[case.id] != fold)
        if not validation or not training:
            known = sorted(set(folds.values()))
            raise DataError(
                "E-FOLD",
                f"fold {fold} holds out {len(validation)} of {len(self.training)} cases; folds here: {known}, "
                "and at least one case must stay on each side",
                where=str(self.path),
            )
        held_out = {case.patient for case in validation}
        shared = [case.id for case in training if case.patient in held_out]
        if shared:  # told by their cases: a patient's name belongs in no message
            raise DataError(
                "E-LEAKAGE",
                f"patients stand on both sides of fold {fold}: those of cases {shared[:5]} are held out too; give all "
                "cases of a patient the same fold",
                where=str(self.path),
            )
        return training, validation

    def folds(self) -> dict[str, int]:
        """The fold of each training case, by case id."""
        given = {case.id: case.fold for case in self.training if case.fold is not None}
        if given and len(given) < len(self.training):
            without = [case.id for case in self.training if case.fold is None]
            raise DataError(
                "E-FOLD", f"cases {without[:5]} have no fold although others do; give all or none", where=str(self.path)
            )
        if given:
            return given
        fold_of = assign_folds([case.patient for case in self.training])
        return {case.id: fold_of[case.patient] for case in self.training}

    def patient_numbers(self) -> dict[str, str]:
        """What patients are called in everything that is written: names belong in none of it."""
        patients = dict.fromkeys(case.patient for case in (*self.training, *self.test))
        return {patient: f"{number:04d}" for number, patient in enumerate(patients)}

    def to_dict(self, hashes: Mapping[Path, str] | None = None) -> dict[str, Any]:
        """The manifest with everything spelled out: absolute paths, folds, file hashes, and patients as numbers."""
        folds = self.folds() if self.training else {}
        number_of = self.patient_numbers()

        def entry(case: Case) -> dict[str, Any]:
            images = [str(image) for image in case.images]
            full: dict[str, Any] = {
                "id": case.id,
                "patient": number_of[case.patient],
                "image": images if len(images) > 1 else images[0],
            }
            if case.label:
                full["label"] = str(case.label)
            if case.id in folds:
                full["fold"] = folds[case.id]
            if hashes:
                full["sha256"] = {
                    "image": [hashes[image] for image in case.images if image in hashes],
                    **({"label": hashes[case.label]} if case.label and case.label in hashes else {}),
                }
            return full

        return {
            "name": self.name,
            "format": 1,
            **self.labels.to_dict(),
            "modality": {str(n): channel for n, channel in enumerate(self.channels)},
            "training": [entry(case) for case in self.training],
            "test": [entry(case) for case in self.test],
        }


def assign_folds(patients: Sequence[str], num_folds: int = NUM_FOLDS) -> dict[str, int]:
    """Patient to fold, as nnU-Net splits, so that cross-validated results compare.

    Equals scikit-learn's ``KFold(num_folds, shuffle=True, random_state=12345)`` over the sorted
    patients; with fewer patients than folds, each is a fold of its own.
    """
    names = sorted(set(patients))
    order = np.arange(len(names))
    np.random.RandomState(12345).shuffle(order)
    parts = np.array_split(order, min(num_folds, len(names)))
    return {names[index]: fold for fold, part in enumerate(parts) for index in part}


def case_id(image: Path) -> str:
    """File name without its suffix: ``liver_012.nii.gz`` is case ``liver_012``."""
    for suffix in READABLE_SUFFIXES:
        if image.name.lower().endswith(suffix):
            return image.name[: -len(suffix)]
    return image.stem


def told_apart(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Names, those that several share preceded by the folders that tell their files apart.

    ``STS_008/CT/image.nii.gz`` and ``STS_009/CT/image.nii.gz``: ``STS_008_CT_image`` and ``STS_009_CT_image``.

    Args:
        names: Of each file, without folders.
        paths: The files, as absolute paths.
    """
    numbers = Counter(names)
    if len(numbers) == len(names):
        return list(names)
    shared = os.path.commonpath([path.parent for path, name in zip(paths, names, strict=True) if numbers[name] > 1])
    return [
        "_".join((*path.parent.relative_to(shared).parts, name)) if numbers[name] > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]


def case_ids(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ids of a manifest's cases: as stated, or from their first image, see `told_apart`."""
    unnamed = [entry for entry in entries if not entry.get("id")]
    images = [Path(os.path.normpath("/" / Path(expand_variables(_images(entry)[0])))) for entry in unnamed]
    names = iter(told_apart([case_id(image) for image in images], images))
    return [str(entry.get("id") or next(names)) for entry in entries]


def cache_folder() -> Path:
    """Where medseg keeps what it can make again: ``$MEDSEG_CACHE``, else ``~/.cache/medseg``."""
    chosen = os.environ.get("MEDSEG_CACHE")
    return (
        Path(chosen).expanduser()
        if chosen
        else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "medseg"
    )


def expand_variables(text: str, where: str | None = None) -> str:
    """Replace ``${NAME}`` by the environment's value.

    Raises:
        DataError: If a variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise DataError(
                "E-VARIABLE",
                f"{text!r} needs the environment variable {name}; set it, e.g. {name}=/path/to/data",
                where=where,
            )
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, text)


def read_json(path: Path) -> dict[str, Any]:
    """What a manifest's file holds.

    Raises:
        DataError: If it is missing or no JSON object.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        near = [other.name for other in path.parent.glob("*.json")] if path.parent.is_dir() else []
        hint = (
            did_you_mean(path.name, near)
            if near
            else f"; its folder {'has no .json file' if path.parent.is_dir() else 'does not exist'}"
        )
        raise DataError("E-MANIFEST", f"cannot be read ({error.strerror}){hint}", where=str(path)) from None
    except ValueError as error:
        raise DataError("E-MANIFEST", f"is not JSON: {error}", where=str(path)) from None
    if not isinstance(data, dict):
        raise DataError("E-MANIFEST", "must be a JSON object with labels and training", where=str(path))
    return data


def _warn_of_typos(data: Mapping[str, Any], path: Path) -> None:
    """Published manifests hold many keys that nobody reads, so only one that nearly is one of ours is worth a word."""
    for key in ("validation", "testing"):
        if data.get(key):
            log.warning(
                "W-MANIFEST-KEY %s: %r is ignored; list its cases in training, with a fold, or in test", path, key
            )
    for key in set(data).difference(KEYS, ("validation", "testing")):
        close = get_close_matches(key, [known for known in KEYS if known not in data], n=1, cutoff=0.75)
        if close:
            log.warning("W-MANIFEST-KEY %s: %r is ignored; did you mean %r?", path, key, close[0])


def _labels_advice(labels: Any) -> str:
    """What to write instead of labels that tell no numbers."""
    like = 'labels must look like {"0": "background", "1": "liver"}'
    if not isinstance(labels, dict):
        return f"{like}; found {labels!r}"
    for name, value in labels.items():
        if isinstance(value, str) and value.isdecimal() and not name.isdecimal():
            return f'{like}; for {{"{name}": "{value}"}} write {{"{value}": "{name}"}}, the number first'
    wrong = next((name for name, value in labels.items() if isinstance(value, str) and not name.isdecimal()), None)
    return f"{like}; {wrong!r} is no number" if wrong is not None else like


def _root(data: Mapping[str, Any], path: Path) -> Path:
    if data.get("phantom"):
        digest = hashlib.sha256(json.dumps(data["phantom"], sort_keys=True).encode()).hexdigest()[:12]
        return cache_folder() / "phantom" / f"{data.get('name') or path.stem}-{digest}"
    return path.parent.absolute() / expand_variables(str(data.get("root") or "."), str(path))


def _entries(data: Mapping[str, Any], split: str, path: Path) -> list[Mapping[str, Any]]:
    """The cases of a split as objects whose paths are texts."""
    entries: list[Mapping[str, Any]] = []
    for n, entry in enumerate(data.get(split) or []):
        where = f"{path}: {split}[{n}]"
        entry = {"image": entry} if isinstance(entry, str) else entry  # the Decathlon lists its test scans as paths
        if not isinstance(entry, dict) or not entry.get("image"):
            raise DataError("E-MANIFEST", "a case needs an 'image'", where=where)
        for text in (*_images(entry), *filter(None, [entry.get("label")])):
            if not isinstance(text, str):
                raise DataError("E-MANIFEST", f"{text!r} is not a path", where=where)
            expand_variables(text, where)
        entries.append(entry)
    return entries


def _case(entry: Mapping[str, Any], name: str, root: Path, where: str) -> Case:
    images = tuple(_path(root, image) for image in _images(entry))
    label = _path(root, entry["label"]) if entry.get("label") else None
    fold = entry.get("fold")
    if fold is not None and not isinstance(fold, int):
        raise DataError("E-FOLD", f"fold {fold!r} is not a whole number", where=where)
    sha256 = _stated_hashes(entry.get("sha256"), images, label, where)
    return Case(name, images, label, str(entry.get("patient") or name), fold, sha256)


def _images(entry: Mapping[str, Any]) -> list[Any]:
    return entry["image"] if isinstance(entry["image"], list) else [entry["image"]]


def _outside(case: Case, entry: Mapping[str, Any], root: Path, *, is_stated: bool) -> tuple[Path, ...]:
    """The files of a case that its manifest may not name, see `Manifest.check_root`."""
    texts = [*_images(entry), *filter(None, [entry.get("label")])]
    return tuple(
        file
        for file, text in zip(case.files, texts, strict=True)
        if (is_stated or not os.path.isabs(expand_variables(text))) and not _is_below(file, root)
    )


def _is_below(file: Path, folder: Path) -> bool:
    """By its path or, where that has links in it, by where it is."""
    by_path = file.is_relative_to(os.path.normpath(folder))
    return by_path or Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))


def _stated_hashes(stated: Any, images: Sequence[Path], label: Path | None, where: str) -> dict[Path, str]:
    """``"sha256": {"image": "…" or ["…", …], "label": "…"}``; a bare text is the image's."""
    given = stated if isinstance(stated, dict) else {"image": stated} if stated else {}
    of_images = given.get("image") or []
    of_images = of_images if isinstance(of_images, list) else [of_images]
    if len(of_images) not in (0, len(images)):
        raise DataError("E-MANIFEST", f"{len(of_images)} sha256 for {len(images)} image files", where=where)
    known = dict(zip(images, of_images, strict=False))
    if label and given.get("label"):
        known[label] = given["label"]
    return {path: str(digest).lower() for path, digest in known.items()}


def _path(root: Path, text: str) -> Path:
    return Path(os.path.normpath(root / expand_variables(text)))


def _with_unique_ids(manifest: Manifest) -> Manifest:
    seen: dict[str, Case] = {}
    for case in (*manifest.training, *manifest.test):
        if case.id in seen:
            raise DataError(
                "E-DUPLICATE-CASE",
                f"two cases are called {case.id!r} ({seen[case.id].images[0]} and {case.images[0]}); give each an 'id'",
                where=str(manifest.path),
            )
        seen[case.id] = case
    return manifest
