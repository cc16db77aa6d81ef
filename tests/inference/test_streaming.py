"""A prediction that streams is the one a plain program makes that holds everything: windows, resampling, decision."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg.data.transforms import Prepared
from medseg.geometry import Geometry
from medseg.inference.predictor import Predictor
from medseg.inference.resampling import STRIP_BYTES
from medseg.inference.windows import window_starts
from medseg.labels import Labels
from medseg.model import Intensity, ModelSpec, Preprocessing, Window
from medseg.nets.slices import OnSlices

from ..test_geometry_properties import MANY, ORIENTATIONS, grids

SOME = settings(MANY, max_examples=60)

CLEAR = 2e-3
"""Where labels differ, the two highest probabilities lie closer together than this."""

MOST_DIFFERING = 1e-5


class Net(nn.Module):
    """A small network with random weights whose output depends on neighbors and on the place in the patch."""

    extra_weights = ()

    def __init__(self, spatial_dims: int, in_channels: int, num_outputs: int) -> None:
        super().__init__()
        kind = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.body = nn.Sequential(kind(in_channels, 4, 3, padding=1), nn.ReLU(), kind(4, num_outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.body(x)


def labels_of(num_outputs: int, *, regions: bool) -> Labels:
    if regions:
        names = {n: f"label {n}" for n in range(num_outputs + 1)}
        nested = {f"region {n}": tuple(range(n, num_outputs + 1)) for n in range(1, num_outputs + 1)}
        return Labels(names, regions=nested, region_order=tuple(range(1, num_outputs + 1)))
    return Labels({n: f"label {n}" for n in range(num_outputs)})


def plain_labels(image: Tensor, network: nn.Module, window: Window, labels: Labels, grid: Geometry, source: Any) -> Any:
    """All logits of all windows in float32, resampled whole in float64; the label map, and by how much it won."""
    patch = list(window.patch_size)
    context = window.context_slices
    is_2d = len(patch) == 2
    if is_2d:
        patch.insert(window.slice_axis, 1)
    shape = image.shape[1:]
    pads = [max(0, p - n) for n, p in zip(shape, patch, strict=True)]
    before = [max(0, p // 2 - n // 2) if pad else 0 for n, p, pad in zip(shape, patch, pads, strict=True)]
    around = [x for b, p in zip(reversed(before), reversed(pads), strict=True) for x in (b, p - b)]
    padded = F.pad(image, around)
    whole = padded.shape[1:]
    starts = [
        range(n) if is_2d and axis == window.slice_axis else window_starts(n, p, window.overlap)
        for axis, (n, p) in enumerate(zip(whole, patch, strict=True))
    ]
    weight = torch.ones(patch)
    for axis, size in enumerate(patch):
        if window.weighting == "gaussian" and not (is_2d and axis == window.slice_axis):
            offset = torch.arange(size) - (size - 1) / 2
            weight *= torch.exp(-0.5 * (offset / (size / 8)) ** 2).reshape([-1 if a == axis else 1 for a in range(3)])
    total = torch.zeros(labels.num_outputs, *whole)
    sums = torch.zeros(whole)
    for corner in itertools.product(*starts):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        if is_2d and context:
            n = corner[window.slice_axis]
            wanted = torch.arange(n - context, n + context + 1).clamp(0, whole[window.slice_axis] - 1)
            seen = padded.index_select(1 + window.slice_axis, wanted)
            seen = seen[(slice(None), *(slice(None) if a == window.slice_axis else b for a, b in enumerate(box)))]
        else:
            seen = padded[(slice(None), *box)]
        total[(slice(None), *box)] += weight * network(seen[None])[0]
        sums[box] += weight
    logits = (total / sums)[(slice(None), *(slice(b, b + n) for b, n in zip(before, shape, strict=True)))]
    voxels = np.indices(source.shape).reshape(3, -1)
    world = source.affine[:3, :3] @ voxels + source.affine[:3, 3:]
    at = np.linalg.inv(grid.affine) @ np.vstack([world, np.ones(world.shape[1])])
    from scipy import ndimage

    values = np.stack([ndimage.map_coordinates(c.double().numpy(), at[:3], order=1, mode="nearest") for c in logits])
    if labels.regions:
        found = np.zeros(values.shape[1], int)
        for channel, value in enumerate(labels.region_order):
            found[values[channel] > 0] = value
        return found, 2 * np.abs(1 / (1 + np.exp(-values)) - 0.5).min(0)  # p and 1 - p
    chances = np.exp(values - values.max(0))
    chances /= chances.sum(0)
    best = np.sort(chances, axis=0)[-2:] if len(chances) > 1 else np.vstack([0 * chances, chances])
    return values.argmax(0), best[1] - best[0]


def check_streaming(
    spec: ModelSpec,
    network: nn.Module,
    source: Geometry,
    seed: int,
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    grid = spec.preprocessing.geometry(source)
    if np.prod(grid.shape) == 1:  # a single voxel shows nothing, and nothing is segmented in it
        return
    image = torch.randn((1, *grid.shape), generator=torch.Generator().manual_seed(seed))
    predictor = Predictor(spec, network, precision="fp32")
    strip_bytes = STRIP_BYTES["cpu"] if min(source.shape) > 20 else 400  # of small scans, too, more than one strip
    with torch.inference_mode():
        expected, lead = plain_labels(image, network.eval(), spec.window, spec.labels, grid, source)
    network.to(memory_format=layout)  # type: ignore[call-overload]  # which torch's stubs do not know
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(STRIP_BYTES, "cpu", strip_bytes)
        found = predictor.segment_prepared(Prepared(image.numpy(), None, source, grid)).label
    assert found.geometry is source
    differs = found.array.ravel() != expected
    assert (lead[differs] < CLEAR).all()
    assert differs.sum() <= max(1, MOST_DIFFERING * differs.size)


def spec_for(labels: Labels, window: Window, orientation: str, spacing_mm: Any, spatial_dims: int = 3) -> ModelSpec:
    return ModelSpec(
        network="net",
        network_args={},
        spatial_dims=spatial_dims,
        channels=("image",),
        labels=labels,
        preprocessing=Preprocessing(
            orientation=orientation, spacing_mm=spacing_mm, intensity=(Intensity(normalize="none"),)
        ),
        window=window,
    )


@SOME
@given(
    grids(sides=(1, 14)),
    st.sampled_from(ORIENTATIONS),
    st.one_of(st.none(), st.lists(st.floats(0.4, 4), min_size=3, max_size=3)),
    st.sampled_from([(1, True), (1, False), (2, False), (3, True), (5, False), (105, False)]),
    st.sampled_from([0.0, 0.3, 0.5, 0.75]),
    st.sampled_from(["gaussian", "constant"]),
    st.integers(1, 5),
)
def test_volumes_of_any_grid_get_the_plain_programs_labels(
    source: Geometry, orientation: str, factors: Any, outputs: Any, overlap: float, weighting: Any, batch_size: int
) -> None:
    num_outputs, regions = outputs
    if num_outputs == 1 and not regions:
        num_outputs, regions = 2, False
    spacing = Preprocessing(orientation=orientation).geometry(source).spacing_mm
    wanted = tuple(s * f for s, f in zip(spacing, factors, strict=True)) if factors else None
    spec = spec_for(labels_of(num_outputs, regions=regions), Window((4, 6, 5), overlap, weighting), orientation, wanted)
    torch.manual_seed(num_outputs)
    network = Net(3, 1, num_outputs)
    check_streaming(spec, network, source, seed=batch_size)


@SOME
@given(
    grids(sides=(1, 14)),
    st.sampled_from(ORIENTATIONS),
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from([(1, True), (3, False), (4, True), (105, False)]),
)
def test_slices_of_any_grid_get_the_plain_programs_labels(
    source: Geometry, orientation: str, slice_axis: int, context: int, outputs: Any
) -> None:
    num_outputs, regions = outputs
    window = Window((4, 6), slice_axis=slice_axis, context_slices=context)
    spec = spec_for(labels_of(num_outputs, regions=regions), window, orientation, None, spatial_dims=2)
    torch.manual_seed(num_outputs)
    network = OnSlices(Net(2, 1 + 2 * context, num_outputs), slice_axis, context)
    check_streaming(spec, network, source, seed=context)


@pytest.mark.parametrize("num_outputs", [2, 25, 105])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_larger_scan_with_a_real_network_gets_the_plain_programs_labels(
    num_outputs: int, layout: torch.memory_format
) -> None:
    from medseg.nets import NETS

    torch.manual_seed(0)
    network = NETS["unet"].network(spatial_dims=3, in_channels=1, out_channels=num_outputs, channels=(4, 8, 8))
    source = Geometry.from_spacing((52, 47, 60), (0.8, 0.8, 1.1)).oriented("LPS")
    spec = spec_for(labels_of(num_outputs, regions=False), Window((24, 24, 24)), "RAS", (1.5, 1.5, 1.5))
    check_streaming(spec, network, source, seed=0, layout=layout)
