"""The CRF: exact and windowed beside the formula in float64 with all pairs in one matrix, and beside pydensecrf if it is installed.

python benchmarks/crf.py --side 40 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from medseg.nets.crf import CRF, refine

CLASSES = 3
USUAL = CRF()


def phantom(side: int, dims: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two objects, an image of them, and logits that noise has spoiled."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*[np.linspace(-1, 1, side)] * dims, indexing="ij")
    label = (sum(x**2 for x in axes) < 0.6).astype(np.int64)
    label[sum(np.abs(x - 0.1) for x in axes) < 0.3 * dims] = 2
    image = (label + rng.normal(0, 0.2, label.shape))[None].astype(np.float32)
    logits = 2 * np.stack([label == n for n in range(CLASSES)]) + rng.normal(0, 1.5, (CLASSES, *label.shape))
    return label, image, logits.astype(np.float32)


def formula(logits: np.ndarray, image: np.ndarray) -> np.ndarray:
    """All pairs at once."""
    num = image[0].size
    place = np.indices(image.shape[1:]).reshape(image.ndim - 1, num).T.astype(np.float64)
    color = image.reshape(len(image), num).T / np.float64(USUAL.theta_beta)

    def apart(x: np.ndarray) -> np.ndarray:
        return ((x[:, None] - x) ** 2).sum(-1)

    distance = apart(place)
    total = np.zeros((num, num))
    for weight, kernel in (
        (USUAL.appearance_weight, np.exp(-distance / (2 * USUAL.theta_alpha_mm**2) - apart(color) / 2)),
        (USUAL.smoothness_weight, np.exp(-distance / (2 * USUAL.theta_gamma_mm**2))),
    ):
        scale = kernel.sum(1) ** -0.5
        total += weight * scale[:, None] * kernel * scale
    np.fill_diagonal(total, 0)
    unary = logits.reshape(CLASSES, num).astype(np.float64)
    chances = _softmax(unary)
    for _ in range(USUAL.iterations):
        chances = _softmax(unary + chances @ total)
    return chances.reshape(logits.shape)


def ours(connections: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Medseg's, with all pairs or in windows."""
    crf = CRF(connections=connections)

    def compute(logits: np.ndarray, image: np.ndarray) -> np.ndarray:
        spacing_mm = (1.0,) * (image.ndim - 1)
        return refine(torch.from_numpy(logits), torch.from_numpy(image), spacing_mm, crf).logits.softmax(0).numpy()

    return compute


def pydensecrf(logits: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The authors' C++ with its permutohedral lattice, an approximation of all pairs."""
    from pydensecrf.densecrf import DenseCRF  # type: ignore[import-not-found]
    from pydensecrf.utils import create_pairwise_bilateral, create_pairwise_gaussian  # type: ignore[import-not-found]

    shape, dims = image.shape[1:], image.ndim - 1
    crf = DenseCRF(image[0].size, CLASSES)
    crf.setUnaryEnergy(np.ascontiguousarray(-logits.reshape(CLASSES, -1)))
    smooth = create_pairwise_gaussian(sdims=(USUAL.theta_gamma_mm,) * dims, shape=shape)
    alike = create_pairwise_bilateral(
        sdims=(USUAL.theta_alpha_mm,) * dims, schan=(USUAL.theta_beta,), img=image[0], chdim=-1
    )
    crf.addPairwiseEnergy(smooth, compat=USUAL.smoothness_weight)
    crf.addPairwiseEnergy(alike, compat=USUAL.appearance_weight)
    return np.array(crf.inference(USUAL.iterations)).reshape(logits.shape)


def _softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(0))
    return x / x.sum(0)


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    """The mean of both objects."""
    scores = [2 * ((found == n) & (truth == n)).sum() / ((found == n).sum() + (truth == n).sum()) for n in (1, 2)]
    return float(np.mean(scores))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=40)
    parser.add_argument("--dims", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    truth, image, logits = phantom(options.side, options.dims)
    sides: dict[str, Any] = {"exact": ours("all"), "windowed": ours("window")}
    if truth.size <= 8000:  # its matrices: 8 bytes for each pair
        sides["the formula"] = formula
    if find_spec("pydensecrf"):
        sides["pydensecrf"] = pydensecrf
    if truth.size > 40000:
        del sides["exact"]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found = {}
    for _ in range(options.rounds):
        for name, compute in sides.items():
            started = time.process_time()
            found[name] = compute(logits, image)
            seconds[name].append(time.process_time() - started)
    first = statistics.median(seconds["windowed"])
    reference = found.get("the formula", found.get("exact"))
    print(f"{truth.shape} voxels, {CLASSES} labels; Dice of the logits {dice(logits.argmax(0), truth):.3f}")
    print("| | CPU seconds (range) | to windowed | Dice | largest difference |\n|---|---|---|---|---|")
    for name, times in seconds.items():
        apart = "" if reference is None else f"{np.abs(found[name] - reference).max():.1e}"
        print(
            f"| {name} | {statistics.median(times):.3f} ({min(times):.3f} – {max(times):.3f}) | "
            f"{statistics.median(times) / first:.1f} × | {dice(found[name].argmax(0), truth):.3f} | {apart} |"
        )


if __name__ == "__main__":
    main()
