import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from scipy import ndimage

from medseg.geometry import Geometry, Volume
from medseg.metrics.table import score_organs

ORGANS = {"liver": (1,), "spleen": (2,), "both": (1, 2)}
SPACING_MM = (1.0, 1.5, 2.0)


def blobs(seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(generator.normal(size=(3, 14, 13, 12)), (0, 2, 2, 2))
    fields = (noise[0] + noise[1] / 2, noise[0] + noise[2] / 2)
    return [np.digitize(field, np.quantile(field, [0.7, 0.87])).astype(np.uint8) for field in fields]


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning:monai")  # MONAI's own, about itself
@pytest.mark.parametrize("seed", range(3))
def test_distances_of_organs_and_unions_agree_with_monai(seed):
    maps = blobs(seed)
    reference, prediction = (Volume(label[None], Geometry.from_spacing(label.shape, SPACING_MM)) for label in maps)
    rows = score_organs("c", reference, prediction, ORGANS, metrics=["hd", "hd95", "assd"])
    for row, values in zip(rows, ORGANS.values(), strict=True):
        r, p = (torch.from_numpy(np.isin(label, values))[None, None].float() for label in maps)
        expected = {
            "hd": compute_hausdorff_distance(p, r, include_background=True, spacing=SPACING_MM),
            "hd95": compute_hausdorff_distance(p, r, include_background=True, percentile=95, spacing=SPACING_MM),
            "assd": compute_average_surface_distance(p, r, include_background=True, symmetric=True, spacing=SPACING_MM),
        }
        assert row.values == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-4)
