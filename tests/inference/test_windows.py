"""Windows that need no network: on the box around a patient, and without those in the air."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg.data.body import Body
from medseg.data.transforms import Prepared
from medseg.geometry import Geometry
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import slabs
from medseg.inference.windows import Windows
from medseg.labels import Labels
from medseg.model import Intensity, ModelSpec, Preprocessing, Window

LABELS = Labels({0: "background", 1: "a", 2: "b"})
REGIONS = Labels({0: "background", 1: "a", 2: "b"}, regions={"all": (1, 2), "b": (2,)}, region_order=(1, 2))


class Counting(nn.Module):
    """Neighbors matter; remembers how many windows it has seen."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv3d(1, num_outputs, 3, padding=1)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.layer(x)


def body(shape: tuple[int, ...], *sides: tuple[int, int]) -> Body:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return Body(mask, (1, 1, 1), shape)


def predicted(image: Tensor, windows: Windows, labels: Labels, network: nn.Module) -> Tensor:
    parts = [
        labels.segment(slab.planes)
        for slab in slabs(image, network, windows, background=labels.background, batch_size=3)
    ]
    return torch.cat(parts).movedim(0, windows.outer)


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
def test_windows_in_the_air_change_no_label_of_the_body(labels: Labels) -> None:
    shape = (40, 30, 50)
    image = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    inside = body(shape, (12, 20), (10, 22), (25, 41))
    window = Window((8, 8, 8))
    network = Counting(labels.num_outputs).eval()
    everywhere = Windows.over(shape, window)
    whole = predicted(image, everywhere, labels, network)
    network.seen = 0
    fewer = everywhere.touching(inside)
    part = predicted(image, fewer, labels, network)
    assert network.seen == fewer.num_computed < len(everywhere) / 3
    assert torch.equal(part[torch.from_numpy(inside.mask)], whole[torch.from_numpy(inside.mask)])
    assert not part[:10].any() and not part[..., :15].any() and not part[..., 49:].any()


def test_windows_stand_on_the_box_around_a_body_if_they_are_fewer_there() -> None:
    shape = (64, 64, 64)
    window = Window((16, 16, 16), crop="body")
    centered = Windows.over(shape, window, body=body(shape, (13, 29), (5, 40), (30, 62)))
    assert centered.box == (slice(13, 29), slice(5, 40), slice(30, 62))
    assert centered.num_computed == 1 * 4 * 3
    small = Windows.over(shape, window, body=body(shape, (0, 3), (62, 64), (30, 31)))
    assert all(side.stop - side.start == 16 for side in small.box)
    assert small.num_computed == 1
    in_place = Windows.over(shape, replace(window, crop="air"), body=body(shape, (13, 29), (5, 40), (30, 62)))
    assert [axis.starts for axis in in_place.axes] == [axis.starts for axis in Windows.over(shape, window).axes]
    assert in_place.num_in_air == len(in_place) - in_place.num_computed > 0
    everything = Windows.over(shape, window, body=body(shape, (0, 64), (0, 64), (0, 64)))
    assert everything.num_computed == len(everything) == len(Windows.over(shape, window))


def test_a_volume_smaller_than_the_patch_is_not_cropped() -> None:
    windows = Windows.over(
        (10, 40, 12), Window((16, 16, 16), crop="body"), body=body((10, 40, 12), (4, 6), (20, 24), (0, 12))
    )
    assert windows.box == (slice(0, 10), slice(14, 30), slice(0, 12))


def test_slices_keep_their_neighbors_and_those_in_the_air_are_passed_over() -> None:
    window = Window((16, 16), slice_axis=2, context_slices=1, crop="body")
    windows = Windows.over((40, 40, 9), window, body=body((40, 40, 9), (10, 20), (10, 20), (3, 5)))
    assert windows.box[2] == slice(0, 9)
    assert windows.num_computed == 2


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("spacing_mm", [None, (1.5, 1.5, 1.5)])
def test_around_the_box_there_is_background_on_the_scans_own_grid(labels: Labels, spacing_mm: object) -> None:
    source = Geometry.from_spacing((40, 36, 44), (1.0, 1.2, 1.1)).oriented("LPS")
    preprocessing = Preprocessing(spacing_mm=spacing_mm, intensity=(Intensity(normalize="none"),))  # type: ignore[arg-type]
    grid = preprocessing.geometry(source)
    center = [n // 2 for n in grid.shape]
    inside = body(grid.shape, *((c - 5, c + 5) for c in center))
    spec = ModelSpec("net", {}, 3, ("CT",), labels, preprocessing, Window((8, 8, 8), crop="body"))
    network = Counting(labels.num_outputs)
    network.layer.weight.data.zero_()
    network.layer.bias.data = torch.tensor([-1.0] * (labels.num_outputs - 1) + [1.0])  # label 2 wherever it looks
    image = np.random.default_rng(0).normal(size=(1, *grid.shape)).astype(np.float32)
    prepared = Prepared(image, None, source, grid, body=inside)
    found = Predictor(spec, network, precision="fp32").segment_prepared(prepared, with_probabilities=True)
    turned = found.label.oriented("RAS")
    at = turned.geometry
    world = np.indices(at.shape).reshape(3, -1).T @ at.affine[:3, :3].T + at.affine[:3, 3]
    index = (world - grid.affine[:3, 3]) @ np.linalg.inv(grid.affine[:3, :3]).T
    depth = np.min([np.minimum(index[:, a] - c + 5, c + 4 - index[:, a]) for a, c in enumerate(center)], axis=0)
    label = turned.array.ravel()
    assert (label[depth > 0] == 2).all() and not label[depth < -1.01].any()
    assert found.probabilities is not None
    sure = found.probabilities.oriented("RAS").array.reshape(labels.num_outputs, -1)[:, depth < -1.01]
    np.testing.assert_allclose(sure[0], 0 if labels.regions else 1, atol=1e-6)
    everywhere = replace(spec, window=replace(spec.window, crop="none"))
    assert (Predictor(everywhere, network, precision="fp32").segment_prepared(prepared).label.array == 2).all()
