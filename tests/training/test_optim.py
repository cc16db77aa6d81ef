import pytest
import torch

from medseg.training import optim


def test_poly_falls_from_one_to_zero():
    rate = optim.poly(100, power=2)
    assert [rate(step, []) for step in (0, 50, 100)] == [1.0, 0.25, 0.0]


def test_cosine_passes_a_half_in_the_middle():
    assert [optim.cosine(10)(step, []) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])


def test_plateau_equals_torchs():
    scores = [0.1, 0.3, 0.3, 0.2, 0.25, 0.4, 0.4, 0.39, 0.1, 0.1, 0.1]
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    # torch waits for more than `patience` bad validations, medseg for `patience` of them
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=1, threshold=0)
    ours = optim.plateau(patience=2, factor=0.5)
    for n, score in enumerate(scores):
        theirs.step(score)
        assert ours(0, scores[: n + 1]) == optimizer.param_groups[0]["lr"]


def test_warmup_ramps_linearly():
    rate = optim.with_warmup(optim.constant(), 3)
    assert [rate(step, []) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_biases_and_norms_are_not_decayed(name):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    made = optim.make_optimizer(name, network.parameters(), lr=1.0, weight_decay=0.1, momentum=0.9, betas=(0.9, 0.99))
    assert [len(group["params"]) for group in made.param_groups] == [1, 3]
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]
