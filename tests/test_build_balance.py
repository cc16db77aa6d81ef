from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from medseg.build.balance import balanced_weights, weights_told, with_class_weights
from medseg.data.dataset import CachedCase
from medseg.labels import Labels
from medseg.workflow import Workflow

LABELS = Labels({0: "background", 1: "liver", 2: "tumor"}, ignore_label=9)
TEXT = """\
name: liver
data: {manifest: dataset.json}
network: unet
train: {patch_size: [16, 16, 16]}
loss:
  - dice
  - {name: cross_entropy, weight: 0.5, args: {class_weights: balanced, label_smoothing: 0.1}}
  - {name: focal, args: {class_weights: [1, 2, 3]}}
"""


def cases(folder: Path, *label_maps: np.ndarray) -> list[CachedCase]:
    made = []
    for n, label in enumerate(label_maps):
        case = folder / str(n)
        case.mkdir()
        values, counts = np.unique(label, return_counts=True)
        voxels = {str(value): int(count) for value, count in zip(values, counts, strict=True)}
        (case / "case.json").write_text(json.dumps({"voxels": voxels}))
        made.append(CachedCase(str(n), case))
    return made


def test_balanced_weights_are_scikit_learn_s_without_ignored_voxels(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    maps = [random.choice([0, 1, 2, 9], size=(9, 8, 7), p=[0.8, 0.1, 0.05, 0.05]) for _ in range(3)]
    together = np.concatenate([m.ravel() for m in maps])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=together[together != 9])
    assert balanced_weights(cases(tmp_path, *maps), LABELS) == pytest.approx(expected, rel=1e-5)


def test_a_region_is_weighted_by_the_labels_it_unites(tmp_path: Path) -> None:
    labels = Labels({0: "background", 1: "a", 2: "b"}, regions={"whole": (1, 2), "b": (2,)}, region_order=(1, 2))
    weights = balanced_weights(cases(tmp_path, np.array([0] * 90 + [1] * 8 + [2] * 2)), labels)
    assert weights == (12 / (2 * 10), 12 / (2 * 2))
    assert weights_told(weights, labels) == "class_weights: balanced means whole 0.6, b 3"
    assert weights_told((0.1, 2, 30), LABELS) == "class_weights: balanced means background 0.1, liver 2, tumor 30"


def test_a_class_without_voxels_weighs_nothing(tmp_path: Path) -> None:
    assert balanced_weights(cases(tmp_path, np.array([1, 1, 1, 2])), LABELS) == (0, 0.666667, 2)


def test_the_word_becomes_numbers_and_nothing_else_changes(tmp_path: Path) -> None:
    file = tmp_path / "workflow.yaml"
    file.write_text(TEXT)
    workflow = Workflow.load(file)
    resolved = with_class_weights(workflow, (0.5, 1, 2))
    assert resolved.loss[1].args == {"class_weights": [0.5, 1, 2], "label_smoothing": 0.1}
    assert resolved.loss[1].weight == 0.5
    assert (resolved.loss[0], resolved.loss[2]) == (workflow.loss[0], workflow.loss[2])
    assert with_class_weights(resolved, (7, 7, 7)) == resolved
    assert resolved.where("loss", 1) == workflow.where("loss", 1)
    file.write_text(resolved.to_yaml())
    assert Workflow.load(file).loss == resolved.loss
