"""Which segmentation belongs to which reference: files of one name, or called after a case of a manifest."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from medseg.data.foreign_labels import LabelTranslation
from medseg.data.inputs import BESIDE, MANIFEST_SUFFIX, PROBABILITIES, check_unique, find_cases, manifest_cases
from medseg.data.manifest import Case, Manifest, case_id, read_json
from medseg.data.volume_io import read_label, read_volume
from medseg.errors import DataError
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.wording import counted, listed

log = logging.getLogger("medseg")


@dataclass(frozen=True)
class Pair:
    """A segmentation and what it should be.

    Args:
        case: Their id.
        reference: Label map that an expert drew.
        prediction: Label map to score, or a folder with a file for each organ; None: nothing was predicted.
        image: The scan that the reference was drawn on, where that is known.
        patient: Whose it is, where somebody said.
        probabilities: Those of the prediction, where they stand beside it.
    """

    case: str
    reference: Path
    prediction: Path | None = None
    image: Path | None = None
    patient: str = ""
    probabilities: Path | None = None

    @property
    def files(self) -> dict[str, str | None]:
        """Absolute paths of prediction, reference and image; None where there is none."""
        paths = {"prediction": self.prediction, "reference": self.reference, "image": self.image}
        return {name: str(path.absolute()) if path else None for name, path in paths.items()}

    def read_prediction(self, reference: Volume, translation: LabelTranslation | None) -> tuple[Volume, set[int]]:
        """The label map in the references' values, and the values that were in it and stand for no label.

        Without prediction, all of the reference's grid is background.
        """
        if self.prediction is None:
            return Volume(np.zeros_like(reference.array, np.uint8), reference.geometry), set()
        return translation.read(self.prediction) if translation else (read_label(self.prediction), set())

    def read_probabilities(self, labels: Labels) -> Volume:
        """As the network gave them, (C, I, J[, K]).

        Raises:
            DataError: If they are of other labels.
        """
        assert self.probabilities is not None
        found = read_volume(self.probabilities)
        if len(found.array) != labels.num_outputs:
            message = f"{len(found.array)} channels; expected {labels.num_outputs}, as the labels have it"
            raise DataError("E-PROBABILITIES", message, where=str(self.probabilities))
        return found


@dataclass(frozen=True)
class Unmatched:
    """Cases without counterpart, which are not scored.

    Args:
        predictions: Those that no reference is called like.
        references: Those that should have been predicted.
    """

    predictions: Sequence[str]
    references: Sequence[str]

    def warn(self) -> None:
        """Tell of them, if there are any."""
        if self.predictions:
            number = counted(len(self.predictions), "prediction")
            log.warning("W-UNMATCHED %s without reference, not scored: %s", number, listed(self.predictions))
        if self.references:
            number, hint = counted(len(self.references), "reference"), "--missing-as-empty counts such as missed"
            log.warning("W-UNMATCHED %s without prediction, not scored: %s; %s", number, listed(self.references), hint)


@dataclass(frozen=True)
class References:
    """What predictions are held to.

    Args:
        path: A file, a folder, or a manifest, whose labelled cases count.
        pairs: Each case, yet without its prediction.
        manifest: Where they come from, if it is one.
        split: Part of the manifest; None: all of it.
    """

    path: Path
    pairs: Mapping[str, Pair]
    manifest: Manifest | None = None
    split: str | None = None

    @classmethod
    def find(cls, path: Path, split: str | None = None) -> References:
        """The references that a path means.

        Raises:
            MedsegError: If there are none, or two of one name.
        """
        if path.suffix != MANIFEST_SUFFIX:
            cases = find_cases([path], split=split)
            check_unique(cases)
            return cls(path, {case.id: Pair(case.id, case.images[0]) for case in cases})
        found = read_json(path)
        if "labels" in found and not any(found.get(key) for key in ("training", "test", "phantom")):
            message = f"lists no cases: give the folder of the references (nnU-Net's labelsTr), and --labels {path}"
            raise DataError("E-NO-CASES", message, where=str(path))
        manifest = Manifest.load(path)
        parts = [split] if split else [name for name in ("training", "test") if getattr(manifest, name)]
        cases = [case for part in parts for case in manifest_cases(manifest, part)]
        return cls(path, {case.id: _described(case) for case in cases if case.label}, manifest, split)


def find_pairs(
    predictions: Path,
    references: References,
    *,
    translation: LabelTranslation | None = None,
    missing_as_empty: bool = False,
) -> tuple[list[Pair], Unmatched]:
    """What has a counterpart, in the order of the references, and what has none.

    Nobody said that all cases of a whole manifest should have been predicted: there, a reference without prediction is
    no fault, and only the number of them is told.

    Args:
        predictions: A file, or a folder; whatever else stands in it is left alone.
        references: What they are held to.
        translation: Whose `files`, if any, say what a case's folder of predictions holds.
        missing_as_empty: Whether a reference without prediction is a pair too.

    Raises:
        MedsegError: If nothing belongs together, or predictions cannot be told apart.
    """
    expected, manifest = references.pairs, references.manifest
    predicted = _find_predictions(predictions, translation)
    is_one = predictions.is_file() or bool(translation and translation.files)
    if references.path.is_file() and not manifest and is_one and len(predicted) == 1:
        predicted = dict(zip(expected, predicted.values(), strict=True))  # two files need no common name
    pairs = [
        replace(pair, prediction=predicted[name], probabilities=_beside(predicted[name]))
        for name, pair in expected.items()
        if name in predicted
    ]
    if not pairs:
        raise _nothing_in_common(predicted, references)
    alone = [name for name in predicted if name not in expected]
    absent = [name for name in expected if name not in predicted]
    if missing_as_empty:
        return pairs + [expected[name] for name in absent], Unmatched(alone, [])
    if manifest and references.split is None:
        if absent:
            message = "W-PART predicted and scored: %d of the manifest's %s; --missing-as-empty counts all"
            log.warning(message, len(pairs), counted(len(expected), "case"))
        absent = []
    return pairs, Unmatched(alone, absent)


def nearest(label: Volume, target: Geometry) -> Volume:
    """A label map on another grid, by nearest neighbor; background outside."""
    n = target.spatial_dims
    between = np.linalg.inv(label.geometry.affine) @ target.affine
    array = ndimage.affine_transform(
        label.array[0], between[:n, :n], between[:n, 3], output_shape=target.shape, order=0, mode="constant", cval=0
    )
    return Volume(array[None], target)


def _described(case: Case) -> Pair:
    """A case of a manifest; one that is called like its case has no patient that somebody named."""
    assert case.label is not None
    return Pair(case.id, case.label, image=case.images[0], patient=case.patient if case.patient != case.id else "")


def _find_predictions(path: Path, translation: LabelTranslation | None) -> dict[str, Path]:
    """Label map of each case, or the folder with its organs; probabilities that stand beside label maps are none."""
    if translation and translation.files:
        return translation.find(path)
    cases = [case for case in find_cases([path]) if not case.id.endswith(BESIDE)]
    check_unique(cases)
    return {case.id: case.images[0] for case in cases}


def _beside(prediction: Path) -> Path | None:
    """Its probabilities, as `medseg predict --probabilities` writes them."""
    stem = case_id(prediction)
    path = prediction.with_name(f"{stem}{PROBABILITIES}{prediction.name[len(stem) :]}")
    return path if path.is_file() else None


def _nothing_in_common(predicted: Mapping[str, Path], references: References) -> DataError:
    message = (
        f"no prediction ({listed(predicted, 3)}) is called like a reference ({listed(references.pairs, 3)}); a file must "
        "have its reference's name, whatever the suffix, or its case's id in the manifest: nnU-Net's predictions do, but "
        "of TotalSegmentator's, a folder with a file per organ for each case, --map must say which file is which label, "
        "with lines such as liver: liver"
    )
    return DataError("E-NO-PAIRS", message, where=str(references.path))
