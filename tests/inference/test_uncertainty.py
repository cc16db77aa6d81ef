"""How sure a prediction is of itself, beside a plain program in double precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.data.transforms import Prepared
from medseg.geometry import Geometry
from medseg.inference.predictor import Predictor
from medseg.inference.uncertainty import DOUBT, Uncertainty, Votes
from medseg.labels import Labels
from medseg.model import Intensity, ModelSpec, Preprocessing, Window

ORGANS = Labels({0: "background", 1: "liver", 2: "spleen"})
REGIONS = Labels(ORGANS.names, regions={"both": (1, 2), "spleen": (2,)}, region_order=(1, 2))
KINDS = pytest.mark.parametrize("labels", [ORGANS, REGIONS], ids=["labels", "regions"])


def plain(logits: np.ndarray, labels: Labels) -> tuple[np.ndarray, dict[str, float], float]:
    """Entropy of each voxel, score of each organ and of the case from logits (R, I, J, K), nothing left out."""
    if labels.regions:
        p = 1 / (1 + np.exp(-logits))
        masks, organs = logits > 0, p
        entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)).mean(0)
    else:
        p = np.exp(logits - logits.max(0))
        p /= p.sum(0)
        masks, organs = np.arange(1, len(p))[:, None, None, None] == logits.argmax(0), p[1:]
        entropy = -(p * np.log(p)).sum(0) / np.log(len(p))
    scores = {}
    for name, mask, chance in zip(labels.organs, masks, organs, strict=True):
        found = 1 - 2 * chance[mask].sum() / (mask.sum() + chance.sum())
        scores[name] = found if mask.any() else chance.max()
    weights = organs.reshape(len(organs), -1).max(1)
    return entropy, scores, float(np.dot(list(scores.values()), weights) / weights.sum())


def taken_in(logits: np.ndarray, labels: Labels) -> tuple[np.ndarray, Uncertainty]:
    uncertainty = Uncertainty(labels)
    planes = torch.from_numpy(logits).float()
    entropy = [
        uncertainty.add(planes[:, n], labels.segment(planes[None, :, n])[0]).numpy() for n in range(logits.shape[1])
    ]
    return np.stack(entropy), uncertainty


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([ORGANS, REGIONS]), st.sampled_from([0.1, 1.0, 2.5]))
def test_scores_and_entropies_are_those_of_a_plain_program(seed, labels, scale):
    logits = np.random.default_rng(seed).normal(0, scale, (labels.num_outputs, 3, 4, 5))
    entropy, organs, case = plain(logits, labels)
    found, uncertainty = taken_in(logits, labels)
    np.testing.assert_allclose(found, entropy, atol=12 * DOUBT)  # of a voxel with a probability of 1 - DOUBT
    doubts = uncertainty.result()
    assert doubts.organs == pytest.approx(organs, abs=2 * DOUBT)
    assert doubts.case == pytest.approx(case, abs=2 * DOUBT)


@KINDS
def test_entropy_is_one_where_the_network_has_no_idea_and_zero_where_it_is_certain(labels):
    logits = np.zeros((labels.num_outputs, 2, 3, 3))
    logits[0, 1] = 30
    logits[1:, 1] = -30
    entropy, _ = taken_in(logits, labels)
    np.testing.assert_allclose(entropy[0], 1, atol=1e-6)
    assert not entropy[1].any()


@KINDS
def test_a_certain_prediction_has_no_uncertainty_and_nothing_neither(labels):
    logits = np.full((labels.num_outputs, 4, 4, 4), -30.0)
    if not labels.regions:
        logits[0] = 0
    _, nothing = taken_in(logits, labels)
    assert nothing.result().case == 0 and set(nothing.result().organs.values()) == {0}
    logits[-1, 1:3] = 30
    _, certain = taken_in(logits, labels)
    assert certain.result().case == 0
    assert Uncertainty(labels).result().case == 0


def test_an_organ_that_is_not_there_neither_calms_nor_alarms():
    """By hand: a liver of 8 voxels at p = 0.8, Dice 2 · 6.4 / (8 + 6.4); the spleen's largest p is 0.002."""
    p = np.full((3, 1, 4, 4), 1e-9)
    p[0] = 1
    p[:, 0, :2] = np.array([0.198, 0.8, 0.002])[:, None, None]
    _, uncertainty = taken_in(np.log(p), ORGANS)
    doubts = uncertainty.result()
    liver = 1 - 2 * 6.4 / 14.4
    assert doubts.organs == pytest.approx({"liver": liver, "spleen": 0.002}, abs=1e-5)
    assert doubts.case == pytest.approx((liver * 0.8 + 0.002 * 0.002) / 0.802, abs=1e-5)


def test_votes_count_voxels_that_some_map_finds_and_those_on_which_all_members_agree():
    first, second, ensemble = (torch.tensor(m) for m in ([0, 1, 1, 2, 0], [0, 1, 2, 0, 0], [0, 1, 1, 0, 3]))
    votes = Votes()
    votes.count([first, second, ensemble])
    assert votes.share == 2 / 4  # both say liver once, and background once where the ensemble finds something
    votes.count([first, first, first])
    assert votes.share == 5 / 7
    assert Votes().share is None


GRID = Geometry.from_spacing((24, 20, 18), (1, 1, 1)).oriented("LPS")
SPEC = ModelSpec(
    "net", {}, 3, ("image",), ORGANS, Preprocessing(intensity=(Intensity(normalize="none"),)), Window((12, 12, 12))
)


class Seen(torch.nn.Module):
    """Takes the image's channels for its logits."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image


def phantom_logits(noise: float, *, blur: float = 0.0, seed: int = 0) -> np.ndarray:
    """A liver and a spleen, as a network sees them that is more or less sure of them."""
    grid = Preprocessing().geometry(GRID)
    i, j, k = np.indices(grid.shape)
    liver = 5 - np.sqrt((i - 8) ** 2 + (j - 9) ** 2 + (k - 9) ** 2)
    spleen = 4 - np.sqrt((i - 18) ** 2 + (j - 9) ** 2 + (k - 9) ** 2)
    logits = 3 * np.stack([np.zeros_like(liver), liver, spleen])
    if blur:
        logits = np.stack([ndimage.gaussian_filter(channel, blur) for channel in logits])
    logits += np.random.default_rng(seed).normal(0, noise, logits.shape) if noise else 0
    return logits.astype(np.float32)


def segmented(logits: np.ndarray, **how):
    prepared = Prepared(logits, None, GRID, Preprocessing().geometry(GRID))
    return Predictor(SPEC, Seen(), precision="fp32").segment_prepared(prepared, **how)


@pytest.mark.parametrize("noise", [0.3, 0.6, 1.0, 1.6])
def test_a_network_that_knows_what_it_does_not_know_foretells_its_dice(noise):
    """Voxels of -1 and 1 (one in five) under noise, and the probabilities that Bayes' rule then gives them."""
    random = np.random.default_rng(0)
    grid = Preprocessing().geometry(GRID)
    liver = random.random(grid.shape) < 0.2
    seen = np.where(liver, 1, -1) + random.normal(0, noise, grid.shape)
    logit = 2 * seen / noise**2 + np.log(0.2 / 0.8)
    found = segmented(np.stack([0 * logit, logit, 0 * logit - 30]).astype(np.float32), with_uncertainty=True)
    mask = found.label.oriented("RAS").array[0] == 1
    dice = 2 * (mask & liver).sum() / (mask.sum() + liver.sum())
    assert found.uncertainties["liver"] == pytest.approx(1 - dice, abs=0.03)
    assert found.uncertainty == pytest.approx(1 - dice, abs=0.03)


def test_blurred_organs_and_a_network_out_of_its_depth_score_higher():
    sure = segmented(phantom_logits(0), with_uncertainty=True)
    blurred = segmented(phantom_logits(0, blur=2.0), with_uncertainty=True)
    pale = segmented(phantom_logits(0) * 0.2, with_uncertainty=True)
    np.testing.assert_array_equal(pale.label.array, sure.label.array)
    assert 0 < sure.uncertainty < min(blurred.uncertainty, pale.uncertainty) < 1


def test_uncertainty_and_entropy_come_with_the_segmentation_when_asked_for():
    logits = phantom_logits(2)
    plainly = segmented(logits)
    assert plainly.uncertainty is None and plainly.uncertainties == {} and plainly.entropy is None
    found = segmented(logits, with_entropy=True)
    entropy, organs, case = plain(logits.astype(np.float64), ORGANS)
    assert found.uncertainty == pytest.approx(case, abs=2 * DOUBT)
    assert found.uncertainties == pytest.approx(organs, abs=2 * DOUBT)
    assert found.entropy.array.dtype == np.uint8 and found.entropy.geometry is GRID
    np.testing.assert_allclose(found.entropy.oriented("RAS").array[0], 100 * entropy, atol=0.5 + 1200 * DOUBT)


def test_a_scan_that_shows_nothing_is_the_first_to_look_at():
    found = segmented(np.zeros_like(phantom_logits(0)), with_entropy=True)
    assert found.uncertainty == 1.0 and not found.entropy.array.any()


def test_mirrored_copies_vote():
    """Every window of a network that knows left from right, mirrored by hand."""
    grid = Preprocessing().geometry(GRID)
    prepared = Prepared(phantom_logits(0), None, GRID, grid)
    window = Window((24, 20, 18), mirror_axes=(0,))

    class Leaning(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image + torch.linspace(-6, 6, image.shape[2])[:, None, None]

    class Noisy(Leaning):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            shifted = super().forward(image)
            return torch.cat([image[:, :1], shifted[:, 1:]], dim=1)

    found = Predictor(replace(SPEC, window=window), Noisy(), precision="fp32").segment_prepared(
        prepared, with_uncertainty=True
    )
    lean = np.linspace(-6, 6, 24)[:, None, None]
    logits = phantom_logits(0).astype(np.float64)
    straight, mirrored = logits.copy(), logits.copy()
    straight[1:] += lean
    mirrored[1:] -= lean
    maps = [x.argmax(0) for x in (straight, mirrored, (straight + mirrored) / 2)]
    some = (np.stack(maps) > 0).any(0)
    assert found.agreement == pytest.approx((some & (maps[0] == maps[1])).sum() / some.sum(), abs=2e-3)
    assert segmented(phantom_logits(0), with_uncertainty=True).agreement is None
