from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medseg.losses import Compound, CrossEntropy, DeepSupervision, Dice, Ramp
from medseg.losses.compound import at_size


class Count(nn.Module):
    """A loss of 1 that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls.append((logits, target, mask))
        return logits.sum() * 0 + 1


def test_a_ramp_moves_linearly_and_then_stays() -> None:
    ramp = Ramp(start=1, end=0, over=4)
    assert [ramp.at(step) for step in (0, 1, 3, 4, 100)] == [1, 0.75, 0.25, 0, 0]
    assert Ramp(start=1, end=0.5, over=0).at(0) == 0.5


def test_the_sum_weighs_its_losses_at_the_current_step() -> None:
    loss = Compound([Count(), Count()], [2.0, Ramp(start=0, end=1, over=10)])
    logits, target = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    values = []
    for step in (0, 5, 20):
        loss.set_step(step)
        values.append(loss(logits, target).item())
    assert values == [2, 2.5, 3]


def test_a_loss_without_weight_is_not_computed() -> None:
    counts = Count()
    loss = Compound([counts], [Ramp(start=0, end=1, over=10)])
    logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    value = loss(logits, torch.zeros(1, 4, 4, dtype=torch.long))
    value.backward()  # the loop need not know
    assert value == 0 and not counts.calls


def test_the_sum_is_that_of_its_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 5, generator=generator)
    target = torch.randint(0, 3, (2, 6, 5), generator=generator)
    mask = torch.rand(2, 1, 6, 5, generator=generator) < 0.5
    expected = 0.5 * Dice()(logits, target, mask) + 2 * CrossEntropy()(logits, target, mask)
    torch.testing.assert_close(Compound([Dice(), CrossEntropy()], [0.5, 2])(logits, target, mask), expected)


def test_each_loss_needs_a_weight() -> None:
    with pytest.raises(ValueError, match="2 losses with 1 weights"):
        Compound([Dice(), Dice()], [1])


def test_deep_supervision_averages_the_loss_of_each_resolution_by_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(2, 3, *size, generator=generator) for size in ((8, 6), (4, 3), (2, 2))]
    target = torch.randint(0, 3, (2, 8, 6), generator=generator)
    mask = torch.rand(2, 1, 8, 6, generator=generator) < 0.7
    expected = Dice()(outputs[0], target, mask)
    expected = expected + 0.5 * Dice()(outputs[1], target[:, 1::2, 1::2], mask[..., 1::2, 1::2])
    rows, columns = torch.tensor([2, 6])[:, None], torch.tensor([1, 4])
    expected = expected + 0.25 * Dice()(outputs[2], target[:, rows, columns], mask[..., rows, columns])
    torch.testing.assert_close(DeepSupervision(Dice(), (0.5, 0.25))(outputs, target, mask), expected / 1.75)


def test_deep_supervision_leaves_a_loss_as_large_as_it_is() -> None:
    outputs = [torch.zeros(1, 2, *size) for size in ((8, 8), (4, 4), (2, 2))]
    assert DeepSupervision(Count(), (0.5, 0.25))(outputs, torch.zeros(1, 8, 8, dtype=torch.long)) == 1


def test_deep_supervision_takes_a_single_output_and_passes_the_step_on() -> None:
    inner = Compound([Count()], [Ramp(start=0, end=1, over=10)])
    loss = DeepSupervision(inner, (0.5,))
    loss.set_step(5)
    assert loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)) == 0.5
    DeepSupervision(Dice(), ()).set_step(5)


def test_deep_supervision_needs_a_weight_for_each_extra_output() -> None:
    with pytest.raises(ValueError, match="zip"):
        DeepSupervision(Count(), (0.5,))([torch.zeros(1, 2, 4, 4)] * 3, torch.zeros(1, 4, 4, dtype=torch.long))


@pytest.mark.parametrize(("size", "coarse"), [((8, 6, 9), (4, 3, 3)), ((7, 5), (4, 3)), ((16, 16, 1), (8, 8, 1))])
def test_a_coarser_target_is_torch_s_nearest_and_keeps_its_type(size: tuple[int, ...], coarse: tuple[int, ...]) -> None:
    target = torch.randint(0, 200, (2, *size), generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(target[:, None].double(), coarse, mode="nearest-exact")[:, 0].long()
    assert torch.equal(at_size(target, coarse), expected)
    mask = (target > 100)[:, None]
    assert at_size(mask, coarse).dtype == torch.bool
    assert torch.equal(at_size(mask, coarse)[:, 0], expected > 100)
    assert at_size(target, size) is target
