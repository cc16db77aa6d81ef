"""What a training step holds in memory, told without taking it."""

from pathlib import Path

import pytest
import torch

from medseg.build import pace
from medseg.build.memory import held_for_backward
from medseg.data.manifest import Manifest
from medseg.nets import NETS
from medseg.workflow import Workflow

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("dims", "size"), [(2, (40, 24)), (3, (16, 24, 8))])
def test_what_the_backward_pass_needs_is_the_same_on_the_meta_device(dims, size):
    arguments = {"spatial_dims": dims, "in_channels": 2, "out_channels": 3, **NETS["unet"].tiny}
    real = NETS["unet"].network(**arguments)
    with torch.device("meta"):
        imagined = NETS["unet"].network(**arguments)
    held = held_for_backward(real, torch.zeros(4, 2, *size))
    assert held_for_backward(imagined, torch.empty((4, 2, *size), device="meta")) == held
    assert held > 4 * 4 * real.encoder[0].blocks[0].conv.out_channels * torch.Size(size).numel()


def test_twice_the_batch_needs_twice_the_memory():
    with torch.device("meta"):
        net = NETS["unet"].network(spatial_dims=3, in_channels=1, out_channels=2, norm="none")
        one, two = (held_for_backward(net, torch.empty(n, 1, 64, 64, 64)) for n in (1, 2))
    assert two == 2 * one


@pytest.mark.parametrize(
    ("message", "is_told"),
    [("DefaultCPUAllocator: can't allocate memory: you tried to allocate 32768000 bytes", False), ("a fault", True)],
)
def test_a_step_that_memory_does_not_hold_has_no_pace_and_other_faults_are_told(monkeypatch, message, is_told):
    def fails(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(pace, "_step", fails)
    workflow, source = Workflow.load(ROOT / "workflows/liver.yaml"), Manifest.load(ROOT / "data_manifests/liver.json")
    if is_told:
        with pytest.raises(RuntimeError, match="a fault"):
            pace.measured_pace(workflow, source, (64, 64, 48))
    else:
        assert pace.measured_pace(workflow, source, (64, 64, 48)) is None
