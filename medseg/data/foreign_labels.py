"""Label maps of other programs: other numbers than the data set's, or a file for each organ.

===================== ==================================================================
E-MAP                 a map that cannot be read as one
E-MAP-LABELS          nothing names the labels that it could map to
E-MAP-LABEL           a map names a label that the data set does not have
E-MAP-VALUE           a map gives one value or file to two labels
E-MAP-FILE            a case lacks the file of an organ
E-MAP-GRID            the files of a case do not stand on one grid
E-LABEL-VALUES        values that no label map holds
===================== ==================================================================
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.data.manifest import case_id
from medseg.data.volume_io import READABLE_SUFFIXES, read_label
from medseg.errors import DataError, GeometryError, MedsegError, Problems, WorkflowError
from medseg.geometry import Volume
from medseg.labels import MAX_LABEL, Labels
from medseg.located_yaml import Positions, read_yaml
from medseg.registry import did_you_mean
from medseg.wording import listed

log = logging.getLogger("medseg")


@dataclass(frozen=True)
class LabelTranslation:
    """From what another program writes to the label values of a data set.

    Args:
        values: Its label value to ours; what is not listed is background.
        files: Its file's name without suffix to the label value of what that file marks; where files overlap, the
            later one lies on top. Either this or `values` is given.
    """

    values: Mapping[int, int] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, labels: Labels | None) -> LabelTranslation:
        """Read a map: YAML or JSON with a line a label, ``liver: 5``, ``kidneys: [2, 3]`` or ``liver: liver``.

        Args:
            path: The file. Names are the data set's; what they stand for are label values, or names of files without
                their suffixes. ``background`` may list what is left out on purpose.
            labels: The data set's; None: nobody described them, and no map can be read.

        Raises:
            WorkflowError: If there are no labels.
            Problems: All that is wrong with it.
        """
        if labels is None:
            message = (
                "nothing names the labels of the references; add --labels MANIFEST, or evaluate against a manifest"
            )
            raise WorkflowError("E-MAP-LABELS", message, where=str(path))
        entries, positions = _read(path)
        problems: list[MedsegError] = []
        value_of = {name: value for value, name in labels.names.items()}
        meant: dict[int | str, str] = {}
        for name, theirs in entries.items():
            where = positions.get((name,), str(path))
            if name not in value_of:
                problems.append(_unknown(name, theirs, labels, where))
                continue
            for one in theirs if isinstance(theirs, list) else [theirs]:
                fault = _fault(one, name, meant, labels)
                if fault:
                    problems.append(WorkflowError(*fault, where=where))
                else:
                    meant[one] = name
        kinds = {type(one) for one in meant}
        if not problems and len(kinds) != 1:
            message = "expected label values only or file names only" if kinds else "names no label"
            problems.append(WorkflowError("E-MAP", message, where=str(path)))
        if problems:
            raise Problems(problems)
        ours = {one: value_of[name] for one, name in meant.items()}
        if str in kinds:
            return cls(files={str(stem): value for stem, value in ours.items()})
        return cls(values={int(theirs): value for theirs, value in ours.items()})

    @property
    def mapped(self) -> set[int]:
        """Our label values that something stands for."""
        return {*self.values.values(), *self.files.values()}

    def organs(self, labels: Labels) -> dict[str, tuple[int, ...]]:
        """Those of the data set's organs that it names with all their label values, with these.

        Raises:
            WorkflowError: If there are none.
        """
        organs = {organ: values for organ, values in labels.organ_values.items() if {*values} <= self.mapped}
        if not organs:
            raise WorkflowError("E-MAP", "names no organ whole, so none can be scored", where="--map")
        if left := [organ for organ in labels.organ_values if organ not in organs]:
            log.warning("W-MAP-ORGANS the map does not name %s: not scored", ", ".join(left))
        return organs

    def find(self, folder: Path) -> dict[str, Path]:
        """The folder of each case that holds a file for an organ: ``FOLDER/case_0/liver.nii.gz`` is ``case_0``.

        Raises:
            Problems: If there are none, or several for a case.
        """
        if not folder.is_dir():
            message = "is no folder; the map names files, so give the folder that holds a folder for each case"
            raise DataError("E-MAP-FILE", message, where=str(folder))
        found: dict[str, list[Path]] = {}
        for parent, _, names in os.walk(folder):
            if any(case_id(Path(name)) in self.files for name in names if name.lower().endswith(READABLE_SUFFIXES)):
                below = Path(parent).relative_to(folder).parts
                found.setdefault(below[0] if below else folder.resolve().name, []).append(Path(parent))
        if not found:
            raise DataError("E-MAP-FILE", f"no folder below holds any of {listed(self.files)}", where=str(folder))
        problems = [
            DataError("E-MAP-FILE", f"{listed(folders)} all hold its organs; keep one", where=f"case {name}")
            for name, folders in sorted(found.items())
            if len(folders) > 1
        ]
        if problems:
            raise Problems(problems)
        return {name: folders[0] for name, folders in sorted(found.items())}

    def read(self, path: Path) -> tuple[Volume, set[int]]:
        """A prediction in the data set's numbers.

        Args:
            path: A label map, or the folder with a file for each organ.

        Returns:
            Label values (1, I, J[, K]), and the program's values that no label of ours stands for: background now.

        Raises:
            DataError: If a file cannot be used, or is missing.
        """
        return (self._united(path), set()) if self.files else self._renumbered(path)

    def _renumbered(self, path: Path) -> tuple[Volume, set[int]]:
        label = read_label(path)
        low, high = int(label.array.min()), int(label.array.max())
        if low < 0 or high > MAX_LABEL:
            message = f"values reach from {low} to {high}; expected labels from 0 to {MAX_LABEL}: is it a segmentation?"
            raise DataError("E-LABEL-VALUES", message, where=str(path))
        table = np.zeros(high + 1, dtype=_type_for(self.values.values()))
        for theirs, ours in self.values.items():
            if theirs <= high:
                table[theirs] = ours
        unknown = {int(value) for value in np.unique(label.array)} - {0, *self.values}
        return Volume(table[label.array], label.geometry), unknown

    def _united(self, folder: Path) -> Volume:
        files = {case_id(file): file for file in _readable(folder)}
        absent = [stem for stem in self.files if stem not in files]
        if absent:
            message = f"lacks {listed(absent)}; predict them too, or take them out of the map"
            raise DataError("E-MAP-FILE", message, where=str(folder))
        united: Volume | None = None
        for stem, value in self.files.items():
            mask = read_label(files[stem])
            if united is None:
                united = Volume(np.zeros_like(mask.array, _type_for(self.files.values())), mask.geometry)
            elif not mask.geometry.matches(united.geometry):
                raise GeometryError("E-MAP-GRID", "stands on another grid than the case's first", str(files[stem]))
            united.array[mask.array != 0] = value
        assert united is not None  # a map names at least one file
        return united


def _read(path: Path) -> tuple[dict[str, Any], Positions]:
    try:
        return read_yaml(path)
    except WorkflowError as error:
        if error.message.startswith("must be a mapping"):
            raise WorkflowError("E-MAP", "must hold lines such as liver: 5 or liver: liver", error.where) from None
        raise WorkflowError(error.error_id.replace("E-WORKFLOW", "E-MAP"), error.message, error.where) from None


def _unknown(name: str, theirs: Any, labels: Labels, where: str) -> WorkflowError:
    names = labels.names.values()
    if theirs in names:
        message = f"{name!r} is no label; it is the other way round: {theirs}: {name}"
    elif name in labels.regions:
        message = f"{name!r} is a region; map the labels that it unites"
    else:
        message = f"no label is called {name!r}{did_you_mean(name, list(names))}"
    return WorkflowError("E-MAP-LABEL", message, where)


def _fault(one: Any, name: str, meant: Mapping[int | str, str], labels: Labels) -> tuple[str, str] | None:
    """What is wrong with a value or a file's name."""
    if isinstance(one, bool) or not isinstance(one, int | str) or one == "":
        found = "nothing" if one in (None, "") else repr(one)
        return (
            "E-MAP",
            f"{name!r}: expected a label value, the name of a file without its suffix, or a list; found {found}",
        )
    if isinstance(one, int) and not 0 <= one <= MAX_LABEL:
        return "E-MAP", f"{name!r}: {one} is no label value; expected 0 to {MAX_LABEL}"
    if one == 0 and name != labels.names[0]:
        return "E-MAP", f"{name!r}: 0 is the background"
    if isinstance(one, str) and (one.lower().endswith(READABLE_SUFFIXES) or one != Path(one).name):
        return "E-MAP", f"{name!r}: expected a file's name without folder and suffix, found {one!r}"
    if one in meant:
        return "E-MAP-VALUE", f"{one!r} stands for {meant[one]!r} and for {name!r}; give it to one"
    return None


def _readable(folder: Path) -> Iterator[Path]:
    for name in sorted(os.listdir(folder)):
        if name.lower().endswith(READABLE_SUFFIXES) and not name.startswith("."):
            yield folder / name


def _type_for(values: Any) -> npt.DTypeLike:
    return np.uint8 if max(values) <= 255 else np.int16
