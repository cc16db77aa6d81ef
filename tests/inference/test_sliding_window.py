import itertools

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from medseg.errors import ModelError
from medseg.inference.sliding_window import _Blended as Blended
from medseg.inference.sliding_window import slabs
from medseg.inference.windows import Windows, window_starts
from medseg.model import Window
from medseg.nets.slices import OnSlices

from .whole import sliding_window


class Pointwise(nn.Module):
    """Logits that depend on each voxel alone: however windows lie, the result is the same."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], -2 * x[:, :1], x.sum(1, keepdim=True)], dim=1)


class Ramp(nn.Module):
    """Logits that depend on the place within the patch: seams show."""

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.arange(x[0, 0].numel(), dtype=x.dtype).reshape(x.shape[2:])
        return (x + ramp).repeat(1, 3, *[1] * (x.ndim - 2))


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(20, 17, 30), (5, 6, 7), (8, 3, 40), (1, 1, 1)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("weighting", ["gaussian", "constant"])
def test_a_pointwise_network_gives_the_same_in_windows_as_at_once(shape, overlap, weighting):
    volume = image(2, *shape)
    window = Window((8, 6, 10), overlap=overlap, weighting=weighting)
    logits = sliding_window(volume, Pointwise(), window, num_outputs=3, batch_size=3)
    in_bands = sliding_window(volume, Pointwise(), window, num_outputs=3, batch_size=2, in_bands=True)
    torch.testing.assert_close(in_bands, logits)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, Pointwise()(volume[None])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("in_bands", [False, True])
@pytest.mark.parametrize("shape", [(64, 48, 90), (30, 90, 33), (16, 20, 20)])
def test_no_more_is_held_than_the_plan_says(shape, in_bands, monkeypatch):
    held = []

    def counting(blended: Blended, *block: slice) -> Tensor:
        made = block_of(blended, *block)
        held.append(sum(block.numel() for block in blended.blocks.values()))
        return made

    block_of = Blended._block
    monkeypatch.setattr(Blended, "_block", counting)
    windows = Windows.over(shape, Window((16, 16, 16)))
    passed = slabs(image(1, *shape), lambda x: x, windows, background=[0.0], in_bands=in_bands)
    for slab in passed:
        del slab
    assert 0.85 < max(held) / windows.num_held(in_bands=in_bands) <= 1


@pytest.mark.parametrize("weighting", ["gaussian", "constant"])
def test_seams_are_blended_as_brute_force_in_double_precision_does(weighting):
    volume, patch = image(1, 21, 13, 9), (8, 6, 9)
    logits = sliding_window(volume, Ramp(), Window(patch, overlap=0.4, weighting=weighting), num_outputs=3)
    total, weights = np.zeros((3, 21, 13, 9)), np.zeros((21, 13, 9))
    weight = np.ones(patch)
    if weighting == "gaussian":
        for index in np.ndindex(patch):
            weight[index] = np.exp(
                -0.5 * sum(((i - (p - 1) / 2) / (p / 8)) ** 2 for i, p in zip(index, patch, strict=True))
            )
    for corner in itertools.product(*(window_starts(n, p, 0.4) for n, p in zip((21, 13, 9), patch, strict=True))):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        total[(slice(None), *box)] += weight * Ramp()(volume.double()[None][(..., *box)])[0].numpy()
        weights[box] += weight
    np.testing.assert_allclose(logits, total / weights, rtol=1e-5, atol=1e-4)


def test_result_is_monais_where_the_windows_lie_alike():
    network = nn.Conv3d(1, 2, 3, padding=1).eval()
    volume = image(1, 24, 16, 32)  # a multiple of half a patch; MONAI's Gaussian is cut off below 1e-3, ours is not
    expected = sliding_window_inference(volume[None], (8, 8, 8), 4, network, overlap=0.5, mode="constant")[0]
    logits = sliding_window(volume, network, Window((8, 8, 8), weighting="constant"), num_outputs=2)
    torch.testing.assert_close(logits, expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "patch"), [(10, 10), (11, 10), (97, 32), (100, 7), (8, 3)])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.75, 0.99])
def test_windows_are_evenly_spaced_from_border_to_border(size, patch, overlap):
    starts = window_starts(size, patch, overlap)
    steps = np.diff(starts)
    assert starts[0] == 0 and starts[-1] == size - patch
    assert (steps > 0).all() and np.ptp(steps, axis=None) <= 1 if len(steps) else size == patch
    assert (steps <= np.ceil(max(1, patch * (1 - overlap)))).all()


def test_overlap_of_a_half_takes_no_more_windows_than_needed():
    assert window_starts(96, 32, 0.5) == (0, 16, 32, 48, 64)
    assert window_starts(97, 32, 0.5) == (0, 13, 26, 39, 52, 65)


def test_a_volume_smaller_than_the_patch_lies_in_the_middle_of_zeros():
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x

    volume = image(1, 3, 8, 4)
    logits = sliding_window(volume, Spy(), Window((8, 8, 7)), num_outputs=1)
    torch.testing.assert_close(logits, volume)
    (patch,) = seen
    assert patch.shape == (1, 1, 8, 8, 7)
    inside = patch[0, :, 3:6, :, 1:5]
    assert torch.equal(inside, volume)
    assert patch.count_nonzero() == inside.count_nonzero()


def test_windows_come_in_order_along_the_longest_axis():
    corners = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            corners.extend(x[:, 0, 0, 0, 0].tolist())
            return x

    along = torch.arange(40.0).reshape(1, 1, 40, 1).expand(1, 12, 40, 12).contiguous()
    sliding_window(along, Spy(), Window((8, 8, 8)), num_outputs=1, batch_size=5)
    assert corners == sorted(corners)
    assert len(corners) == 2 * 9 * 2


class MeanOfSlices(nn.Module):
    """A 2D network: the mean over its channels, times 1 and times 2."""

    extra_weights = ()

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        return torch.cat([mean, 2 * mean], dim=1)


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
@pytest.mark.parametrize("context", [0, 2])
def test_a_network_on_slices_predicts_every_slice_with_its_neighbors(slice_axis, context):
    volume = image(1, 9, 12, 11)
    window = Window((8, 16), slice_axis=slice_axis, context_slices=context)
    network = OnSlices(MeanOfSlices(), slice_axis, context)
    logits = sliding_window(volume, network, window, num_outputs=2, batch_size=4)
    planes = volume[0].movedim(slice_axis, 0).double().numpy()
    padded = np.pad(planes, ((context, context), (0, 0), (0, 0)), mode="edge")
    mean = np.stack([padded[n : n + 2 * context + 1].mean(0) for n in range(len(planes))])
    np.testing.assert_allclose(logits[0].movedim(slice_axis, 0), mean, atol=1e-6)
    np.testing.assert_allclose(logits[1].movedim(slice_axis, 0), 2 * mean, atol=1e-6)


def test_slices_share_a_batch():
    sizes = []

    class Spy(MeanOfSlices):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    sliding_window(image(1, 8, 8, 10), OnSlices(Spy(), 2, 0), Window((8, 8)), num_outputs=2, batch_size=4)
    assert sizes == [4, 4, 2]


def test_a_picture_is_predicted_in_two_dimensions():
    picture = image(2, 30, 21)
    torch.testing.assert_close(
        sliding_window(picture, Pointwise(), Window((8, 8)), num_outputs=3), Pointwise()(picture[None])[0]
    )


def test_autocast_lowers_the_networks_precision_and_keeps_logits_float32():
    kinds = []

    class Spy(nn.Conv3d):
        def forward(self, x: Tensor) -> Tensor:
            result = super().forward(x)
            kinds.append(result.dtype)
            return result

    network = Spy(1, 2, 1)
    volume = image(1, 9, 9, 9)
    exact = sliding_window(volume, network, Window((8, 8, 8)), num_outputs=2)
    rough = sliding_window(volume, network, Window((8, 8, 8)), num_outputs=2, autocast=torch.bfloat16)
    assert set(kinds) == {torch.float32, torch.bfloat16}
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=2e-2, rtol=2e-2)
    assert not torch.equal(rough, exact)


def test_a_network_that_says_nan_is_no_segmentation():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 3.5, torch.nan, x)

    window = Window((8, 8, 8))
    assert sliding_window(torch.ones(1, 20, 20, 20), Broken(), window, num_outputs=1).isfinite().all()
    volume = torch.ones(1, 20, 20, 20)
    volume[0, 3, 4, 5] = 4
    with pytest.raises(ModelError, match="E-NAN"):
        sliding_window(volume, Broken(), window, num_outputs=1)
