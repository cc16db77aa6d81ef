"""`medseg predict`: a model and scans become segmentations on the scans' own grids."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medseg.batch.isolated import isolated
from medseg.batch.ledger import LEDGER, Job, Ledger, only_writer, worker_name
from medseg.batch.local import places, run_local
from medseg.batch.progress import watched
from medseg.batch.worker import Place, work
from medseg.data.inputs import ENTROPY, PROBABILITIES, check_unique, find_cases
from medseg.data.manifest import Case
from medseg.data.volume_io import WRITABLE_SUFFIXES, read_geometry, write_volume
from medseg.display import track
from medseg.errors import DataError, MedsegError, Problems, WorkflowError
from medseg.files import remove_leftovers, temporary_path
from medseg.metrics.volume import organ_volumes, volumes_by_value
from medseg.model import Crop, load_spec
from medseg.reporting.page import REPORT
from medseg.reporting.prediction import SUMMARY, summary_row, write_summary
from medseg.tracking.models import is_registered, model_folder
from medseg.training.signals import ending_work

if TYPE_CHECKING:
    from medseg.data.transforms import Prepared
    from medseg.inference.predictor import Predictor, Segmentation

Result = dict[str, Any]
Executor = Literal["here", "local", "ray", "slurm"]

_MOST_READ = 50
"""Label maps that are read for the page, where the ledger does not tell their volumes as their worker was killed."""

_PRELOAD = ("medseg.build.model",)
"""What takes long to import, done once for all processes of a batch."""

_TOLD = (
    "windows", "windows_in_air", "network_seconds", "volumes", "unit", "crf", "uncertainty", "uncertainties",
    "agreement",
)  # fmt: skip
"""What an entry says of a segmentation besides its seconds, where it is known."""

log = logging.getLogger("medseg")


def predict(
    model: str | Sequence[str],
    inputs: Path | str | Sequence[Path | str],
    *,
    output: Path | str,
    format: str = "nii.gz",
    split: str | None = None,
    overlap: float | None = None,
    crop: Crop | None = None,
    tta: bool | None = None,
    prune: int | None = None,
    probabilities: bool = False,
    uncertainty: bool = False,
    entropy: bool = False,
    device: str = "auto",
    workers: int = 0,
    executor: Executor = "here",
    address: str | None = None,
    slurm: Mapping[str, str] | None = None,
    resume: bool = False,
    force: bool = False,
    report: bool = False,
    dry_run: bool = False,
    tracking_uri: str | None = None,
) -> Result:
    """Segment scans. A scan that cannot be segmented is listed and does not stop the others.

    Args:
        model: A model folder, a run folder, an MLflow run id, or a registered model as ``models:/name@alias``; of a
            cross-validation's run folder all folds are averaged. Or several of them, all averaged.
        inputs: Files, folders (searched recursively) and manifests.
        output: Folder for the segmentations, made if need be; each is called after its case.
        format: ``nii.gz``, ``nii``, ``nrrd`` or ``mha``; for pictures ``png`` too.
        split: Part of a manifest: ``training``, ``test`` or ``fold_N``; None: its test cases, or all
            where it has none.
        overlap: Share of a window that the next one covers again, instead of the model's.
        crop: Which windows are spared, see `medseg.model.Window`; instead of the model's.
        tta: Average over mirrored copies, along the axes that the model names, or all if it names none; or predict
            without. None: as the model says.
        prune: Stop a UNet++ that was trained with deep supervision at this level, which is faster.
        probabilities: Write the network's probabilities too.
        uncertainty: Say of each case how unsure its segmentation is, to look at the least sure ones first.
        entropy: Write the entropy of each voxel too, in percent.
        device: ``auto``, ``cpu`` or ``cuda``.
        workers: Processes, actors or tasks that segment at once, each with the model in memory; 0: one for each GPU of
            this machine, or one. Each reads the next scan and writes the last one while it computes.
        executor: ``here``: in this process; ``local``: in processes of this machine, so that a scan that kills its
            process is one failure among the others; ``ray``, ``slurm``: on a cluster, see `medseg.batch`.
        address: Of a Ray cluster; None: one that is made on this machine for now.
        slurm: Options of the Slurm jobs, see `medseg.batch.slurm_executor`.
        resume: Go on with what an earlier call began with the same model and options, and pass over cases whose
            segmentation is there.
        force: Begin anew, overwrite segmentations that are there, and segment scans of another modality than the model's.
        report: Of several scans, make a page in the end, see `medseg.reporting.batch_page`; one that fails is only told.
        dry_run: Load the model, say what would be segmented, and stop.
        tracking_uri: Where to look for run ids.

    Returns:
        ``done`` (each with case, input, output, seconds, and what else is known: windows, windows_in_air,
        network_seconds, volumes of the organs with their unit, crf, uncertainty, uncertainties, agreement), ``failed``
        (case, input, error_id, message), ``skipped`` (ids that `resume` passed over), ``seconds``, ``summary``, the
        table of all cases, and ``report``, their page, if there is one; of a dry run ``planned`` instead, with
        windows, seconds in the network and gigabytes of each.

    Raises:
        MedsegError: If work cannot begin.
    """
    started = time.monotonic()
    paths = [Path(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    output = Path(output)
    _check_arguments(format, overlap, output, resume=resume, force=force, with_maps=probabilities or entropy)
    _check_executor(executor, address, slurm)
    cases = find_cases(paths, split=split)
    check_unique(cases)
    models = tuple(  # found once: the alias may be given to another version while scans are segmented
        str(model_folder(name, tracking_uri)) if is_registered(name) else name
        for name in ([model] if isinstance(model, str) else model)
    )
    suffix = f".{format}"
    kinds = ["", *([PROBABILITIES] if probabilities else []), *([ENTROPY] if entropy else [])]
    files = {case.id: tuple(output / f"{case.id}{kind}{suffix}" for kind in kinds) for case in cases}
    _check_inputs_safe(cases, files)
    jobs = [Job(case.id, case.images, files[case.id]) for case in cases]
    wanted = {"probabilities": probabilities, "uncertainty": uncertainty, "entropy": entropy}
    loading = _Loading(
        models, device, overlap, crop, tta, prune, tracking_uri, format, any_modality=force, wanted=wanted
    )
    if not (resume or force):
        _check_nothing_there(files)
    if dry_run:
        segmenter = loading(Place(device))
        todo = [job for job in jobs if force or not job.is_written]
        planned = [_entry(job) | {"output": str(job.files[0])} | segmenter.plan(job) for job in track(todo, "planning")]
        skipped = [job.id for job in jobs if job not in todo]
        found: Result = {"done": [], "failed": [], "skipped": skipped, "planned": planned}
        return {**found, "seconds": round(time.monotonic() - started, 2)}
    options = {
        "model": [_fingerprint(name) for name in models], "overlap": overlap, "crop": crop, "tta": tta, "prune": prune,
        "format": format, **wanted,
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    with only_writer(output), _no_leftovers(output):
        ledger = Ledger.resume(output / LEDGER, jobs, options) if resume else None
        if ledger is None:
            told = {"any_modality": force, "models": _absolute(models)}
            ledger = Ledger.begin(output / LEDGER, jobs, options | told, keep=resume)
        loading = replace(loading, any_modality=ledger.options["any_modality"])
        there = {row["id"] for row in ledger.rows(jobs) if row["state"] == "done"}
        with watched(ledger):
            _run(ledger, loading, len(jobs) - len(there), executor, workers, address, slurm or {})
        rows = [
            summary_row(job.id, job.images[0], job.files[0], row)
            for job, row in zip(jobs, ledger.rows(jobs), strict=True)
        ]
        write_summary(output / SUMMARY, rows)
        page = _page(_Page(output, models[0], tracking_uri, jobs, rows)) if report and len(jobs) > 1 else None
    result: Result = {"done": [], "failed": [], "skipped": []}
    for job, row in zip(jobs, rows, strict=True):
        if row["id"] in there:
            result["skipped"].append(job.id)
        elif row["state"] == "done":
            told = {name: row[name] for name in _TOLD if name in row}
            result["done"].append(_entry(job) | {"output": str(job.files[0]), "seconds": row["seconds"]} | told)
        else:
            result["failed"].append(_entry(job) | {"error_id": row["error_id"], "message": row["message"]})
    result |= {"seconds": round(time.monotonic() - started, 2), "summary": str(output / SUMMARY)}
    return result | ({"report": str(page)} if page else {})


def _run(
    ledger: Ledger,
    loading: _Loading,
    num_jobs: int,
    executor: Executor,
    workers: int,
    address: str | None,
    slurm: Mapping[str, str],
) -> None:
    """Have somebody do what is left."""
    if not ledger.progress().is_open:
        return
    if executor == "here":
        work(ledger, loading, worker=worker_name(), place=Place(loading.device))
        return
    with ending_work("what is segmented is kept; go on with --resume"):
        if executor == "ray":
            from medseg.batch.ray_executor import run_ray

            run_ray(ledger, loading, loading.device, num_workers=workers or 1, address=address, preload=_PRELOAD)
        elif executor == "slurm":
            from medseg.batch.slurm_executor import run_slurm

            place, number = Place(loading.device), workers or 1
            run_slurm(ledger, loading, place, num_workers=number, options=slurm, preload=_PRELOAD)
        else:
            run_local(ledger, loading, places(loading.device, workers, num_jobs), preload=_PRELOAD)


@dataclass(frozen=True)
class _Loading:
    """Makes the segmenter, wherever it is called; see `predict` for what it hangs on.

    Args:
        any_modality: Segment scans of another modality than the model's, with a warning.
        wanted: Whether probabilities, uncertainty and entropy are wanted.
    """

    models: Sequence[str]
    device: str
    overlap: float | None
    crop: Crop | None
    tta: bool | None
    prune: int | None
    tracking_uri: str | None
    format: str
    any_modality: bool
    wanted: Mapping[str, bool]

    def __call__(self, place: Place) -> _Segmenter:
        """Load the model.

        Raises:
            MedsegError: If it cannot be used, or its segmentations cannot be written in this format.
        """
        import torch  # which takes a while to import, and the work may be another process's

        from medseg.build.model import predictor

        if place.num_threads:
            torch.set_num_threads(place.num_threads)
        made = predictor(
            self.models,
            device=place.device,
            overlap=self.overlap,
            crop=self.crop,
            tta=self.tta,
            pruned_at=self.prune,
            tracking_uri=self.tracking_uri,
        )
        if self.format == "png" and made.spec.spatial_dims == 3:
            raise WorkflowError("E-ARGUMENT", "a PNG holds no volume, which this model predicts", where="--format")
        return _Segmenter(made, self.wanted, any_modality=self.any_modality)


@dataclass(frozen=True)
class _Segmenter:
    """What a worker of a batch asks for, see `medseg.batch.worker.Segmenter`."""

    predictor: Predictor
    wanted: Mapping[str, bool]
    any_modality: bool

    def prepare(self, job: Job) -> Prepared:
        return self.predictor.prepare(job.images, any_modality=self.any_modality)

    def segment(self, job: Job, prepared: Prepared) -> Segmentation:
        room = temporary_path(job.files[1]) if self.wanted["probabilities"] else None
        try:
            return self.predictor.segment_prepared(
                prepared,
                probabilities_to=room,
                with_uncertainty=self.wanted["uncertainty"],
                with_entropy=self.wanted["entropy"],
            )
        except OSError as error:
            if room:
                error.filename = str(job.files[1])  # rather than a name that nobody knows
            raise
        finally:
            if room:
                room.unlink(missing_ok=True)  # which the array keeps in being as long as it needs it

    def write(self, job: Job, found: Segmentation) -> Result:
        label, *others = job.files  # the label map last, as the sign that the case is complete
        for file, volume in zip(others, filter(None, (found.probabilities, found.entropy)), strict=True):
            write_volume(file, volume)
        write_volume(label, found.label)
        told: Result = {
            "windows": found.num_windows,
            "windows_in_air": found.num_in_air,
            "network_seconds": round(found.network_seconds, 3),
            "waited_seconds": found.waited_seconds,
            **self._volumes(found),
        }
        if found.crf:
            told["crf"] = list(found.crf)
        if found.uncertainty is not None:
            told |= {"uncertainty": found.uncertainty, "uncertainties": found.uncertainties}
            told |= {"agreement": found.agreement} if found.agreement is not None else {}
        return told

    def _volumes(self, found: Segmentation) -> Result:
        by_value, unit = volumes_by_value(found.label)
        volumes = organ_volumes(by_value, self.predictor.spec.labels)
        return {"volumes": {organ: round(size, 6) for organ, size in volumes.items()}, "unit": unit}

    def plan(self, job: Job) -> Result:
        """What a case will take, or why it cannot be done."""
        try:
            plan = self.predictor.plan(read_geometry(job.images[0]), str(job.images[0]))
        except MedsegError as error:
            return {"error_id": error.error_id, "message": str(error)}
        return {
            "windows": plan.num_windows,
            "network_seconds": round(plan.seconds, 1),
            "memory_gb": round(plan.host_bytes / 1e9, 2),
            "gpu_memory_gb": round(plan.device_bytes / 1e9, 2),
        }


def _entry(job: Job) -> Result:
    return {"case": job.id, "input": str(job.images[0])}


@dataclass(frozen=True)
class _Page:
    """What the page of a batch is made from.

    Args:
        output: The folder of the segmentations.
        model: Names the labels.
        tracking_uri: Where to look for it.
        jobs: All cases.
        rows: What is known of each, see `summary_row`.
    """

    output: Path
    model: str
    tracking_uri: str | None
    jobs: Sequence[Job]
    rows: Sequence[Result]

    def write(self) -> None:
        from medseg.build.model import find_models
        from medseg.reporting.batch_page import write_batch_page

        spec = load_spec(find_models(self.model, self.tracking_uri)[0])
        cases = {job.id: Case(job.id, job.images, None, job.id) for job in self.jobs}
        done = [job for job, row in zip(self.jobs, self.rows, strict=True) if row["state"] == "done"]
        write_batch_page(
            [replace(cases[job.id], images=job.files[:1]) for job in done],
            self.output / REPORT,
            name=self.output.resolve().name,
            scans=cases,
            labels=spec.labels,
            preprocessing=spec.preprocessing,
            told={row["case"]: row for row in self.rows},
            most_read=_MOST_READ,
        )


def _page(page: _Page) -> Path | None:
    """Make the page, in a process of its own, as the scans on it are large; a batch is worth more than its page."""
    try:
        (_, killed), *_ = isolated(_written, [page], preload=["medseg.build.model"])
        if not killed:
            return page.output / REPORT
        failure = str(killed)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    log.warning(
        "W-REPORT %s: the scans are segmented, but their page failed (%s); try: medseg report %s",
        page.output, failure, shlex.quote(str(page.output)),
    )  # fmt: skip
    return None


def _written(pages: Mapping[int, _Page], begun: Callable[[int], None]) -> Iterator[tuple[int, None]]:
    for number, page in pages.items():
        begun(number)
        page.write()
        yield number, None


def _absolute(models: Sequence[str]) -> list[str]:
    """Names of models that mean the same elsewhere."""
    return [str(Path(name).absolute()) if Path(name).exists() else name for name in models]


def _fingerprint(model: str) -> str:
    """What tells a model from another: a digest of what is in its folders, weights' checksums included, or its run's id."""
    path = Path(model)
    files = [
        file for pattern in ("model.json", "model/model.json", "fold_*/model/model.json") for file in path.glob(pattern)
    ]
    if not files:
        return model
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


@contextmanager
def _no_leftovers(folder: Path) -> Iterator[None]:
    """Delete what killed processes left half-written, before and after."""
    remove_leftovers(folder)
    try:
        yield
    finally:
        remove_leftovers(folder)


def _check_executor(executor: Executor, address: str | None, slurm: Mapping[str, str] | None) -> None:
    if slurm and executor != "slurm":
        raise WorkflowError("E-ARGUMENT", "is for jobs of Slurm; add --executor slurm", where="--slurm")
    if address and executor != "ray":
        raise WorkflowError("E-ARGUMENT", "is that of a Ray cluster; add --executor ray", where="--address")


def _check_arguments(
    format: str, overlap: float | None, output: Path, *, resume: bool, force: bool, with_maps: bool
) -> None:
    if output.name.lower().endswith(tuple(WRITABLE_SUFFIXES)) and not output.is_dir():
        message = f"{output} is to be a folder, and files are called after their scans; leave the suffix out"
        raise WorkflowError("E-ARGUMENT", message, where="--output")
    if f".{format}" not in WRITABLE_SUFFIXES:
        known = ", ".join(suffix.removeprefix(".") for suffix in WRITABLE_SUFFIXES)
        raise WorkflowError("E-SUFFIX", f"{format!r} is not written; known: {known}", where="--format")
    if format == "png" and with_maps:
        raise WorkflowError("E-ARGUMENT", "a PNG holds no probabilities or entropies; use nii.gz", where="--format")
    if overlap is not None and not 0 <= overlap < 1:
        raise WorkflowError("E-ARGUMENT", f"{overlap} must be at least 0 and less than 1", where="--overlap")
    if resume and force:
        raise WorkflowError("E-ARGUMENT", "--resume keeps what is there, --force overwrites it; give one of them")


def _check_inputs_safe(cases: Sequence[Case], files: dict[str, tuple[Path, ...]]) -> None:
    """No segmentation takes the place of a scan or of a label, even with --force."""
    sources = {os.path.realpath(path) for case in cases for path in case.files}
    lost = [path for wanted in files.values() for path in wanted if os.path.realpath(path) in sources]
    if lost:
        raise Problems(
            [DataError("E-OUTPUT-NAME", "is an input; choose another --output", where=str(path)) for path in lost]
        )


def _check_nothing_there(files: dict[str, tuple[Path, ...]]) -> None:
    there = [path for wanted in files.values() for path in wanted if path.exists()]
    if there:
        more = f", and so do {len(there) - 1} more" if len(there) > 1 else ""
        raise WorkflowError(
            "E-OUTPUT-EXISTS",
            f"exists{more}; add --resume to keep or --force to overwrite",
            where=str(there[0]),
        )
