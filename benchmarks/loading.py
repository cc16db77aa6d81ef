"""Loading a CT: read, orient and resample by medseg's transforms, by MONAI's, and by SimpleITK's bare functions.

    python benchmarks/loading.py [--shape 512 512 300] [--rounds 5] [--threads 2] [--file CT.nii.gz]

An int16 CT of 0.8 × 0.8 × 1.5 mm, LPS on disk, to 1.5 mm and RAS; SimpleITK leaves the axes and the type as they
are. Noise and structure compress as scans do (2.5 to 1), unless a scan of your own is given. Each
run has a process of its own, warmed up on a small file; the sides take turns, and the file is in the system's
cache. Memory is what the process adds at its peak. medseg compares the file's checksum, MONAI (nibabel) does not.
The values are compared on medseg's grid: MONAI's Spacingd puts its voxels elsewhere, so there MONAI's
SpatialResample is given that grid.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

SPACING_MM = (1.5, 1.5, 1.5)
BODY_HU = -500
Load = Callable[[Path], object]
MEASURES = {"mean": np.mean, "highest": np.max}


def medseg_side() -> Load:
    """The steps of `medseg.data.transforms` before normalization."""
    from monai.transforms.compose import Compose

    from medseg.data.transforms import preprocessing_transforms
    from medseg.model import Preprocessing

    transforms = preprocessing_transforms(Preprocessing(spacing_mm=SPACING_MM), ["image"]).transforms[:4]
    load = Compose(transforms)
    return lambda file: load({"image": file})["image"]


def monai_side() -> Load:
    """MONAI's transforms of the same names."""
    from monai import transforms as mt

    load = mt.Compose([*monai_reading(), mt.Spacingd("image", SPACING_MM, mode="bilinear")])
    return lambda file: load({"image": file})["image"]


def monai_reading() -> list[object]:
    """Up to the resampling."""
    from monai import transforms as mt

    ras = (("L", "R"), ("P", "A"), ("I", "S"))
    return [
        mt.LoadImaged("image"),
        mt.EnsureChannelFirstd("image"),
        mt.Orientationd("image", axcodes="RAS", labels=ras),
    ]


def simpleitk_side(*, as_float: bool = False) -> Load:
    """Read, and resample to the same field of view; in the file's type, which cuts off what follows the point."""
    import SimpleITK as sitk

    def load(file: Path) -> object:
        image = sitk.ReadImage(str(file), sitk.sitkFloat32 if as_float else sitk.sitkUnknown)
        old, size = np.array(image.GetSpacing()), np.array(image.GetSize())
        new_size = np.maximum(1, np.rint(size * old / SPACING_MM)).astype(int)
        new = size * old / new_size
        origin = image.TransformContinuousIndexToPhysicalPoint(((new / old - 1) / 2).tolist())
        direction, lowest = image.GetDirection(), -1024
        return sitk.Resample(
            image, new_size.tolist(), sitk.Transform(), sitk.sitkLinear, origin, new.tolist(), direction, lowest
        )

    return load


SIDES: dict[str, Callable[[], Load]] = {"medseg": medseg_side, "MONAI": monai_side, "SimpleITK": simpleitk_side}


def make_scan(file: Path, shape: tuple[int, ...]) -> None:
    """Air with a trace of noise, a body with organs and noise, compressed as converters do."""
    from medseg.data.volume_io import write_volume
    from medseg.geometry import Geometry, Volume

    random = np.random.default_rng(0)
    i, j = (np.linspace(-1, 1, n)[:, None, None] for n in shape[:2])
    body = ((i / 0.8) ** 2 + (np.swapaxes(j, 0, 1) / 0.55) ** 2 < 1)[..., 0]
    seen = (i**2 + np.swapaxes(j, 0, 1) ** 2 < 1)[..., 0]  # beyond the scanner's circle all is -1024
    organs = np.kron(random.normal(40, 60, [-(-n // 32) for n in shape]), np.ones((32, 32, 1)))[: shape[0], : shape[1]]
    voxels = np.empty((1, *shape), np.int16, order="F")
    for k in range(shape[2]):
        noise = random.normal(0, 1, shape[:2])
        plane = np.where(body, organs[..., k // 32] + 12 * noise, -1015 + 8 * noise)
        voxels[0, ..., k] = np.where(seen, plane.clip(-1024, 3071), -1024)
    affine = np.diag([-0.8, -0.8, 1.5, 1.0])
    affine[:3, 3] = 200, 180, -400
    plain = file.with_suffix("")
    write_volume(plain, Volume(voxels, Geometry(shape, affine)))
    with plain.open("rb") as source, gzip.open(file, "wb", compresslevel=6) as target:
        shutil.copyfileobj(source, target, 2**20)
    plain.unlink()


def status_mb(field: str) -> float:
    """Of this process: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(side: str, file: Path, small: Path, *, threads: int) -> dict[str, float]:
    """One run, in this process."""
    use_threads(threads)
    load = SIDES[side]()
    load(small)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = status_mb("VmRSS"), time.perf_counter()
    result = load(file)
    seconds = time.perf_counter() - start
    peak = status_mb("VmHWM") - before
    del result
    return {"seconds": seconds, "peak_mb": peak}


def use_threads(threads: int) -> None:
    """The same number for torch and ITK."""
    import SimpleITK as sitk
    import torch

    torch.set_num_threads(threads)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def compare(file: Path, *, threads: int) -> dict[str, float]:
    """How far the sides' values differ in the body, at the same millimetres."""
    import SimpleITK as sitk
    import torch
    from monai import transforms as mt

    use_threads(threads)
    ours = medseg_side()(file)
    by_itk = sitk.GetArrayFromImage(sitk.DICOMOrient(simpleitk_side(as_float=True)(file), "LPS")).transpose()[
        ::-1, ::-1
    ]
    place = mt.SpatialResample(mode="bilinear", padding_mode="border", align_corners=False)
    by_monai = place(
        mt.Compose(monai_reading())({"image": file})["image"], dst_affine=ours.affine, spatial_size=ours.shape[1:]
    )
    body = (ours[0] > BODY_HU).numpy()
    differences = {
        "MONAI": (by_monai - ours).as_tensor()[0].numpy()[body],
        "SimpleITK": (by_itk - ours[0].numpy())[body],
    }
    assert torch.equal(ours.affine, by_monai.affine)
    return {f"{name} {kind}": float(f(np.abs(d))) for name, d in differences.items() for kind, f in MEASURES.items()}


def child(*arguments: str) -> dict[str, float]:
    """What this script prints when another process runs it."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)  # else it holds MONAI's remarks on what else could be installed
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--file", type=Path, help="a scan of your own")
    parser.add_argument("--side", choices=[*SIDES, "compare"], help=argparse.SUPPRESS)
    parser.add_argument("--small", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "compare":
        print(json.dumps(compare(options.file, threads=options.threads)))
    elif options.side:
        print(json.dumps(measure(options.side, options.file, options.small, threads=options.threads)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            small, file = Path(folder, "small.nii.gz"), options.file or Path(folder, "scan.nii.gz")
            make_scan(small, (40, 40, 20))
            if not options.file:
                make_scan(file, tuple(options.shape))
            report(file, small, rounds=options.rounds, threads=options.threads)


def report(file: Path, small: Path, *, rounds: int, threads: int) -> None:
    """Take turns, and print what was found."""
    arguments = ["--file", str(file), "--small", str(small), "--threads", str(threads)]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    file.read_bytes()  # into the system's cache
    for _ in range(rounds):
        for side, found in runs.items():
            found.append(child("--side", side, *arguments))
    print(f"{rounds} rounds, {threads} threads; the file has {file.stat().st_size / 2**20:.0f} MB")
    print(f"{'':10s} {'seconds':>8s} {'range':>13s} {'to medseg':>10s} {'peak MB':>8s} {'to medseg':>10s}")
    ours = {key: median(run[key] for run in runs["medseg"]) for key in ("seconds", "peak_mb")}
    for side, found in runs.items():
        seconds, peak = sorted(run["seconds"] for run in found), median(run["peak_mb"] for run in found)
        print(
            f"{side:10s} {median(seconds):8.2f} {seconds[0]:5.2f} – {seconds[-1]:5.2f} "
            f"{median(seconds) / ours['seconds']:9.2f}× {peak:8.0f} {peak / ours['peak_mb']:9.2f}×"
        )
    for name, hu in child("--side", "compare", *arguments).items():
        print(f"difference in the body, {name}: {hu:.3f} HU")


if __name__ == "__main__":
    main()
