"""Dice, HD95 and surface Dice of 25 organs: medseg beside monai.metrics and DeepMind's surface-distance.

    python benchmarks/metrics.py [--rounds 3] [--scans abdomen body] [--sides medseg MONAI surface-distance]

Two label maps are compared, of wobbly ellipsoids: the prediction's boundary lies a few millimetres off, every fifth
organ lacks its tip, another fifth has an island elsewhere. `body` adds organs as large as they come. Each run has a
process of its own and one thread, warmed up on a corner of the scan; the sides take turns. Times are of CPU: with one
thread they are those on the clock of a quiet machine, and also hold on a busy one. Memory is what the process adds at
its peak. MONAI and surface-distance get the masks of one organ after the other, which is the least that they can do with.

medseg's HD95 is MONAI's, its surface Dice that of surface-distance; with ``by_area=False`` it is MONAI's too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_ORGANS = 25
TOLERANCE_MM = 2.0
LabelMap = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.float64]
Side = Callable[[LabelMap, LabelMap, Sequence[float]], Scores]


@dataclass(frozen=True)
class Scan:
    """What is compared."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    large_mm: tuple[tuple[float, float, float], ...] = ()  # half axes of the organs painted first


SCANS = {
    "abdomen": Scan((256, 256, 160), (1.5, 1.5, 2.0)),
    "body": Scan((512, 512, 300), (0.8, 0.8, 1.5), ((180, 130, 215), (95, 75, 80), (55, 75, 120), (55, 75, 120))),
}
"""The body, the liver and two lungs in the second."""


def label_maps(scan: Scan) -> tuple[LabelMap, LabelMap]:
    """Reference and prediction; later organs cover earlier ones."""
    random = np.random.default_rng(0)
    reference, prediction = (np.zeros(scan.shape, np.uint8) for _ in range(2))
    extent = np.array(scan.shape) * scan.spacing_mm
    for organ in range(1, NUM_ORGANS + 1):
        large = organ <= len(scan.large_mm)
        half_axes = np.array(scan.large_mm[organ - 1]) if large else np.exp(random.uniform(*np.log([8, 45]), 3))
        center = extent / 2 if large and organ == 1 else extent * random.uniform(0.25, 0.75, 3)
        phases = random.uniform(0, 6, 3)
        paint(reference, organ, center, half_axes, phases, scan.spacing_mm)
        # The prediction's phases differ by what moves the boundary a few millimetres.
        off = center + random.normal(0, 0.7, 3)
        wobbled = phases + random.normal(0, 0.5, 3)
        paint(prediction, organ, off, half_axes, wobbled, scan.spacing_mm, lacks_tip=organ % 5 == 0)
        if organ % 5 == 1:
            island = extent * random.uniform(0.3, 0.7, 3)
            paint(prediction, organ, island, np.full(3, 5.0), phases, scan.spacing_mm)
    return reference, prediction


def paint(
    label: LabelMap,
    organ: int,
    center: npt.NDArray[np.float64],
    half_axes: npt.NDArray[np.float64],
    phases: npt.NDArray[np.float64],
    spacing_mm: Sequence[float],
    *,
    lacks_tip: bool = False,
) -> None:
    """Draw a wobbly ellipsoid, in mm."""
    low = np.maximum(0, (center - 1.3 * half_axes) / spacing_mm).astype(int)
    high = np.minimum(label.shape, (center + 1.3 * half_axes) / spacing_mm + 2).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    along = [(axis * mm).astype(np.float32) for axis, mm in zip(np.ogrid[box], spacing_mm, strict=True)]
    radius = sum(((x - c) / r) ** 2 for x, c, r in zip(along, center, half_axes, strict=True))
    wobble = sum(1.2 * np.sin(x / 9 + phase) for x, phase in zip(along, phases, strict=True))
    inside = np.sqrt(radius) + wobble / half_axes.mean() < 1
    if lacks_tip:
        inside &= along[0] < center[0] + 0.7 * half_axes[0]
    label[box][inside] = organ


def medseg_side(*, by_area: bool = True) -> Side:
    """All organs are counted in one pass, and found in one pass."""
    from medseg.metrics.confusion import count, dice
    from medseg.metrics.surface import bounding_boxes, surface_distances

    organs = {str(value): (value,) for value in range(1, NUM_ORGANS + 1)}

    def score(reference: LabelMap, prediction: LabelMap, spacing_mm: Sequence[float]) -> Scores:
        counts = count(reference, prediction, organs)
        boxes = bounding_boxes(reference, prediction, organs)
        rows = []
        for organ, (value,) in organs.items():
            masks = (labels[boxes[organ]] == value for labels in (reference, prediction))
            surfaces = surface_distances(*masks, spacing_mm)
            surface_dice = surfaces.surface_dice(TOLERANCE_MM, by_area=by_area)
            rows.append([dice(counts[organ]), surfaces.hausdorff(95), surface_dice])
        return np.array(rows)

    return score


def monai_side() -> Side:
    """Its functions."""
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    torch.set_num_threads(1)

    def score(reference: LabelMap, prediction: LabelMap, spacing_mm: Sequence[float]) -> Scores:
        rows = []
        for value in range(1, NUM_ORGANS + 1):
            pair = [torch.from_numpy(labels == value)[None, None] for labels in (prediction, reference)]
            same: dict[str, Any] = {"include_background": True}
            dice = compute_dice(*pair, **same)
            same["spacing"] = tuple(spacing_mm)
            hd95 = compute_hausdorff_distance(*pair, percentile=95, **same)
            surface_dice = compute_surface_dice(*pair, [TOLERANCE_MM], **same)
            rows.append([float(dice), float(hd95), float(surface_dice)])
        return np.array(rows)

    return score


def surface_distance_side() -> Side:
    """DeepMind's functions."""
    import surface_distance as peer

    def score(reference: LabelMap, prediction: LabelMap, spacing_mm: Sequence[float]) -> Scores:
        rows = []
        for value in range(1, NUM_ORGANS + 1):
            pair = reference == value, prediction == value
            distances = peer.compute_surface_distances(*pair, spacing_mm)
            hd95 = peer.compute_robust_hausdorff(distances, 95)
            surface_dice = peer.compute_surface_dice_at_tolerance(distances, TOLERANCE_MM)
            rows.append([peer.compute_dice_coefficient(*pair), hd95, surface_dice])
        return np.array(rows)

    return score


SIDES: dict[str, Callable[[], Side]] = {
    "medseg": medseg_side,
    "MONAI": monai_side,
    "surface-distance": surface_distance_side,
    "medseg, as MONAI": lambda: medseg_side(by_area=False),
}
SAME = [  # what is one number by two sides' definitions: its column
    ("Dice", 0, "medseg", "MONAI"),
    ("HD95, mm", 1, "medseg", "MONAI"),
    ("surface Dice", 2, "medseg, as MONAI", "MONAI"),
    ("Dice", 0, "medseg", "surface-distance"),
    ("surface Dice", 2, "medseg", "surface-distance"),
]


def measure(side: str, scan: Scan, folder: Path) -> dict[str, Any]:
    """One run, in this process."""
    warnings.simplefilter("ignore")  # surface-distance calls SciPy by names that are going
    score = SIDES[side]()
    reference, prediction = (np.load(folder / f"{name}.npy") for name in ("reference", "prediction"))
    corner = np.s_[100:150, 100:150, 60:90]
    with np.errstate(all="ignore"):
        warm_up(score, reference[corner].copy(), prediction[corner].copy(), scan)
        before, start = status_mb("VmRSS"), time.process_time()
        scores = score(reference, prediction, scan.spacing_mm)
        seconds, peak = time.process_time() - start, status_mb("VmHWM")
    return {"seconds": seconds, "mb": peak - before, "scores": scores.tolist()}


def warm_up(score: Side, reference: LabelMap, prediction: LabelMap, scan: Scan) -> None:
    """Every organ is there, so that no side meets an empty mask, which some take badly."""
    for label in (reference, prediction):
        label.flat[: 100 * NUM_ORGANS : 100] = np.arange(1, NUM_ORGANS + 1)
    score(reference, prediction, scan.spacing_mm)


def status_mb(field: str) -> float:
    """Of this process: ``VmRSS`` now, ``VmHWM`` at its peak (``ru_maxrss`` would start at the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def child(side: str, scan: str, folder: str) -> dict[str, Any]:
    """What this script prints when another process runs it."""
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    command = [sys.executable, __file__, "--child", side, scan, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
    if done.returncode:
        sys.exit(done.stderr)  # else it holds MONAI's remarks on what else could be installed
    return json.loads(done.stdout.splitlines()[-1])


def report(name: str, sides: Sequence[str], *, rounds: int) -> None:
    """Take turns, and print what was found."""
    scan = SCANS[name]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for label, kind in zip(label_maps(scan), ("reference", "prediction"), strict=True):
            np.save(Path(folder, f"{kind}.npy"), label)
        for _ in range(rounds):
            for side, found in runs.items():
                found.append(child(side, name, folder))
    print(f"\n{name}: {'×'.join(map(str, scan.shape))} voxels of {scan.spacing_mm} mm, {NUM_ORGANS} organs\n")
    print("| | CPU seconds (range) | to medseg | peak MB |\n|---|---|---|---|")
    ours = median(run["seconds"] for run in runs[sides[0]])
    for side, found in runs.items():
        seconds = sorted(run["seconds"] for run in found)
        print(
            f"| {side} | {median(seconds):.3f} ({seconds[0]:.3f} – {seconds[-1]:.3f}) "
            f"| {median(seconds) / ours:.1f} × | {median(run['mb'] for run in found):.0f} |"
        )
    print()
    scores = {side: np.array(found[0]["scores"]) for side, found in runs.items()}
    for metric, column, one, other in SAME:
        if one in scores and other in scores:
            differences = np.abs(scores[one][:, column] - scores[other][:, column])
            print(f"{metric}, {one} and {other}: greatest difference {differences.max():.1e}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scans", nargs="+", choices=SCANS, default=list(SCANS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "SCAN", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, scan, folder = options.child
        print(json.dumps(measure(side, SCANS[scan], Path(folder))))
        return
    for name in options.scans:
        report(name, options.sides, rounds=options.rounds)


if __name__ == "__main__":
    main()
