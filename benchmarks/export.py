"""The way back: from logits on the network's grid to a label map on the scan's grid, in a file.

    PYTHONPATH=NNUNET python benchmarks/export.py [--shape 512 512 300] [--spacing 0.8 0.8 1.0] [--classes 25 105]
        [--rounds 3] [--threads 0] [--sides medseg nnunet nnunet_torch monai] [--gib 24]

Logits are random but smooth (coarse random numbers, interpolated), on a grid of 1.5 mm. medseg is given them in slabs
of 48 planes, as its windows finish them; the time to make a slab is not counted, its memory is. The others need all at
once: nnU-Net's export_prediction_from_logits (nnunetv2, wherever Python finds it) in half precision, which its
predictor adds them up in, its default functions resampling or resample_torch_fornnunet (nnunet_torch); MONAI's Invertd,
AsDiscreted and SaveImaged in float32. Each writes a .nii.gz of bytes.

Each run has a process of its own in which everything is imported before the clock starts; memory is what the process
adds from there on at its peak, the logits included (VmHWM, set back, − VmRSS). A peer that by its arrays (`bytes_of`)
would need more than --gib, or more than is free, is not run, and said so; one that is run may not go beyond (RLIMIT_DATA).
The last column is the share of voxels labelled as by medseg: rounding to half precision decides near ties, and MONAI's
Spacingd puts voxels elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from inference import SPACING_MM, agreement, memory, nnunet_plans
from torch import Tensor

from medseg.geometry import Geometry, Volume
from medseg.labels import Labels

SIDES = ("medseg", "nnunet", "nnunet_torch", "monai")
AXIS = 2
"""Of the network's grid, along which slabs come: towards the head."""
PLANES = 48
COARSE_MM = 20.0

Run = Callable[[], dict[str, float]]
"""Does it once; seconds, and those of the processor."""


def grids(options: argparse.Namespace) -> tuple[Geometry, Geometry]:
    """The scan's and the network's."""
    scan = Geometry.from_spacing(options.shape, options.spacing)
    return scan, scan.resampled(SPACING_MM)


class Logits:
    """Random smooth logits (R, I, J, K), some planes at a time.

    Args:
        num_classes: R.
        grid: Where they are; it tells how smooth.
        shape: Of another grid over the same field of view, instead.
    """

    def __init__(self, num_classes: int, grid: Geometry, shape: Sequence[int] | None = None) -> None:
        self.shape = tuple(shape or grid.shape)
        across = [max(4, round(n * s / COARSE_MM)) for n, s in zip(grid.shape, grid.spacing_mm, strict=True)]
        self.coarse = torch.randn(across[AXIS], num_classes, *across[:AXIS], generator=torch.Generator().manual_seed(0))

    def plane(self, number: int) -> Tensor:
        """(R, I, J), float32."""
        place = number * (len(self.coarse) - 1) / max(1, self.shape[AXIS] - 1)
        below = min(int(place), len(self.coarse) - 2)
        plane = torch.lerp(self.coarse[below], self.coarse[below + 1], place - below)
        return F.interpolate(plane[None], size=self.shape[:AXIS], mode="bilinear", align_corners=True)[0]

    def slabs(self) -> Iterator[tuple[int, Tensor]]:
        """The number of the first plane, and planes (P, R, I, J), in memory that is used again for the next ones."""
        slab = torch.empty(PLANES, *self.coarse.shape[1:2], *self.shape[:AXIS])
        for first in range(0, self.shape[AXIS], PLANES):
            count = min(PLANES, self.shape[AXIS] - first)
            for n in range(count):
                slab[n] = self.plane(first + n)
            yield first, slab[:count]

    def whole(self, dtype: torch.dtype, *, turned: bool = False) -> Tensor:
        """All of them, (R, I, J, K) or (R, K, J, I), in one piece of memory."""
        shape = self.shape[::-1] if turned else self.shape
        logits = torch.empty((self.coarse.shape[1], *shape), dtype=dtype)
        planes = logits.permute(1, 0, 3, 2) if turned else logits.permute(3, 0, 1, 2)  # (K, R, I, J)
        for number in range(self.shape[AXIS]):
            planes[number] = self.plane(number)
        return logits


class Watch:
    """Seconds by the clock and of the processor since it was made, but for those in pauses."""

    def __init__(self) -> None:
        self.started = np.array(now())

    @property
    def took(self) -> dict[str, float]:
        seconds, cpu = now() - self.started
        return {"seconds": seconds, "cpu": cpu}

    def pausing(self, slabs: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """Stop while the next one is made."""
        while True:
            before = np.array(now())
            slab = next(slabs, None)
            self.started += now() - before
            if slab is None:
                return
            yield slab


def now() -> tuple[float, float]:
    """Seconds by the clock, and of the processor."""
    return time.perf_counter(), time.process_time()


def medseg_side(options: argparse.Namespace, logits: Logits, file: Path) -> Run:
    """Slabs in, planes out, the label map as `medseg predict` writes it."""
    from medseg.data.volume_io import write_volume

    scan, grid = grids(options)
    labels = Labels({n: f"organ {n}" if n else "background" for n in range(options.classes)})

    def run() -> dict[str, float]:
        watch = Watch()
        write_volume(file, way_back(watch.pausing(logits.slabs()), labels, grid, scan))
        return watch.took

    return run


def way_back(slabs: Iterator[tuple[int, Tensor]], labels: Labels, grid: Geometry, scan: Geometry) -> Volume:
    """The functions under test."""
    from medseg.inference.resampling import resampled
    from medseg.inference.restore import Place, restored
    from medseg.inference.sliding_window import Slab

    place = Place(scan, "RAS", AXIS)
    strips = resampled(
        (Slab(first, 0, planes) for first, planes in slabs),
        labels.background,
        box=tuple(slice(0, n) for n in grid.shape),
        grid=grid,
        target=place.target,
        axis=AXIS,
    )
    with torch.inference_mode():
        return restored(strips, labels, place)


def nnunet_side(options: argparse.Namespace, logits: Logits, file: Path, *, by_torch: bool) -> Run:
    """nnU-Net keeps scans as (z, y, x)."""
    os.environ["nnUNet_def_n_proc"] = str(torch.get_num_threads())  # noqa: SIM112  (its spelling; its own is 8)
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    scan, _ = grids(options)
    plans, dataset = nnunet_plans(argparse.Namespace(patch=96, classes=options.classes), by_torch=by_torch)
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    _ = manager.image_reader_writer_class, configuration.resampling_fn_probabilities  # found by importing all there are
    shape = scan.shape[::-1]
    origin, spacing, direction = scan.lps()
    properties = {
        "sitk_stuff": {"spacing": spacing, "origin": origin, "direction": direction}, "spacing": list(spacing[::-1]),
        "shape_before_cropping": shape, "bbox_used_for_cropping": [[0, n] for n in shape],
        "shape_after_cropping_and_before_resampling": shape,
    }  # fmt: skip
    whole = logits.whole(torch.half, turned=True).numpy()
    output = str(file).removesuffix(".nii.gz")

    def run() -> dict[str, float]:
        watch = Watch()
        export_prediction_from_logits(whole, properties, configuration, manager, dataset, output)
        return watch.took

    return run


def monai_side(options: argparse.Namespace, _: Logits, file: Path) -> Run:
    """Invertd of the transforms that the scan went through, as MONAI's bundles do it; its grid may be a voxel larger."""
    from monai import transforms as mt
    from monai.data import MetaTensor

    scan, grid = grids(options)
    image = MetaTensor(
        torch.zeros(1, *scan.shape), affine=torch.tensor(scan.affine), meta={"filename_or_obj": file.name}
    )
    before = mt.Compose([mt.Spacingd("image", SPACING_MM, mode="bilinear", dtype=np.float32)])
    data = before({"image": image})
    save = mt.SaveImaged(
        "pred", output_dir=file.parent, output_postfix="", output_dtype=np.uint8, resample=False,
        separate_folder=False, print_log=False,
    )  # fmt: skip
    after = mt.Compose([mt.Invertd("pred", before, orig_keys="image"), mt.AsDiscreted("pred", argmax=True), save])
    data["pred"] = MetaTensor(Logits(options.classes, grid, data["image"].shape[1:]).whole(torch.float32))

    def run() -> dict[str, float]:
        watch = Watch()
        after(data)
        return watch.took

    return run


def bytes_of(side: str, options: argparse.Namespace, num_classes: int) -> float:
    """What a peer holds at its peak, by its arrays: logits, and those on the scan's grid."""
    scan, grid = grids(options)
    old, new = num_classes * grid.num_voxels, num_classes * scan.num_voxels
    return {
        "medseg": 0.0,
        "nnunet": 2 * old + max(8 * old + 2 * new, 4 * new),  # half; a copy in double; half, which argmax copies
        "nnunet_torch": 2 * old + 8 * new,  # half; single, which argmax copies
        "monai": 4 * old + 4 * new,  # single
    }[side]


def work(options: argparse.Namespace) -> None:
    """One side once, in this process: says what it took."""
    if options.threads:
        torch.set_num_threads(options.threads)
    limit = int(options.gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    options.classes = options.classes[0]
    _, grid = grids(options)
    file = options.output / f"{options.work}.nii.gz"
    sides: dict[str, Callable[..., Run]] = {
        "medseg": medseg_side,
        "nnunet": lambda *given: nnunet_side(*given, by_torch=False),
        "nnunet_torch": lambda *given: nnunet_side(*given, by_torch=True),
        "monai": monai_side,
    }
    warm_up(options, sides[options.work])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = memory("VmRSS")
    run = sides[options.work](options, Logits(options.classes, grid), file)
    took = run()
    print(json.dumps({**took, "mb": (memory("VmHWM") - before) / 1e6}))


def warm_up(options: argparse.Namespace, side: Callable[..., Run]) -> None:
    """All that is imported late, by a small scan."""
    small = argparse.Namespace(**(vars(options) | {"shape": [32, 32, 32], "classes": 2}))
    with tempfile.TemporaryDirectory() as folder:
        side(small, Logits(2, grids(small)[1]), Path(folder, "small.nii.gz"))()


def main() -> None:
    """Run the sides in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 300])
    parser.add_argument("--spacing", type=float, nargs=3, default=[0.8, 0.8, 1.0])
    parser.add_argument("--classes", type=int, nargs="+", default=[25, 105])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--gib", type=float, default=24.0, help="memory that a side may use")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    print("| classes | | seconds (range) | to the first side | CPU seconds | peak MB | to the first side | voxels |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        options.output = Path(temporary)
        for num_classes in options.classes:
            compare(options, num_classes)


def compare(options: argparse.Namespace, num_classes: int) -> None:
    """A line for each side."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    failed: dict[str, str] = {}
    for _ in range(options.rounds):
        for side in options.sides:
            room = min(options.gib * 2**30, free())
            needed = bytes_of(side, options, num_classes)
            if needed > room:
                failed[side] = f"not run: needs {needed / 2**30:.1f} GiB or more of {room / 2**30:.1f}"
                continue
            words = [sys.executable, __file__, *sys.argv[1:], "--classes", str(num_classes), "--gib", str(room / 2**30)]
            done = subprocess.run(
                [*words, "--output", str(options.output), "--work", side], capture_output=True, text=True, check=False
            )
            if done.returncode:
                failed[side] = f"ended with {done.returncode}: {[*done.stderr.splitlines(), ''][-2][:90]}"
                continue
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{num_classes} {side}: {found[side][-1]}", file=sys.stderr)
    first = next((runs for runs in found.values() if runs), [])
    for side, runs in found.items():
        if not runs:
            print(f"| {num_classes} | {side} | {failed[side]} | | | | | |")
            continue
        seconds = sorted(run["seconds"] for run in runs)
        slower = median(seconds) / median(run["seconds"] for run in first)
        peak, peak_of_first = (max(run["mb"] for run in of) for of in (runs, first))
        alike = "" if side == "medseg" else agreement(*(options.output / f"{n}.nii.gz" for n in (side, "medseg")))
        print(
            f"| {num_classes} | {side} | {median(seconds):.2f} ({seconds[0]:.2f}–{seconds[-1]:.2f}) | {slower:.2f} × "
            f"| {median(run['cpu'] for run in runs):.2f} | {peak:.0f} | {peak / peak_of_first:.1f} × | {alike} |",
            flush=True,
        )


def free() -> int:
    """Bytes of memory that nobody uses."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


if __name__ == "__main__":
    main()
