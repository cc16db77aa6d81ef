"""The table of bad inputs, row by row: each made for real and given to the command line as a person would.

``python -m tests.test_bad_inputs`` prints it: input, command, exit code, what medseg says.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, chdir, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from pydicom.encaps import encapsulate
from pydicom.uid import MediaStorageDirectoryStorage, SegmentationStorage
from typer.testing import CliRunner, Result

from medseg.cli import app
from medseg.data.volume_io import read_geometry, read_volume
from medseg.labels import Labels
from medseg.model import Intensity, ModelSpec, Preprocessing, Window, save_model
from medseg.nets import NETS

from .data.test_lint import LPS, DataSet, spoil_checksum, spoil_header, spoil_truncated
from .dicom_files import make_enhanced, make_slice, save

SCAN = Path("set/images/c2.nii.gz")
LABEL = Path("set/labels/c2.nii.gz")
WORKFLOW = """\
name: tiny
data:
  manifest: set/dataset.json
network: {name: unet, args: {channels: [4, 8]}}
train:
  patch_size: [8, 8, 8]
  batch_size: 1
  iterations: 2
  workers: 0
validate: {fold: 0}
"""

CHECK = "check set/dataset.json"
CONVERT = f"data convert {SCAN} out.nii.gz"
CONVERT_CT = "data convert ct out.nii.gz"
LIST_CT = "data list ct"
PREDICT = f"predict model {SCAN} -o out"
PREDICT_CT = "predict model ct -o out"
TRAIN = "train tiny.yaml"

Make = Callable[[DataSet], object]
Then = Callable[[DataSet, str], None]


@dataclass(frozen=True)
class Row:
    """One bad input.

    Args:
        number: Of the row in the table.
        name: Of the test.
        what: The input, in words.
        make: Makes it in the working folder, from a sound data set in ``set/``.
        command: What a person types after ``medseg``.
        exit_code: What the command ends with.
        error_id: What it says; empty: nothing has to be said.
        says: What must stand in the output too: the file, and what was found.
        then: What holds afterwards.
        during: What else goes on meanwhile.
    """

    number: int
    name: str
    what: str
    make: Make
    command: str
    exit_code: int
    error_id: str
    says: tuple[str, ...] = (SCAN.name,)
    then: Then | None = None
    during: Callable[[], AbstractContextManager[object]] = nullcontext


def scan(spoil: Callable[[Path], object]) -> Make:
    return lambda data: spoil(SCAN)


def rewritten(change: Callable[[np.ndarray], np.ndarray], path: Path = SCAN, affine: np.ndarray = LPS) -> Make:
    """The file with other voxels, or at another place."""

    def make(data: DataSet) -> None:
        voxels = change(np.asarray(nib.load(path).dataobj))
        nib.Nifti1Image(voxels, affine).to_filename(path)

    return make


def manifest(change: Callable[[dict[str, Any]], object]) -> Make:
    return lambda data: change(data.manifest)


def workflow(before: str, after: str) -> Make:
    assert before in WORKFLOW
    return lambda data: Path("tiny.yaml").write_text(WORKFLOW.replace(before, after))


def slices(*places: float, folder: str = "ct", **elements: Any) -> Make:
    """DICOM files of one series, a slice each at some places along z."""

    def make(data: DataSet) -> None:
        for z in places:
            save(make_slice(z, **elements), Path(folder, f"{z}.dcm"))

    return make


def nothing(data: DataSet) -> None:
    """The data set is sound."""


def all_of(*makes: Make) -> Make:
    return lambda data: [make(data) for make in makes]


def some(value: float, share: float) -> Callable[[np.ndarray], np.ndarray]:
    """A share of the voxels replaced, as floating-point numbers."""

    def change(voxels: np.ndarray) -> np.ndarray:
        changed = voxels.astype(np.float32)
        changed.flat[: max(1, int(share * voxels.size))] = value
        return changed

    return change


# What holds afterwards.


def written(path: str = "out.nii.gz") -> np.ndarray:
    return read_volume(Path(path)).array[0]


def same_voxels(data: DataSet, told: str) -> None:
    np.testing.assert_array_equal(written(), data.voxels(2))


def nothing_written(data: DataSet, told: str) -> None:
    assert not [path for path in Path().rglob("out*") if path.is_file()]


def no_torn_files(data: DataSet, told: str) -> None:
    assert not list(Path("out").rglob("*.tmp"))


def empty_mask(data: DataSet, told: str) -> None:
    assert not written(f"out/{SCAN.name}").any()
    assert read_geometry(Path("out", SCAN.name)).matches(read_geometry(SCAN))


def on_the_scans_grid(data: DataSet, told: str) -> None:
    assert read_geometry(Path("out", SCAN.name)).matches(read_geometry(SCAN), tolerance=1e-5)


def slice_values(*expected: float) -> Then:
    """The first voxel of each slice."""

    def check(data: DataSet, told: str) -> None:
        np.testing.assert_allclose(written()[0, 0], expected)

    return check


def written_names() -> list[str]:
    """What stands in the output folder besides what tells of the batch."""
    return sorted({path.name for path in Path("out").iterdir()} - {"ledger.db", "summary.csv", "report.html", ".lock"})


def outputs(*names: str) -> Then:
    def check(data: DataSet, told: str) -> None:
        assert written_names() == sorted(names)

    return check


def not_told(*secrets: str) -> Then:
    def check(data: DataSet, told: str) -> None:
        left = b"".join(path.read_bytes() for path in Path("out").iterdir())
        assert not [secret for secret in secrets if secret in told or secret.encode() in left]

    return check


# What takes more than a line to make.

NAN_AFFINE = {"srow_x": [np.nan, 0, 0, 0]}
SINGULAR = {"srow_z": [0, 0, 0, 0]}
BOMB = {"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}
NO_AXIS = {"dim": [3, 12, 0, 8, 1, 1, 1, 1]}
TIME_OF_ONE = {"dim": [4, 12, 10, 8, 1, 1, 1, 1]}
RGB = {"datatype": 128, "bitpix": 24}
ASIDE = LPS + np.array([[0, 0, 0, 1.5], [0] * 4, [0] * 4, [0] * 4])
SHEARED = LPS + np.array([[0, 0, 0.6, 0], [0] * 4, [0] * 4, [0] * 4])
TILT = [1.0, 0.0, 0.0, 0.0, float(np.cos(0.3)), float(-np.sin(0.3))]
SECRETS = {"PatientName": "Quijano^Alonso", "PatientID": "MRN-7781234", "PatientBirthDate": "15470929"}


def large(path: Path) -> None:
    nib.Nifti1Image(np.random.default_rng(0).normal(size=(20, 20, 20)), LPS).to_filename(path)


def half_of_a_large_one(path: Path) -> None:
    large(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def uncompressed(path: Path) -> None:
    path.write_bytes(gzip.decompress(path.read_bytes()))


def four_dimensional(path: Path) -> None:
    nib.Nifti1Image(np.random.default_rng(0).normal(size=(12, 10, 8, 3)), LPS).to_filename(path)


def two_dimensional(path: Path) -> None:
    nib.Nifti1Image(np.random.default_rng(0).normal(size=(12, 10)), LPS).to_filename(path)


def complex_voxels(path: Path) -> None:
    nib.Nifti1Image(np.ones((12, 10, 8), np.complex64), LPS).to_filename(path)


def a_web_page(path: Path) -> None:
    path.write_text("<html>the login page of a server that wanted a password</html>")


def a_copy_in_another_fold(data: DataSet) -> None:
    for kind in ("images", "labels"):
        Path(f"set/{kind}/c2.nii.gz").write_bytes(Path(f"set/{kind}/c1.nii.gz").read_bytes())


def missing_everywhere(data: DataSet) -> None:
    Path("set/images/c1.nii.gz").unlink()
    Path("set/labels/c2.nii.gz").unlink()
    del data.manifest["training"][3]["label"]


def empty_in_both(data: DataSet) -> None:
    data.write("labels/c2.nii.gz", np.zeros((12, 10, 8), np.uint8))
    data.write("../found/c2.nii.gz", np.zeros((12, 10, 8), np.uint8))


def scores_are_flagged(data: DataSet, told: str) -> None:
    (line,) = [line for line in told.splitlines() if line.startswith("{")]
    mean = json.loads(line)["per_organ"]["liver"]["dice"]
    assert (mean["mean"], mean["n"], mean["n_missing"]) == (None, 0, 1)
    assert "absent in both" in Path("scores/per_case.csv").read_text()


def kidneys_swapped(data: DataSet) -> None:
    """The left kidney on the patient's right in one scan of five: mirrored, as a lost sign in a header does."""
    data.manifest["labels"] = {"0": "background", "1": "kidney_left", "2": "kidney_right"}
    data.manifest["pairs"] = [[1, 2]]
    for n in range(5):  # in LPS voxels, the left kidney has the higher index along the first axis
        sides = (2, 1) if n != 2 else (1, 2)
        label = np.zeros((12, 10, 8), np.uint8)
        label[1:4, 3:7, 2:5], label[8:11, 3:7, 2:5] = sides
        data.write(f"labels/c{n}.nii.gz", label)


def two_series(data: DataSet) -> None:
    for number in (1, 2):
        slices(0, 2, folder=f"ct/{number}", SeriesInstanceUID=f"1.2.3.{number}")(data)


def half_with_another_spacing(data: DataSet) -> None:
    slices(0, 2)(data)
    slices(4, 6, PixelSpacing=[0.6, 0.75])(data)


def beside_a_scan(data: DataSet) -> None:
    slices(0, 2)(data)
    slices(0, folder="ct/scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])(data)
    slices(0, folder="ct/seg", SOPClassUID=SegmentationStorage, Modality="SEG")(data)


def litter(data: DataSet) -> None:
    slices(0, 2)(data)
    for path in Path("ct").iterdir():
        path.write_bytes(path.read_bytes()[132:])  # no preamble, no prefix
    save(make_slice(0, SOPClassUID=MediaStorageDirectoryStorage), Path("ct/DICOMDIR"))
    Path("ct/.DS_Store").write_bytes(b"Bud1")


def links_in_a_circle(data: DataSet) -> None:
    slices(0, 2)(data)
    Path("ct/round").symlink_to(Path("ct").resolve(), target_is_directory=True)
    Path("ct/loop.dcm").symlink_to("loop.dcm")


def a_link_to_itself(data: DataSet) -> None:
    SCAN.unlink()
    SCAN.symlink_to(SCAN.name)


def cut_short(data: DataSet) -> None:
    slices(0, 2)(data)
    last = Path("ct/2.dcm")
    last.write_bytes(last.read_bytes()[:-10])


def unknown_compression(data: DataSet) -> None:
    for z in (0, 2):
        file = make_slice(z)
        file.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"  # HTJ2K
        file.PixelData = encapsulate([file.PixelData])
        file["PixelData"].is_undefined_length = True
        save(file, Path(f"ct/{z}.dcm"))


def pet(data: DataSet) -> None:
    for z, slope in ((0, 3.0), (2, 2.0), (4, 0.5)):
        file = make_slice(z, np.full((3, 4), 10, np.uint16), modality="PT", RescaleSlope=slope, RescaleIntercept=0)
        save(file, Path(f"ct/{z}.dcm"))


def frames_in_disorder(data: DataSet) -> None:
    pixels = np.stack([np.full((3, 4), value, np.uint16) for value in (30, 10, 20)])
    places = [{"PlanePositionSequence": {"ImagePositionPatient": [-10.0, -20.0, z]}} for z in (4.0, 0.0, 2.0)]
    save(make_enhanced(pixels, places), Path("ct/all.dcm"))


def alias_bomb(data: DataSet) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    Path("tiny.yaml").write_text("\n".join(lines))


def many_labels(data: DataSet) -> None:
    data.write("labels/c2.nii.gz", np.arange(960, dtype=np.float32).reshape(12, 10, 8))


def labels_kept(data: DataSet, told: str) -> None:
    np.testing.assert_array_equal(written(), np.arange(960).reshape(12, 10, 8))
    assert nib.load("out.nii.gz").get_data_dtype().kind in "iu"


def elsewhere(data: DataSet) -> None:
    data.write("../elsewhere/c2.nii.gz", data.voxels(2))
    data.manifest["training"][2]["image"] = "../elsewhere/c2.nii.gz"


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can be made larger than 16 kB, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    processes = [os.getpid(), *([server] if (server := forkserver._forkserver._forkserver_pid) else [])]
    for process in processes:  # this one and, if it runs already, the one that processes for work are forked from
        resource.prlimit(process, resource.RLIMIT_FSIZE, (16384, before[1]))
    try:
        yield
    finally:
        for process in processes:
            resource.prlimit(process, resource.RLIMIT_FSIZE, before)


KILLED_IN_A_WRITE = """
import os, signal
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from medseg.cli import main
main()
"""


def killed_in_a_write(data: DataSet) -> None:
    command = [sys.executable, "-c", KILLED_IN_A_WRITE, *shlex.split(CONVERT)]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(hidden_files()) == 1, "no half a file under the name of a whole one"


def whole_and_nothing_else(data: DataSet, told: str) -> None:
    same_voxels(data, told)
    assert not hidden_files()


def hidden_files() -> list[Path]:
    return list(Path().glob(".*.tmp"))


HOLDER = """
import sys, time
from pathlib import Path
from medseg.training.run_folder import RunFolder
with RunFolder(Path("out")):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_training() -> Iterator[None]:
    command, env = [sys.executable, "-c", HOLDER], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        yield
        holder.kill()


# The table.

ROWS = [
    Row(1, "empty", "empty file", scan(lambda path: path.write_bytes(b"")), CHECK, 2, "E-NIFTI-EMPTY"),
    Row(2, "truncated", "scan cut short", scan(half_of_a_large_one), CHECK, 2, "E-NIFTI-TRUNCATED", (SCAN.name, "expected 64,352 bytes, got 3")),
    Row(3, "checksum", "a flipped bit in the checksum", scan(spoil_checksum), CHECK, 2, "E-NIFTI-CRC", (SCAN.name, "copy the file again")),
    Row(4, "not-gzipped", ".nii.gz that is not compressed", scan(uncompressed), CONVERT, 0, "W-NIFTI-SUFFIX", then=same_voxels),
    Row(5, "web-page", "a web page called .nii.gz", scan(a_web_page), CHECK, 2, "E-NIFTI-MAGIC", (SCAN.name, "<html>")),
    Row(6, "bomb", "a header of 30000 × 30000 × 30000 voxels", scan(spoil_header(**BOMB)), CHECK, 2, "E-SIZE", (SCAN.name, "30000")),
    Row(7, "no-axis", "an axis of length 0", scan(spoil_header(**NO_AXIS)), CHECK, 2, "E-DIMS"),
    Row(8, "time-of-one", "4D with one volume", scan(spoil_header(**TIME_OF_ONE)), CONVERT, 0, "W-NIFTI-TIME", then=same_voxels),
    Row(9, "4d", "4D with three volumes for one channel", scan(four_dimensional), PREDICT, 3, "E-CHANNELS", (SCAN.name, "select_volume"), nothing_written),
    Row(10, "2d", "a picture for a model of volumes", scan(two_dimensional), PREDICT, 3, "E-SPATIAL-DIMS", (SCAN.name, "expected 3D"), nothing_written),
    Row(11, "rgb", "RGB voxels", scan(spoil_header(**RGB)), CHECK, 2, "E-DTYPE"),
    Row(11, "complex", "complex voxels", scan(complex_voxels), CHECK, 2, "E-DTYPE", (SCAN.name, "complex")),
    Row(12, "one-nan", "one voxel of 8,000 NaN", all_of(scan(large), rewritten(some(np.nan, 0))), CONVERT, 0, "W-NOT-FINITE", (SCAN.name, "1 voxels"), lambda data, told: np.testing.assert_equal(written()[0, 0, 0], written().min())),
    Row(12, "many-nan", "1 % of the voxels NaN", rewritten(some(np.nan, 0.01)), CONVERT, 2, "E-NOT-FINITE", (SCAN.name, "9 of 960"), nothing_written),
    Row(13, "constant-train", "a training image that shows nothing", rewritten(np.zeros_like), CHECK, 2, "E-CONSTANT"),
    Row(13, "constant-predict", "a scan to predict that shows nothing", rewritten(np.zeros_like), PREDICT, 0, "W-CONSTANT", then=empty_mask),
    Row(14, "slope", "scl_slope NaN", scan(spoil_header(scl_slope=np.nan)), CONVERT, 0, "W-NIFTI-SLOPE", then=same_voxels),
    Row(14, "slope-0", "scl_slope 0", scan(spoil_header(scl_slope=0, scl_inter=3)), CONVERT, 0, "W-NIFTI-SLOPE", then=same_voxels),
    Row(15, "no-forms", "sform_code and qform_code 0", scan(spoil_header(sform_code=0, qform_code=0)), CHECK, 2, "E-NO-GEOMETRY", (SCAN.name, "assume_spacing_mm")),
    Row(15, "assumed-spacing", "the same, with assume_spacing_mm in the workflow", all_of(rewritten(np.array, LABEL, np.diag([1.5, 1.5, 2, 1])), scan(spoil_header(sform_code=0, qform_code=0)), workflow("set/dataset.json", "set/dataset.json\n  assume_spacing_mm: [1.5, 1.5, 2.0]")), "check tiny.yaml", 0, "W-ASSUMED-SPACING"),
    Row(16, "forms", "sform and qform 47 mm apart", scan(spoil_header(qform_code=1, qoffset_x=77)), CONVERT, 0, "W-NIFTI-FORMS", (SCAN.name, "47.00 mm"), lambda data, told: np.testing.assert_allclose(nib.load("out.nii.gz").affine, LPS)),
    Row(17, "nan-affine", "an affine with NaN", scan(spoil_header(**NAN_AFFINE)), CHECK, 2, "E-AFFINE"),
    Row(17, "singular-affine", "an affine that flattens the scan", scan(spoil_header(**SINGULAR)), CHECK, 2, "E-AFFINE"),
    Row(18, "sheared", "axes that are not at right angles", rewritten(np.array, SCAN, SHEARED), PREDICT, 0, "W-SHEARED", then=on_the_scans_grid),
    Row(19, "spacing", "slices 200 mm apart", scan(spoil_header(srow_z=[0, 0, 200, 0])), CHECK, 2, "E-SPACING", (SCAN.name, "metres or µm")),
    Row(20, "shapes", "a label with a slice less", rewritten(lambda voxels: voxels[..., 1:], LABEL), CHECK, 2, "E-PAIR-SHAPE", (LABEL.name, "(12, 10, 8)", "(12, 10, 7)")),
    Row(21, "places", "a label 1.5 mm aside", rewritten(np.array, LABEL, ASIDE), CHECK, 2, "E-PAIR-AFFINE", (LABEL.name, "1.5 mm apart")),
    Row(22, "fractions", "a label with 0.5 in it", rewritten(some(0.5, 0), LABEL), CHECK, 2, "E-LABEL-VALUES", (LABEL.name, "e.g. 0.5")),
    Row(22, "nearly-integers", "a label with 1.00001 in it", rewritten(some(1.00001, 0), LABEL), CHECK, 0, "W-LABEL-FLOAT", (LABEL.name,)),
    Row(23, "undeclared", "a label that the manifest does not declare", rewritten(lambda voxels: voxels * 3, LABEL), CHECK, 2, "E-LABEL-UNDECLARED", (LABEL.name, "3 (48 voxels), 6 (24 voxels)", "ignore_label")),
    Row(24, "absent", "a declared label that no case has", manifest(lambda data: data["labels"].update({"3": "cyst"})), CHECK, 2, "E-LABEL-ABSENT", ("cyst",)),
    Row(24, "absent-outside-a-fold", "a label that one fold alone has", all_of(*(rewritten(lambda voxels: voxels % 2, Path(f"set/labels/c{n}.nii.gz")) for n in (1, 3))), CHECK, 0, "W-LABEL-ABSENT", ("tumour", "fold 0 alone")),
    Row(25, "empty-label", "a label map without a label", rewritten(np.zeros_like, LABEL), CHECK, 0, "W-LABEL-EMPTY", (LABEL.name,)),
    Row(25, "empty-scores", "no organ in prediction and reference", empty_in_both, "evaluate found set/labels --labels set/dataset.json -o scores --json", 0, "", ("n_missing",), scores_are_flagged),
    Row(26, "missing", "an image, a label file and a label entry missing", missing_everywhere, CHECK, 2, "E-MISSING-FILE", ("images/c1.nii.gz", "labels/c2.nii.gz", "E-MISSING-LABEL", "c3")),
    Row(27, "same-scan", "one scan in two folds under two names", a_copy_in_another_fold, CHECK, 2, "E-DUPLICATE-SCAN", ("c1", "c2", "leakage")),
    Row(27, "same-scan-train", "the same, given to train", a_copy_in_another_fold, TRAIN, 2, "E-LEAKAGE", ("c1", "c2", "tiny.yaml:3:3")),
    Row(27, "same-patient", "one patient in two folds", manifest(lambda data: [entry.update(patient="P") for entry in data["training"][:2]]), CHECK, 2, "E-LEAKAGE", ("c0", "c1")),
    Row(28, "same-ids", "two cases of one name in a manifest", manifest(lambda data: data["training"][1].update(id="c2")), CHECK, 2, "E-DUPLICATE-CASE", ("'c2'",)),
    Row(28, "same-names", "two scans of one name to predict", lambda data: [data.write(f"../a/scan{suffix}", data.voxels(0)) for suffix in (".nii.gz", ".nii")], "predict model a/scan.nii.gz a/scan.nii -o out", 2, "E-OUTPUT-NAME", ("a/scan.nii.gz", "a/scan.nii"), nothing_written),
    Row(28, "same-names-elsewhere", "two scans of one name in two folders", lambda data: [data.write(f"../{folder}/scan.nii.gz", data.voxels(0)) for folder in "ab"], "predict model a/scan.nii.gz b -o out", 0, "", (), outputs("a_scan.nii.gz", "b_scan.nii.gz")),
    Row(28, "same-names-in-folder", "the same below one folder", lambda data: [data.write(f"../all/{folder}/scan.nii.gz", data.voxels(0)) for folder in "ab"], "predict model all -o out", 0, "", (), outputs("a_scan.nii.gz", "b_scan.nii.gz")),
    Row(29, "left-right", "left and right exchanged in one scan of five", kidneys_swapped, CHECK, 0, "W-LEFT-RIGHT", (LABEL.name, "orientation: LPS in 5", "mirrored")),
    Row(30, "several-series", "two series in a folder", two_series, CONVERT_CT, 2, "E-DICOM-SEVERAL", ("ct/1#1.2.3.1", "ct/2#1.2.3.2"), nothing_written),
    Row(30, "a-job-each", "the same, to predict", two_series, PREDICT_CT, 0, "", ("2 segmented",), outputs("1.nii.gz", "2.nii.gz")),
    Row(31, "missing-slice", "slice 2 of 5 missing", slices(0, 4, 6, 8), CONVERT_CT, 2, "E-DICOM-MISSING-SLICE", ("ct", "(-10.00, -20.00, 2.00)"), nothing_written),
    Row(31, "interpolated", "the same, --allow-missing-slices", slices(0, 4, 6, 8), f"{CONVERT_CT} --allow-missing-slices", 0, "W-DICOM-INTERPOLATED", ("ct", "1 of 5 slices"), slice_values(0, 2, 4, 6, 8)),
    Row(32, "copies", "a slice twice", all_of(slices(0, 2, 4), slices(2, folder="ct/again")), CONVERT_CT, 0, "W-DICOM-DUPLICATE", ("ct",), slice_values(0, 2, 4)),
    Row(33, "phases", "two different slices at one place", all_of(slices(0, 2, 4), slices(2, folder="ct/again", pixels=np.full((3, 4), 7, np.uint16))), CONVERT_CT, 2, "E-DICOM-DUPLICATE-POSITION", ("2.dcm, again/2.dcm", "(-10.00, -20.00, 2.00)"), nothing_written),
    Row(34, "tilt", "a gantry tilted by 17°", slices(0, 3, 6, ImageOrientationPatient=TILT), PREDICT_CT, 0, "W-DICOM-TILT", ("ct", "17"), lambda data, told: np.testing.assert_allclose(nib.load("out/ct.nii.gz").affine[:3, 2], [0, 0, 3], atol=1e-5)),
    Row(35, "mixed", "two pixel spacings in a series", half_with_another_spacing, CONVERT_CT, 2, "E-DICOM-SEVERAL", ("ct#", "2 slices"), nothing_written),
    Row(36, "no-scans", "a localizer and a SEG beside a scan", beside_a_scan, LIST_CT, 0, "", ("localizer", "SEG seg/0.dcm: ", "4 × 3 × 2")),
    Row(37, "no-position", "no ImagePositionPatient", slices(0, 2, ImagePositionPatient=None, InstanceNumber=1), CONVERT_CT, 2, "E-DICOM-GEOMETRY", ("0.dcm",), nothing_written),
    Row(38, "compression", "a compression that nothing here decodes", unknown_compression, CONVERT_CT, 2, "E-DICOM-COMPRESSION", ("0.dcm", "1.2.840.10008.1.2.4.201", "export the series uncompressed"), nothing_written),
    Row(39, "cut-pixels", "a slice cut short", cut_short, CONVERT_CT, 2, "E-DICOM-TRUNCATED", ("2.dcm", "expected 24"), nothing_written),
    Row(40, "pet", "a RescaleSlope of its own in each slice", pet, CONVERT_CT, 0, "", (), slice_values(30, 20, 5)),
    Row(41, "no-rescale", "a CT without RescaleSlope", slices(0, 2, modality="CT", RescaleSlope=None, RescaleIntercept=None), CONVERT_CT, 0, "W-DICOM-RESCALE", ("ct",)),
    Row(41, "no-units", "a CT of 40,000", slices(0, 2, modality="CT", pixels=np.full((3, 4), 41024, np.uint16)), CONVERT_CT, 0, "W-DICOM-HU", ("ct",)),
    Row(42, "monochrome1", "MONOCHROME1", slices(0, 2, pixels=np.arange(12, dtype=np.uint8).reshape(3, 4), PhotometricInterpretation="MONOCHROME1"), CONVERT_CT, 0, "W-DICOM-INVERTED", ("ct",), slice_values(255, 255)),
    Row(42, "color", "a palette of colors", slices(0, 2, PhotometricInterpretation="PALETTE COLOR"), CONVERT_CT, 2, "E-DICOM-COLOR", ("0.dcm",), nothing_written),
    Row(43, "frames", "one file of many frames, in disorder", frames_in_disorder, CONVERT_CT, 0, "", (), slice_values(10, 20, 30)),
    Row(44, "modality", "a CT given to a model of MR", slices(0, 2, modality="CT"), PREDICT_CT, 3, "E-MODALITY", ("ct#", "modality CT", "expected MR", "--force"), nothing_written),
    Row(44, "modality-forced", "the same with --force", slices(0, 2, modality="CT"), f"{PREDICT_CT} --force", 0, "W-MODALITY", ("ct#",), outputs("ct.nii.gz")),
    Row(45, "burned-in", "the file says that its picture names the patient", slices(0, 2, BurnedInAnnotation="YES"), CONVERT_CT, 2, "E-BURNED-IN", ("ct", "blank the text first"), nothing_written),
    Row(45, "burned-in-forced", "the same with --force", slices(0, 2, BurnedInAnnotation="YES"), f"{CONVERT_CT} --force", 0, "W-DICOM-BURNED-IN", ("ct",)),
    Row(46, "patient-id", "PatientID ../../etc", slices(0, 2, PatientID="../../etc/passwd"), PREDICT_CT, 0, "", (), outputs("ct.nii.gz")),
    Row(47, "litter", "no preamble, a DICOMDIR, a .DS_Store", litter, LIST_CT, 0, "", ("DICOMDIR", "litter of the operating system", "4 × 3 × 2", "ok")),
    Row(48, "links-in-a-circle", "a folder with links to itself", links_in_a_circle, LIST_CT, 0, "", ("link to a folder, not followed", "loop.dcm", "4 × 3 × 2")),
    Row(48, "a-link-to-itself", "a link to itself", a_link_to_itself, "predict model set/images -o out", 3, "E-FILE", (SCAN.name, "4 segmented")),
    Row(49, "typo", "a slip in a key", workflow("batch_size", "bach_size"), TRAIN, 2, "E-", ("tiny.yaml:7:3 train.bach_size", "did you mean 'batch_size'?")),
    Row(49, "twice", "a key given twice", workflow("name: tiny", "name: tiny\nname: tiny"), TRAIN, 2, "E-YAML", ("tiny.yaml:2:1", '"name"')),
    Row(49, "type", "a text for a number", workflow("batch_size: 1", "batch_size: one"), TRAIN, 2, "E-", ("tiny.yaml:7:3 train.batch_size", "'one'")),
    Row(50, "tag", "!!python in a workflow", workflow("name: tiny", "name: !!python/object/apply:os.getcwd []"), TRAIN, 2, "E-YAML-TAG", ("tiny.yaml:1:1",)),
    Row(50, "expression", "an expression for a number", workflow("iterations: 2", "iterations: $__import__('os').getpid()"), TRAIN, 2, "E-", ("tiny.yaml:8:3 train.iterations",)),
    Row(50, "alias-bomb", "an alias bomb", alias_bomb, TRAIN, 2, "E-YAML", ("tiny.yaml", "aliases count each time")),
    Row(51, "large-patch", "a patch larger than the scans", workflow("[8, 8, 8]", "[64, 8, 8]"), "check tiny.yaml", 0, "W-PATCH-SIZE", ("tiny.yaml:6:3", "12 × 8 × 8")),
    Row(51, "odd-patch", "a patch that the strides do not divide", workflow("[8, 8, 8]", "[9, 8, 7]"), "check tiny.yaml", 0, "W-PATCH-SIZE", ("tiny.yaml:6:3", "10 × 8 × 8")),
    Row(51, "padded", "a patch larger than the scans and not divisible, trained on", workflow("[8, 8, 8]", "[33, 9, 9]"), f"{TRAIN} --dry-run", 0, "", ("an iteration",)),
    Row(51, "small-patch", "a patch below the network's least", workflow("[8, 8, 8]", "[1, 8, 8]"), TRAIN, 2, "E-PATCH-SIZE", ("tiny.yaml:6:3", "at least 2 × 2 × 2")),
    Row(52, "batch", "a batch larger than the data set", workflow("batch_size: 1", "batch_size: 9"), TRAIN, 2, "E-BATCH-SIZE", ("tiny.yaml:7:3", "9", "2 training cases")),
    Row(52, "fold", "a fold that does not exist", workflow("fold: 0", "fold: 7"), TRAIN, 2, "E-FOLD", ("tiny.yaml:10:12", "holds out 0 of 5")),
    # Rows 53 to 56 are about checkpoints, models and bundles, not about data.
    Row(57, "outside-root", "an image outside the manifest's folder", elsewhere, CHECK, 2, "E-OUTSIDE-ROOT", ("elsewhere/c2.nii.gz", "allow_outside_root")),
    Row(57, "outside-root-train", "the same, given to train", elsewhere, TRAIN, 2, "E-OUTSIDE-ROOT", ("elsewhere/c2.nii.gz",)),
    Row(57, "outside-root-predict", "the same, given to predict", elsewhere, "predict model set/dataset.json -o out", 2, "E-OUTSIDE-ROOT", ("elsewhere/c2.nii.gz",), nothing_written),
    Row(57, "allowed", "the same, allowed by the manifest", all_of(elsewhere, manifest(lambda data: data.update(allow_outside_root=True))), CHECK, 0, "", ("5 cases checked: 0 errors",)),
    Row(59, "patch-for-no-machine", "a patch that no memory holds", nothing, f"{TRAIN} --set train.patch_size=[4096,4096,4096]", 2, "E-MEMORY", ("--set train.patch_size", "4096 × 4096 × 4096", "GB"), nothing_written),
    # Rows 58 to 60 (NaN loss, lack of memory, killed workers): tests/training, tests/inference, tests/batch, test_predict.py.
    Row(61, "full-disk", "no room for the output", scan(large), CONVERT, 4, "E-DISK", ("out.nii.gz", "make room"), nothing_written, full_disk),
    Row(61, "full-disk-predict", "no room for a prediction", scan(large), f"{PREDICT} --probabilities", 4, "E-DISK", ("out/c2", "make room"), nothing_written, full_disk),
    Row(61, "full-disk-train", "no room for a checkpoint", nothing, f"{TRAIN} -o out", 4, "E-DISK", ("out/checkpoints", "make room"), no_torn_files, full_disk),
    Row(62, "killed", "SIGKILL while writing", killed_in_a_write, CONVERT, 0, "", (), whole_and_nothing_else),
    Row(63, "two-runs", "two trainings into one folder", nothing, f"{TRAIN} --output out --resume", 2, "E-RUN-LOCKED", ("out",), during=another_training),
    # Rows 64 and 65 are about MLflow: tests/tracking/.
    Row(66, "names", "a patient's name, id and birth date in the header", slices(0, 2, **SECRETS), PREDICT_CT, 0, "", (), not_told("Quijano", "Alonso", "MRN-7781234", "15470929")),
    Row(67, "empty-prediction", "a model that finds nothing", nothing, f"predict blind {SCAN} -o out", 0, "W-EMPTY-PREDICTION", (f"{SCAN}",), empty_mask),
    Row(68, "many-labels", "label values up to 959", many_labels, "data convert set/labels/c2.nii.gz out.nii.gz --image set/images/c2.nii.gz", 0, "", (), labels_kept),
]  # fmt: skip

ELSEWHERE = {53, 54, 55, 56, 58, 60, 64, 65}
"""Rows of the table that are not proved here."""

ROOT = Path(__file__).resolve().parents[1]


def model(folder: Path, *, is_blind: bool = False) -> None:
    """A model with random weights; a blind one finds background everywhere."""
    spec = ModelSpec(
        network="unet",
        network_args=NETS["unet"].tiny,
        spatial_dims=3,
        channels=("MR",),
        labels=Labels({0: "background", 1: "liver", 2: "tumour"}),
        preprocessing=Preprocessing(spacing_mm=(2.0, 2.0, 2.0), intensity=(Intensity(),)),
        window=Window((16, 16, 16)),
    )
    torch.manual_seed(0)
    weights = NETS["unet"].network(spatial_dims=3, in_channels=1, out_channels=3, **NETS["unet"].tiny).state_dict()
    if is_blind:
        last = list(weights)[-1]
        weights = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        weights[last] = torch.tensor([1.0, 0.0, 0.0])
    save_model(folder, spec, weights)


def medseg(command: str) -> Result:
    return CliRunner().invoke(app, shlex.split(command), env=ENVIRONMENT)


ENVIRONMENT = {"COLUMNS": "1000", "MEDSEG_CACHE": "cache", "MEDSEG_DEBUG": "", "MLFLOW_TRACKING_URI": ""}


def furnish(models: Path) -> DataSet:
    """Put what commands need into the working folder."""
    for name in ("model", "blind"):
        Path(name).symlink_to(models / name)
    Path("tiny.yaml").write_text(WORKFLOW)
    return DataSet(Path("set"))


def run(row: Row, data: DataSet) -> Result:
    """Make the input, give it to medseg."""
    row.make(data)
    data.path()
    with row.during():
        return medseg(row.command)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model(folder / "model")
    model(folder / "blind", is_blind=True)
    return folder


@pytest.fixture
def data(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    monkeypatch.chdir(tmp_path)
    return furnish(models)


@pytest.mark.parametrize("row", ROWS, ids=[f"row{row.number:02d}-{row.name}" for row in ROWS])
def test_medseg_does_with_a_bad_input_what_the_table_says(
    row: Row, data: DataSet, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(row, data)
    told = result.output + "".join(f"{record.getMessage()}\n" for record in caplog.records)
    assert result.exit_code == row.exit_code, told
    assert not [part for part in (row.error_id, *row.says) if part not in told], told
    assert "Traceback" not in told
    assert "internal error" not in told
    if row.then:
        row.then(data, told)


def test_no_row_of_the_table_is_forgotten() -> None:
    assert {row.number for row in ROWS} | ELSEWHERE == set(range(1, 69))


BAD = {
    "empty": ("E-NIFTI-EMPTY", lambda path: path.write_bytes(b"")),
    "truncated": ("E-NIFTI-TRUNCATED", spoil_truncated),
    "checksum": ("E-NIFTI-CRC", spoil_checksum),
    "web_page": ("E-NIFTI-MAGIC", a_web_page),
    "nan_affine": ("E-AFFINE", spoil_header(**NAN_AFFINE)),
    "rgb": ("E-DTYPE", spoil_header(**RGB)),
    "no_axis": ("E-DIMS", spoil_header(**NO_AXIS)),
    "four_dimensional": ("E-CHANNELS", four_dimensional),
    "bomb": ("E-SIZE", spoil_header(**BOMB)),
    "two_dimensional": ("E-SPATIAL-DIMS", two_dimensional),
}


def test_ten_bad_scans_among_thirty_are_told_one_by_one_and_the_others_are_segmented(data: DataSet) -> None:
    good = [f"good_{n:02d}" for n in range(20)]
    for n, name in enumerate([*good, *BAD]):
        path = data.write(f"../batch/{name}.nii.gz", data.voxels(n))
        if name in BAD:
            BAD[name][1](path)
    result = medseg("predict model batch -o out --json")
    assert result.exit_code == 3, result.output
    told = json.loads(result.stdout)
    assert [entry["case"] for entry in told["done"]] == good
    assert {entry["case"]: entry["error_id"] for entry in told["failed"]} == {name: bad[0] for name, bad in BAD.items()}
    assert all(f"{entry['case']}.nii.gz" in entry["message"] for entry in told["failed"])
    assert written_names() == [f"{name}.nii.gz" for name in good]
    for name in good:
        assert read_geometry(Path(f"out/{name}.nii.gz")).matches(read_geometry(Path(f"batch/{name}.nii.gz")))


def main() -> None:
    """Print the table in Markdown."""
    print("| row | input | command | exit | what medseg says |\n|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        models = Path(folder, "models")
        model(models / "model")
        model(models / "blind", is_blind=True)
        for n, row in enumerate(ROWS):
            home = Path(folder, str(n))
            home.mkdir()
            with chdir(home):
                result = run(row, furnish(models))
            key = row.error_id or (*row.says, "")[0]
            said = next((line for line in result.output.splitlines() if key in line), "")
            said = " ".join(said.replace(f"{home}/", "").replace("│", " ").split())  # without the borders of a table
            print(f"| {row.number} | {row.what} | `medseg {row.command}` | {result.exit_code} | {said} |", flush=True)


if __name__ == "__main__":
    main()
