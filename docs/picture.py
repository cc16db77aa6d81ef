"""Makes the README's picture: a model segments a synthetic CT it has never seen, at a finer resolution than it was trained on.

python docs/picture.py RUN docs/phantom_liver.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.image

from medseg.build.model import predictor
from medseg.data.phantom import ct_case
from medseg.reporting.overlay import contour_picture

SEED, SHAPE = 17, (320, 320, 90)


def main(run: str, path: Path) -> None:
    """Segment the case and draw it."""
    case = ct_case(SEED, SHAPE)
    model = predictor(run)
    found = model.segment([case.image]).label.oriented("RAS")
    image, reference = case.image.oriented("RAS"), case.label.oriented("RAS")
    picture = contour_picture(
        image.array[0],
        reference.array[0],
        found.array[0],
        labels=model.spec.labels,
        spacing_mm=image.geometry.spacing_mm,
        window=(-110, 190),
        title="synthetic CT, held out: reference thin, prediction thick",
    )
    matplotlib.image.imsave(path, picture)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
