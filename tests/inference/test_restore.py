import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg.data.transforms import preprocess
from medseg.geometry import Geometry, Volume
from medseg.inference.resampling import resampled
from medseg.inference.sliding_window import Slab
from medseg.labels import Labels
from medseg.model import Intensity, Preprocessing

from .whole import restore

LABELS = Labels({0: "background", 1: "liver", 2: "spleen", 3: "kidney"})
ORIENTATIONS = ["RAS", "LPS", "LAS", "PIR", "SRA", "IPL", "ASL"]
OBLIQUE = np.array(
    [[0.936, -0.2896, 0.2003, 0], [0.3129, 0.9447, -0.0968, 0], [-0.1612, 0.1533, 0.975, 0], [0, 0, 0, 1]]
)


def scan_grid(orientation: str = "RAS", spacing=(1.0, 1.4, 2.5), shape=(24, 20, 14), turn=None) -> Geometry:
    """A grid away from the origin, its axes in some orientation, turned a little if asked for."""
    ras = Geometry.from_spacing(shape, spacing)
    affine = ras.affine.copy()
    affine[:3, 3] = (-37.5, 12.25, 410)
    return Geometry(shape, (np.eye(4) if turn is None else turn) @ affine).oriented(orientation)


def sheared_grid() -> Geometry:
    affine = scan_grid("LPS").affine.copy()
    affine[:3, 2] += (0, 0.9, 0)  # a gantry tilted by 20 degrees
    return Geometry(scan_grid("LPS").shape, affine)


def random_logits(grid: Geometry, num_outputs: int = 4) -> torch.Tensor:
    return torch.randn((num_outputs, *grid.shape), generator=torch.Generator().manual_seed(0))


def brute_force(logits: torch.Tensor, grid: Geometry, source: Geometry) -> np.ndarray:
    """Each source voxel's place in the patient, looked up in the logits by SciPy in double precision."""
    voxels = np.indices(source.shape).reshape(3, -1)
    world = source.affine[:3, :3] @ voxels + source.affine[:3, 3:]
    at = np.linalg.inv(grid.affine) @ np.vstack([world, np.ones(world.shape[1])])
    values = [ndimage.map_coordinates(c.double().numpy(), at[:3], order=1, mode="nearest") for c in logits]
    return np.stack(values).reshape(len(logits), *source.shape)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("spacing_mm", [None, (2.1, 1.0, 2.5), (0.8, 3.3, 1.0)])
@pytest.mark.parametrize("turn", [None, OBLIQUE], ids=["straight", "oblique"])
def test_logits_are_interpolated_at_the_scans_voxels(orientation, spacing_mm, turn):
    source = scan_grid(orientation, turn=turn)
    preprocessing = Preprocessing(orientation="RAS", spacing_mm=spacing_mm)
    check_against_brute_force(source, preprocessing)


def test_a_sheared_scan_is_sampled_on_its_own_grid():
    check_against_brute_force(sheared_grid(), Preprocessing(spacing_mm=(1.5, 1.5, 2.0)))
    check_against_brute_force(sheared_grid(), Preprocessing(orientation="LPS"))


@pytest.mark.parametrize("shape", [(1, 9, 7), (9, 1, 7), (9, 7, 1), (1, 1, 1)])
def test_axes_of_a_single_voxel_are_restored(shape):
    check_against_brute_force(scan_grid("LPS", shape=shape), Preprocessing(spacing_mm=(2.0, 2.0, 2.0)))


def check_against_brute_force(source: Geometry, preprocessing: Preprocessing) -> None:
    for axis in range(3):
        check_along(axis, source, preprocessing)


def check_along(axis: int, source: Geometry, preprocessing: Preprocessing) -> None:
    grid = preprocessing.geometry(source)
    logits = random_logits(grid)
    label, probabilities = restore(
        logits,
        LABELS,
        axis=axis,
        grid=grid,
        source=source,
        orientation=preprocessing.orientation,
        with_probabilities=True,
    )
    assert label.geometry is source and probabilities.geometry is source
    assert label.array.shape == (1, *source.shape) and label.array.dtype == np.uint8
    expected = brute_force(logits, grid, source)
    exponents = np.exp(expected)
    np.testing.assert_allclose(probabilities.array, exponents / exponents.sum(0), atol=2e-4)
    best_two = np.sort(expected, axis=0)[-2:]
    clear = best_two[1] - best_two[0] > 1e-3  # a tie in double precision may go either way in single
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(label.array[0][clear], expected.argmax(0)[clear])


def asymmetric_object(grid: Geometry) -> np.ndarray:
    """A solid whose borders lie at fixed places in the patient, unlike in every direction."""
    voxels = np.moveaxis(np.indices(grid.shape), 0, -1)
    world = voxels @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    center = grid.affine[:3, :3] @ (np.array(grid.shape) / 2) + grid.affine[:3, 3]
    x, y, z = np.moveaxis(world - center, -1, 0)
    body = (x / 9) ** 2 + (y / 8) ** 2 + (z / 12) ** 2 < 1
    horn = (np.abs(x - 7) < 3) & (np.abs(y - 4) < 2.5) & (np.abs(z + 3) < 5)
    return (body | horn).astype(np.uint8)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("spacing_mm", [None, (1.5, 1.5, 2.0), (2.0, 1.1, 1.3)])
def test_an_object_comes_back_where_it_was(orientation, spacing_mm):
    source = scan_grid(orientation, spacing=(0.9, 1.2, 1.6), shape=(40, 32, 28))
    check_there_and_back(source, spacing_mm)


def test_an_object_in_a_sheared_scan_comes_back_where_it_was():
    affine = scan_grid("LPS", spacing=(0.9, 1.2, 1.6)).affine.copy()
    affine[:3, 2] += (0, 0.5, 0)
    check_there_and_back(Geometry((40, 32, 28), affine), (1.0, 1.0, 1.5))


def check_there_and_back(source: Geometry, spacing_mm) -> None:
    drawn = asymmetric_object(source)
    preprocessing = Preprocessing(spacing_mm=spacing_mm, intensity=(Intensity(normalize="none"),))
    prepared = preprocess([Volume(drawn[None].astype(np.float32), source)], None, preprocessing)
    inside = torch.from_numpy(prepared.image) - 0.5
    labels = Labels({0: "background", 1: "object"})
    label, _ = restore(
        torch.cat([-inside, inside]), labels, grid=prepared.geometry, source=prepared.source, orientation="RAS"
    )
    restored = label.array[0]
    assert 2 * (restored & drawn).sum() / (restored.sum() + drawn.sum()) > (0.93 if spacing_mm else 0.9999)
    center, expected = (np.array(ndimage.center_of_mass(array)) for array in (restored, drawn))
    np.testing.assert_allclose(center, expected, atol=0.1)  # half a voxel would be 0.5


def test_regions_are_thresholded_in_their_order():
    labels = Labels(
        {0: "background", 1: "edema", 2: "core"}, regions={"whole": (1, 2), "core": (2,)}, region_order=(1, 2)
    )
    grid = Geometry.from_spacing((4, 1, 1), (1, 1, 1))
    logits = torch.tensor([[-1.0, 1, 1, -1], [-1, -1, 1, 1]]).reshape(2, 4, 1, 1)
    label, probabilities = restore(logits, labels, grid=grid, source=grid, orientation="RAS", with_probabilities=True)
    assert label.array.ravel().tolist() == [0, 1, 2, 2]
    torch.testing.assert_close(torch.from_numpy(probabilities.array), logits.sigmoid())


def test_equal_grids_are_not_resampled():
    grid = scan_grid()
    slab = Slab(0, 0, random_logits(grid).transpose(0, 1))
    box = tuple(slice(0, n) for n in grid.shape)
    for strip in resampled([slab], LABELS.background, box=box, grid=grid, target=grid, axis=0):
        assert strip.logits.data_ptr() == slab.planes[strip.number, :, strip.first_row :].data_ptr()
