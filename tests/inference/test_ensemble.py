"""Several models as one, beside a plain program that holds every probability of each."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg.build.model import find_model, find_models, predictor
from medseg.data.transforms import Prepared
from medseg.errors import ModelError
from medseg.geometry import Geometry, Volume
from medseg.inference.ensemble import Averaged, Member, Strip, as_logits, averaged, grouped, probabilities, voted
from medseg.inference.predictor import Predictor
from medseg.labels import Labels
from medseg.model import Intensity, ModelSpec, Preprocessing, Window, save_model
from medseg.nets import NETS
from medseg.nets.slices import OnSlices

from ..test_geometry_properties import grids
from .test_streaming import Net, labels_of

PLAIN = Preprocessing(intensity=(Intensity(normalize="none"),))


def model(
    seed: int,
    labels: Labels,
    *,
    window: Window | None = None,
    orientation: str = "RAS",
    spacing_mm: Any = None,
) -> Member:
    """A model with random weights."""
    window = window or Window((5, 6, 4), 0.4)
    dims = len(window.patch_size)
    preprocessing = replace(PLAIN, orientation=orientation, spacing_mm=spacing_mm)
    spec = ModelSpec("net", {}, dims, ("image",), labels, preprocessing, window)
    torch.manual_seed(seed)
    network: nn.Module = Net(dims, 1 if dims == 3 else 1 + 2 * window.context_slices, labels.num_outputs)
    if dims == 2:
        network = OnSlices(network, window.slice_axis, window.context_slices)  # type: ignore[arg-type]
    return Member(spec, network, f"model {seed}")


def together(members: Sequence[Member], **how: Any) -> Predictor:
    first, *others = members
    return Predictor(first.spec, first.network, others=others, precision="fp32", **how)


def scan_on(grid: Geometry, seed: int = 0) -> Volume:
    return Volume(np.random.default_rng(seed).normal(size=(1, *grid.shape)).astype(np.float32), grid)


def mean_of(members: Sequence[Member], scan: Volume, weights: Sequence[float]) -> np.ndarray:
    """Every model's probabilities on the scan's grid, averaged in double precision."""
    alone = [together([member]).segment([scan], with_probabilities=True).probabilities for member in members]
    return sum(w * p.array.astype(np.float64) for w, p in zip(weights, alone, strict=True)) / sum(weights)  # type: ignore[union-attr,return-value]


def check_mean(found: Any, expected: np.ndarray, labels: Labels) -> None:
    np.testing.assert_allclose(found.probabilities.array, expected, atol=2e-5)
    if labels.regions:
        clear = (np.abs(expected - 0.5) > 1e-4).all(0)
        wanted = np.zeros(expected.shape[1:], int)
        for value, chance in zip(labels.region_order, expected, strict=True):
            wanted[chance > 0.5] = value
    else:
        best = np.sort(expected, axis=0)
        clear, wanted = best[-1] - best[-2] > 1e-4, expected.argmax(0)
    np.testing.assert_array_equal(found.label.array[0][clear], wanted[clear])


@settings(max_examples=60, deadline=None)
@given(grids(sides=(2, 12)), st.lists(st.tuples(st.sampled_from(["RAS", "LPS", "LAS", "RPS"]), st.sampled_from(["3d", "small", "2d", "2d across"]), st.sampled_from([None, 0.7, 1.6])), min_size=2, max_size=3), st.booleans())  # fmt: skip
def test_models_that_differ_average_their_probabilities_on_the_scan(
    source: Geometry, kinds: Any, regions: bool
) -> None:
    labels = labels_of(3, regions=regions)
    windows = {
        "3d": Window((5, 6, 4), 0.4),
        "small": Window((3, 4, 5), 0.0, "constant"),
        "2d": Window((4, 6), context_slices=1),
        "2d across": Window((6, 4), slice_axis=0),
    }
    straight = source if source.is_orthogonal else source.straightened()
    members = [
        model(
            n, labels, window=replace(windows[kind], overlap=n / 10), orientation=orientation,
            spacing_mm=factor and tuple(s * factor for s in straight.oriented(orientation).spacing_mm),
        )
        for n, (orientation, kind, factor) in enumerate(kinds)
    ]  # fmt: skip
    scan = scan_on(source)
    if any(np.ptp(together([m]).prepare([scan]).image) == 0 for m in members):  # shows nothing to one of them
        return
    found = together(members).segment([scan], with_probabilities=True)
    check_mean(found, mean_of(members, scan, [1] * len(members)), labels)


GRID = Geometry.from_spacing((20, 17, 14), (1.0, 1.2, 1.5)).oriented("LPS")


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("spacing_mm", [None, (1.5, 1.5, 1.5)])
def test_models_that_see_the_same_average_their_logits(regions: bool, spacing_mm: Any) -> None:
    labels = labels_of(3, regions=regions)
    members = [model(seed, labels, spacing_mm=spacing_mm) for seed in range(3)]

    class Mean(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.stack([member.network(image).double() for member in members]).mean(0).float()

    expected = together([Member(members[0].spec, Mean())]).segment([scan_on(GRID)], with_probabilities=True)
    found = together(members).segment([scan_on(GRID)], with_probabilities=True)
    assert found.num_windows == expected.num_windows
    assert expected.probabilities is not None
    check_mean(found, expected.probabilities.array.astype(np.float64), labels)


def test_folds_that_normalize_by_their_own_cases_share_their_windows() -> None:
    """The plain program normalizes the scan for each model anew."""
    labels = labels_of(3, regions=False)
    members = []
    for seed, (mean, std) in enumerate([(0.1, 1.2), (-0.2, 0.8), (0.3, 0.0)]):
        member = model(seed, labels)
        intensity = (Intensity((-1.5, 1.5), "foreground", mean, std),)
        preprocessing = replace(member.spec.preprocessing, intensity=intensity)
        members.append(replace(member, spec=replace(member.spec, preprocessing=preprocessing)))
    first = members[0].spec.preprocessing.intensity[0]

    class Mean(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            clipped = image.double() * first.std + first.mean
            found = []
            for member in members:
                own = member.spec.preprocessing.intensity[0]
                found.append(member.network(((clipped - own.mean) / (own.std or 1)).float()).double())
            return torch.stack(found).mean(0).float()

    expected = together([Member(members[0].spec, Mean())]).segment([scan_on(GRID)], with_probabilities=True)
    found = together(members).segment([scan_on(GRID)], with_probabilities=True)
    assert len(grouped(members)) == 1 and expected.probabilities is not None
    check_mean(found, expected.probabilities.array.astype(np.float64), labels)
    other = replace(members[1].spec.preprocessing, intensity=(Intensity((-1.0, 1.5), "foreground", -0.2, 0.8),))
    assert len(grouped([members[0], replace(members[1], spec=replace(members[1].spec, preprocessing=other))])) == 2


def test_every_model_counts_as_much_as_any_other() -> None:
    labels = labels_of(3, regions=False)
    alike = [model(seed, labels) for seed in range(2)]
    other = model(2, labels, spacing_mm=(1.5, 1.5, 1.5))
    pair = Member(alike[0].spec, Averaged([m.network for m in alike], labels))
    found = together([alike[0], other, alike[1]]).segment([scan_on(GRID)], with_probabilities=True)
    check_mean(found, mean_of([pair, other], scan_on(GRID), [2, 1]), labels)


def test_mirrored_models_are_mirrored_each() -> None:
    labels = Labels({0: "background", 1: "left", 2: "right"}, pairs=((1, 2),))
    members = [model(seed, labels, window=Window((8, 8, 8), mirror_axes=(0, 2))) for seed in range(2)]
    image = torch.randn((1, 1, 8, 8, 8))
    ((_, network, count),) = grouped(members)
    passes = []
    for member in members:
        for dims in ((), (2,), (4,), (2, 4)):
            logits = member.network(image.flip(dims)).flip(dims)
            passes.append(logits[:, (0, 2, 1)] if 2 in dims else logits)
    assert count == 2
    torch.testing.assert_close(network(image), torch.stack(passes).mean(0))


def test_strips_that_one_model_leaves_out_are_background_to_it() -> None:
    labels = labels_of(2, regions=False)
    logits = torch.tensor([0.0, np.log(3)])[:, None, None].expand(2, 2, 3)
    places = [[(0, 0), (2, 0), (2, 2)], [(2, 0), (2, 2), (3, 0)]]
    streams = [iter([Strip(*place, logits) for place in of_model]) for of_model in places]
    found = {
        (strip.number, strip.first_row): float(probabilities(strip.logits, labels)[1, 0, 0])
        for strip in averaged(streams, [1, 3], labels)
    }
    assert found == pytest.approx({(0, 0): 0.75 / 4, (2, 0): 0.75, (2, 2): 0.75, (3, 0): 0.75 * 3 / 4}, abs=1e-6)


@pytest.mark.parametrize("regions", [False, True])
def test_logits_of_a_mean_give_the_mean(regions: bool) -> None:
    labels = labels_of(3, regions=regions)
    mean = probabilities(torch.randn((labels.num_outputs, 5, 5)) * 5, labels)
    torch.testing.assert_close(probabilities(as_logits(mean, labels), labels), mean)


@pytest.mark.parametrize("spacing_mm", [None, (1.5, 1.5, 1.5)], ids=["same windows", "other grid"])
def test_models_vote(spacing_mm: Any) -> None:
    """One window holds the whole scan, so that the voxels of windows and of the scan are the same."""
    labels = labels_of(3, regions=False)
    window = Window((20, 17, 14))
    members = [model(0, labels, window=window), model(1, labels, window=window, spacing_mm=spacing_mm)]
    found = together(members).segment([scan_on(GRID)], with_uncertainty=True)
    maps = [together([member]).segment([scan_on(GRID)]).label.array for member in members]
    some = (maps[0] > 0) | (maps[1] > 0) | (found.label.array > 0)
    assert found.agreement == pytest.approx((some & (maps[0] == maps[1])).sum() / some.sum(), abs=1e-3)
    assert together(members).segment([scan_on(GRID)]).agreement is None


def test_models_that_contradict_each_other_are_less_certain_together() -> None:
    labels = labels_of(2, regions=False)

    class Half(nn.Module):
        def __init__(self, upper: bool) -> None:
            super().__init__()
            self.sign = 4.0 if upper else -4.0

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            place = self.sign * torch.linspace(-1, 1, image.shape[2])[:, None, None].expand_as(image)
            return torch.cat([-place, place], dim=1)

    members = [Member(model(0, labels, window=Window((20, 17, 14))).spec, Half(upper)) for upper in (True, False)]
    alone = together(members[:1]).segment([scan_on(GRID)], with_uncertainty=True)
    both = together(members).segment([scan_on(GRID)], with_uncertainty=True)
    assert alone.uncertainty is not None and both.uncertainty is not None
    assert alone.uncertainty < 0.2 and both.uncertainty > 0.45
    assert both.agreement == 0


REGIONS = labels_of(2, regions=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Labels({0: "background", 1: "label 1", 2: "tumour"}), "label 2 is 'tumour', but 'label 2' in model 0"),
        (Labels({0: "background", 1: "label 1"}), "there is no label 2, which is 'label 2' in model 0"),
        (REGIONS, r"region region 1 is \(1, 2\), which there is not in model 0"),
    ],
)
def test_models_that_find_other_organs_are_refused(other: Labels, message: str) -> None:
    members = [model(0, labels_of(3, regions=False)), model(1, other)]
    with pytest.raises(ModelError, match=f"E-ENSEMBLE model 1: {message}"):
        grouped(members)


def test_models_of_other_channels_or_another_order_of_regions_are_refused() -> None:
    first, second = model(0, REGIONS), model(1, REGIONS)
    with pytest.raises(ModelError, match="channel 0 is 'PET', but 'image' in model 0"):
        grouped([first, replace(second, spec=replace(second.spec, channels=("PET",)))])
    turned = Labels(REGIONS.names, dict(reversed(REGIONS.regions.items())), (2, 1))
    with pytest.raises(ModelError, match="E-ENSEMBLE model 1"):
        grouped([first, model(1, turned)])


def test_post_processing_is_what_most_models_say() -> None:
    assert voted(
        [{"keep_largest": ["liver", "spleen"]}, {"keep_largest": ["liver"]}, {"keep_largest": ["spleen"]}]
    ) == {"keep_largest": ["liver", "spleen"]}
    amounts = [{"min_volume_ml": {"liver": ml}} for ml in (1, 3, 50)]
    assert voted([*amounts, {"min_volume_ml": {"tumour": 1}}]) == {"min_volume_ml": {"liver": 3}}
    assert voted([{"keep_largest": ["liver"]}, {}]) == {}
    own = {"min_volume_ml": {"liver": 1}, "fill_holes": ["liver"]}
    assert list(voted([own]).items()) == list(own.items())


def write_models(run: Path, num_folds: int, **changes: Any) -> None:
    entry = NETS["unet"]
    labels = labels_of(2, regions=False)
    spec = ModelSpec("unet", entry.tiny, 3, ("CT",), labels, Preprocessing(spacing_mm=(2, 2, 2)), Window((16, 16, 16)))
    for fold in range(num_folds):
        torch.manual_seed(fold)
        network = entry.network(spatial_dims=3, in_channels=1, out_channels=2, **entry.tiny)
        save_model(run / f"fold_{fold}" / "model", replace(spec, **changes), network.state_dict())


def test_a_cross_validations_folder_means_all_its_folds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_models(tmp_path, 3)
    (tmp_path / "folds.json").write_text(json.dumps([0, 1, 2, 3]))
    with caplog.at_level(logging.WARNING, logger="medseg"):
        assert find_models(str(tmp_path)) == [tmp_path / f"fold_{n}" / "model" for n in range(3)]
    assert "W-FOLDS" in caplog.text and "3 of its 4 folds" in caplog.text
    with pytest.raises(ModelError, match="name one of them"):
        find_model(str(tmp_path))
    made = predictor(str(tmp_path), device="cpu", precision="fp32")
    scan = scan_on(Geometry.from_spacing((20, 18, 16), (1.5, 1.5, 2.0)))
    alone = [predictor(str(tmp_path / f"fold_{n}"), device="cpu", precision="fp32") for n in range(3)]
    listed = predictor([str(tmp_path / f"fold_{n}") for n in range(3)], device="cpu", precision="fp32")
    found = made.segment([scan], with_probabilities=True)
    np.testing.assert_array_equal(found.label.array, listed.segment([scan]).label.array)
    assert found.num_windows == alone[0].segment([scan]).num_windows
    assert found.probabilities is not None
    logit = [np.log(one.segment([scan], with_probabilities=True).probabilities.array) for one in alone]  # type: ignore[union-attr]
    margin = np.mean([x[1] - x[0] for x in logit], axis=0)
    np.testing.assert_allclose(found.probabilities.array[1], 1 / (1 + np.exp(-margin)), atol=1e-3)


def test_models_of_other_labels_are_refused_by_their_folders(tmp_path: Path) -> None:
    write_models(tmp_path / "a", 1)
    write_models(tmp_path / "b", 1, labels=Labels({0: "background", 1: "liver"}))
    with pytest.raises(
        ModelError, match=r"E-ENSEMBLE .*b/fold_0/model: label 1 is 'liver', but 'label 1' in .*a/fold_0"
    ):
        predictor([str(tmp_path / "a"), str(tmp_path / "b")], device="cpu")


def test_time_inside_the_network_is_told() -> None:
    labels = labels_of(2, regions=False)

    class Slow(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01)
            return super().forward(x)

    members = [
        Member(model(0, labels).spec, Slow(3, 1, 2)),
        Member(model(0, labels, spacing_mm=(3, 3, 3)).spec, Slow(3, 1, 2)),
    ]
    started = time.perf_counter()
    found = together(members).segment([scan_on(GRID)])
    wall = time.perf_counter() - started
    assert 0.01 * found.num_windows <= found.network_seconds < wall


def test_a_scan_prepared_in_two_ways_keeps_both(tmp_path: Path) -> None:
    labels = labels_of(2, regions=False)
    members = [model(0, labels), model(1, labels, spacing_mm=(3, 3, 3)), model(2, labels, window=Window((4, 4, 4)))]
    prepared = together(members).prepare([scan_on(GRID)])
    assert isinstance(prepared, Prepared) and [p.image.shape[1:] for p in prepared.others] == [(7, 7, 7)]
    assert together(members[::2]).prepare([scan_on(GRID)]).others == ()
