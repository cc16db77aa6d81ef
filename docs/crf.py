"""Makes the picture of the fully connected CRF: a phantom's nuclei, a noisy prediction of them, and what the CRF makes of it.

python docs/crf.py docs/networks/crf.png
"""

from __future__ import annotations

import sys

import matplotlib.image
import numpy as np
import torch

from medseg.data.phantom import picture
from medseg.nets.crf import CRF, refine

SEED, SHAPE, ENLARGED = 3, (96, 96), 3
COLOR, OPACITY = np.array([255, 120, 0]), 0.55
GAP = 6


def main(file: str) -> None:
    """Predict, refine and draw."""
    case = picture(SEED, SHAPE)
    image = torch.from_numpy(case.image.array).float() / 128 - 1  # (3, I, J)
    truth = torch.from_numpy(case.label.array[0]) == 1
    torch.manual_seed(SEED)
    score = torch.where(truth, 1.0, -1.0) + 1.5 * torch.randn(SHAPE)
    logits = torch.stack([-score / 2, score / 2])
    refined = refine(logits, image, (1.0, 1.0), CRF(theta_beta=0.3)).logits
    panels = []
    for mask in (None, logits.argmax(0) == 1, refined.argmax(0) == 1):
        shown = np.moveaxis(case.image.array, 0, -1).astype(float)
        if mask is not None:
            shown[mask] = (1 - OPACITY) * shown[mask] + OPACITY * COLOR
            print(f"Dice {2 * (mask & truth).sum() / (mask.sum() + truth.sum()):.3f}")
        large = shown.transpose(1, 0, 2).repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)
        panels += [large, np.full((len(large), GAP, 3), 255.0)]
    matplotlib.image.imsave(file, np.concatenate(panels[:-1], axis=1).round().astype(np.uint8))


if __name__ == "__main__":
    main(sys.argv[1])
