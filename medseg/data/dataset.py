"""Cases preprocessed once into a cache, and seeded patches read from it.

A cached case is a folder named after the hash of its files and of its preprocessing, so runs share
it and a changed file or setting never meets an old copy. It is written under a temporary name and
renamed: a kill leaves a whole case or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from medseg.data.checks import check_label_values
from medseg.data.manifest import Case
from medseg.data.transforms import Prepared, preprocess
from medseg.data.volume_io import files_of, is_drawn
from medseg.display import track
from medseg.errors import DataError, MedsegError, Problems
from medseg.files import remove_leftovers, sha256_of, temporary_path, write_atomically
from medseg.geometry import Geometry
from medseg.labels import Labels
from medseg.model import Preprocessing

CACHE_FORMAT = 3
VOXELS_PER_CLASS = 10_000
"""Enough for a patch centre anywhere in an organ, few enough to read in a millisecond."""

Patch = dict[str, Any]


class Augment(Protocol):
    """What turns a read patch into a training sample; see `medseg.data.augment`."""

    patch_size: tuple[int, ...]

    def source_size_for(self, seed: int) -> tuple[int, ...]: ...

    def __call__(self, sample: Patch, seed: int) -> Patch: ...


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case on disk.

    Args:
        id: The case's id.
        folder: Holds image.npy (C, I, J, K), label.npy (1, I, J, K), voxels.npz and case.json.
        in_memory: Keep the arrays in memory instead of mapping the files.
    """

    id: str
    folder: Path
    in_memory: bool = False

    @cached_property
    def image(self) -> npt.NDArray[np.floating[Any]]:
        """(C, I, J, K), float16 unless the values need more."""
        return self._load("image.npy")

    @cached_property
    def label(self) -> npt.NDArray[np.integer[Any]]:
        """(1, I, J, K)."""
        return self._load("label.npy")

    @cached_property
    def voxels(self) -> dict[int, npt.NDArray[np.int64]]:
        """For each label value but 0: up to `VOXELS_PER_CLASS` of its voxels, (n, 3)."""
        with np.load(self.folder / "voxels.npz") as stored:
            return {int(value): stored[value] for value in stored.files}

    @cached_property
    def description(self) -> dict[str, Any]:
        """Geometry before and after preprocessing, voxels of each label value, and whether the image shows text."""
        return dict(json.loads((self.folder / "case.json").read_text()))

    @property
    def geometry(self) -> Geometry:
        """The preprocessed grid."""
        return Geometry(tuple(self.description["geometry"]["shape"]), np.array(self.description["geometry"]["affine"]))

    def preloaded(self) -> CachedCase:
        """Itself, its arrays read now where they are to be in memory: worker processes then share them."""
        if self.in_memory:
            _ = self.image, self.label, self.voxels
        return self

    def _load(self, name: str) -> npt.NDArray[Any]:
        return np.load(self.folder / name, mmap_mode=None if self.in_memory else "r", allow_pickle=False)


class CaseCache:
    """Preprocessed cases on disk, shared by runs.

    Args:
        folder: Where the cases are kept; made if need be.
        preprocessing: What is done to them.
        labels: Which label values may occur.
        in_memory: Whether the cases it hands out are read into memory.
    """

    def __init__(self, folder: Path, preprocessing: Preprocessing, labels: Labels, *, in_memory: bool = True) -> None:
        self.folder = folder
        self.preprocessing = preprocessing
        self.labels = labels
        self.in_memory = in_memory
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hashes").mkdir(exist_ok=True)
        remove_leftovers(folder)
        remove_leftovers(folder / "hashes")

    def prepare(self, cases: Sequence[Case], description: str = "preparing cases") -> list[CachedCase]:
        """Preprocess what is not there yet, with a progress bar.

        Raises:
            Problems: All cases that cannot be used, each with its reason.
        """
        problems: list[MedsegError] = []
        ready: list[CachedCase] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading, zlib and numpy let go of the interpreter lock
            for outcome in track(pool.map(self._attempt, cases), description, total=len(cases)):
                if isinstance(outcome, CachedCase):
                    ready.append(outcome.preloaded())
                else:
                    problems.append(outcome)
        if problems:
            raise Problems(problems)
        return ready

    def case(self, case: Case) -> CachedCase:
        """The preprocessed case, made now if it is not there yet."""
        key = self._key(case)
        folder = self.folder / key[:2] / key
        if not (folder / "case.json").exists():
            self._write(case, folder)
        return CachedCase(case.id, folder, self.in_memory)

    def hash_of(self, file: Path) -> str:
        """sha256 of a file, or of the files of a series together, computed once for each of their versions."""
        memory = self.folder / "hashes"
        files = files_of(file)
        if files == (file,):
            return file_hash(file, memory)
        together = "\n".join(file_hash(part, memory) for part in files)
        return hashlib.sha256(together.encode()).hexdigest()

    def _attempt(self, case: Case) -> CachedCase | MedsegError:
        try:
            return self.case(case)
        except MedsegError as error:
            if not error.where or case.id not in error.where:
                error.where = f"case {case.id}" + (f" ({error.where})" if error.where else "")
            return error

    def _key(self, case: Case) -> str:
        hashes = {file: self.hash_of(file) for file in case.files}
        for file, stated in case.sha256.items():
            if hashes[file] != stated:
                raise DataError(
                    "E-SHA256",
                    f"{file} is not the file that the manifest describes (sha256 {hashes[file][:12]}…, "
                    f"stated {stated[:12]}…); fetch it again, or correct the manifest",
                    where=f"case {case.id}",
                )
        parts = [
            *hashes.values(),
            json.dumps(self.preprocessing.to_dict(), sort_keys=True),
            json.dumps([sorted(self.labels.names), self.labels.ignore_label]),
            str(CACHE_FORMAT),
            *(self._drawing_rules(case.images[0], case.label) if case.label and is_drawn(case.label) else []),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def _drawing_rules(self, image: Path, label: Path) -> list[str]:
        """What decides, beside the files' content, the label map that is drawn on a series."""
        labels = self.labels
        rules = [dict(labels.names), dict(labels.structures), list(labels.region_order), labels.seg_threshold]
        names = [file.name for path in (image, label) for file in files_of(path)]  # they pair masks with slices
        return [json.dumps(rules), *names]

    def _write(self, case: Case, folder: Path) -> None:
        prepared = preprocess(case.images, case.label, self.preprocessing, self.labels)
        if prepared.label is None:
            raise DataError("E-MISSING-LABEL", "a training case needs a label", where=f"case {case.id}")
        check_label_values(prepared.label, self.labels)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(self.folder / "case")
        temporary.mkdir()
        try:
            _save(prepared, temporary, self.labels)
            try:
                temporary.rename(folder)
            except OSError:
                if not (folder / "case.json").exists():  # another process may have been first; anything else is a fault
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class PatchDataset(Dataset[Patch]):
    """Training patches; the index alone decides which.

    Args:
        cases: Preprocessed cases.
        augment: Turns a read patch into a sample.
        foreground_ratio: Share of patches centred on an organ: a class drawn uniformly among those
            of the case, then a voxel of it.
        seed: Seed of the run.
        slice_axis: Axis along which a patch is a slice with its neighbours: then every slice has its turn, the
            outermost ones standing in for the neighbours they lack, as at prediction.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        augment: Augment,
        *,
        foreground_ratio: float,
        seed: int,
        slice_axis: int | None = None,
    ) -> None:
        self.cases = list(cases)
        self.augment = augment
        self.foreground_ratio = foreground_ratio
        self.seed = seed
        self.slice_axis = slice_axis

    def __getitem__(self, index: int) -> Patch:
        """Sample `index` of the run: ``image`` float32 (C, I, J, K), ``label`` integer (1, I, J, K), ``case`` its id."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same sums whether a worker or the main process computes them
        try:
            generator = np.random.default_rng([self.seed, index])
            case = self.cases[int(generator.integers(len(self.cases)))]
            center = self._center(case, index, generator)
            seed = int(generator.integers(2**63))
            size = self.augment.source_size_for(seed)  # a rotated patch needs more around it
            image, label = (read_patch(a, center, size, repeated=self.slice_axis) for a in (case.image, case.label))
            sample = {"image": image, "label": label}
            sample = self.augment(sample, seed)
        finally:
            torch.set_num_threads(threads)
        return {**sample, "case": case.id}

    def _center(self, case: CachedCase, index: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        shape = np.array(case.image.shape[1:])
        ratio = self.foreground_ratio
        on_organ = int((index + 1) * ratio) > int(index * ratio)  # every batch has its share, none left to luck
        present = list(case.voxels)
        if on_organ and present:
            voxels = case.voxels[present[int(generator.integers(len(present)))]]
            center = voxels[int(generator.integers(len(voxels)))]
        else:
            center = generator.integers(shape)
        size = list(self.augment.patch_size)
        if self.slice_axis is not None:
            size[self.slice_axis] = 1
        return inside(center, shape, size)


class StepSampler(Sampler[list[int]]):
    """Batches of sample indices from a step on: sample ``step · batch_size + slot``."""

    def __init__(self, first_step: int, last_step: int, *, batch_size: int) -> None:
        self.steps = range(first_step, last_step)
        self.batch_size = batch_size

    def __iter__(self) -> Any:
        for step in self.steps:
            yield list(range(step * self.batch_size, (step + 1) * self.batch_size))

    def __len__(self) -> int:
        return len(self.steps)


def patch_loader(
    dataset: PatchDataset,
    sampler: StepSampler,
    *,
    workers: int,
    pin_memory: bool = False,
    worker_init: Callable[[int], None] | None = None,
) -> DataLoader[Patch]:
    """Batches: ``image`` (B, C, I, J, K), ``label`` (B, 1, I, J, K), ``case`` list of ids."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=worker_init,
    )


def inside(center: npt.NDArray[np.int64], shape: npt.NDArray[np.int64], size: Sequence[int]) -> npt.NDArray[np.int64]:
    """Move a patch's centre so that the patch stays in the volume; where it is larger, to the middle."""
    low = np.asarray(size) // 2
    high = shape - (np.asarray(size) - low)
    return np.where(high < low, shape // 2, np.clip(center, low, np.maximum(low, high)))


def read_patch(
    array: npt.NDArray[Any],
    center: Sequence[int] | npt.NDArray[np.int64],
    size: Sequence[int],
    *,
    repeated: int | None = None,
) -> npt.NDArray[Any]:
    """Copy a patch out of (C, I, J, K), zeros where it hangs over the edge; along the axis `repeated` its last slice."""
    start = np.asarray(center) - np.asarray(size) // 2
    stop = start + np.asarray(size)
    low, high = np.maximum(start, 0), np.minimum(stop, array.shape[1:])
    cut = array[(slice(None), *[slice(a, b) for a, b in zip(low, high, strict=True)])]
    if (low == start).all() and (high == stop).all():
        return np.ascontiguousarray(cut)
    patch = np.zeros((array.shape[0], *size), dtype=array.dtype)
    patch[(slice(None), *[slice(a, b) for a, b in zip(low - start, high - start, strict=True)])] = cut
    if repeated is None:
        return patch
    first, last = (low - start)[repeated], (high - start)[repeated] - 1
    return patch.take(np.arange(size[repeated]).clip(first, last), axis=repeated + 1)


def file_hash(path: Path, memory: Path) -> str:
    """sha256 of a file's content, remembered in a folder under its path, size and modification time."""
    status = path.stat()
    stamp = f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}"
    note = memory / hashlib.sha256(stamp.encode()).hexdigest()[:32]
    try:
        return note.read_text()
    except FileNotFoundError:
        digest = sha256_of(path)
        write_atomically(note, digest.encode())
        return digest


def absent_labels(cases: Iterable[CachedCase], labels: Labels) -> list[str]:
    """Names of the labels that no case has."""
    present = {int(value) for case in cases for value in case.description["voxels"]}
    return [name for value, name in labels.names.items() if value not in present and value != 0]


def _save(prepared: Prepared, folder: Path, labels: Labels) -> None:
    assert prepared.label is not None
    image = prepared.image
    if np.abs(image).max(initial=0) <= np.finfo(np.float16).max:  # values beyond are kept whole rather than cut
        image = image.astype(np.float16)
    label = prepared.label.astype(np.uint8 if prepared.label.max(initial=0) <= 255 else np.int16)
    np.save(folder / "image.npy", image)
    np.save(folder / "label.npy", label)
    voxels, counts = {}, {}
    generator = np.random.default_rng(0)
    for value in np.unique(label):
        where = np.flatnonzero(label[0] == value)
        counts[int(value)] = len(where)
        if value != 0 and value != labels.ignore_label:
            chosen = (
                generator.choice(where, VOXELS_PER_CLASS, replace=False) if len(where) > VOXELS_PER_CLASS else where
            )
            voxels[str(value)] = np.stack(np.unravel_index(chosen, label.shape[1:]), axis=1)
    np.savez(folder / "voxels.npz", **voxels)  # type: ignore[arg-type]  # numpy's stub wants one type for all keywords
    description = {
        "source": prepared.source.to_dict(),
        "geometry": prepared.geometry.to_dict(),
        "voxels": counts,
        "shows_text": prepared.shows_text,
    }
    (folder / "case.json").write_text(json.dumps(description))
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
