"""Passing over the air around a patient: what it saves, and whether labels stay what they were.

    python benchmarks/crop.py MODEL SCAN... [--phantoms 10] [--device cpu]

Each scan is segmented three times in fp32: with all windows; with the same windows but those in the air passed over,
where no voxel of the body may change (`--crop air`, what `medseg predict` does); and on the box around the body
(`--crop body`), where windows stand elsewhere and labels are compared by Dice. Phantoms are whole abdomens, 192 × 192 × 96 voxels.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medseg.build.model import predictor as loaded
from medseg.data.phantom.cases import ct_case
from medseg.data.sources import Source
from medseg.data.transforms import Prepared
from medseg.inference.predictor import Predictor

Labels = npt.NDArray[np.integer]


def segmented(predictor: Predictor, prepared: Prepared) -> tuple[Labels, int, float]:
    """Labels, windows that were computed, and seconds."""
    started = time.perf_counter()
    found = predictor.segment_prepared(prepared)
    return found.label.array[0], found.num_windows, time.perf_counter() - started


def dice(a: Labels, b: Labels, value: int) -> float:
    """Of one label."""
    sizes = (a == value).sum() + (b == value).sum()
    return float(2 * ((a == value) & (b == value)).sum() / sizes) if sizes else float("nan")


def inside(prepared: Prepared) -> Labels:
    """The body's blocks on the scan's own grid, by nearest neighbor."""
    assert prepared.body is not None
    grid, source, body = prepared.geometry, prepared.source, prepared.body
    voxels = np.indices(source.shape).reshape(3, -1)
    to_grid = np.linalg.inv(grid.affine) @ source.affine
    index = np.rint(to_grid[:3, :3] @ voxels + to_grid[:3, 3:]).astype(int)
    blocks = [
        (i.clip(0, n - 1) // b).clip(0, m - 1)
        for i, n, b, m in zip(index, grid.shape, body.block, body.mask.shape, strict=True)
    ]
    return body.mask[tuple(blocks)].reshape(source.shape)


def main() -> None:
    """Segment and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("scans", nargs="*", type=Path)
    parser.add_argument("--phantoms", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.getLogger("medseg").setLevel(logging.ERROR)
    everywhere = loaded(options.model, device=options.device, precision="fp32", crop="none")
    in_place = loaded(options.model, device=options.device, precision="fp32", crop="air")
    on_box = loaded(options.model, device=options.device, precision="fp32", crop="body")
    cases: list[tuple[str, Source]] = [(path.name, path) for path in options.scans]
    cases += [(f"phantom {n}", ct_case(1000 + n, (192, 192, 96)).image) for n in range(options.phantoms)]
    print(
        "| scan | windows: all, in place, box | seconds | changed in the body | Dice on the box |\n|---|---|---|---|---|"
    )
    for name, scan in cases:
        prepared = on_box.prepare([scan], any_modality=True)
        if prepared.body is None:
            print(f"| {name} | no body told from the air |")
            continue
        whole, num_all, seconds = segmented(everywhere, replace(prepared, body=None))
        same, num_same, seconds_same = segmented(in_place, prepared)
        box, num_box, seconds_box = segmented(on_box, prepared)
        changed = int(((same != whole) & inside(prepared)).sum())
        organs = everywhere.spec.labels.names
        told = ", ".join(f"{organs[v]} {dice(whole, box, v):.4f} of {(whole == v).sum()}" for v in organs if v)
        print(
            f"| {name} | {num_all}, {num_same}, {num_box} | {seconds:.1f}, {seconds_same:.1f}, {seconds_box:.1f} "
            f"| {changed} of {int(inside(prepared).sum())} | {told} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
