from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from medseg.geometry import Geometry
from medseg.inference.plan import WindowCost, plan_of, window_cost
from medseg.inference.resampling import STRIP_BYTES
from medseg.inference.windows import Windows
from medseg.labels import Labels
from medseg.model import ModelSpec, Preprocessing, Window

CPU = torch.device("cpu")


def spec(num_outputs: int) -> ModelSpec:
    labels = Labels({n: f"label {n}" for n in range(num_outputs)})
    return ModelSpec("net", {}, 3, ("CT",), labels, Preprocessing(spacing_mm=(1.5, 1.5, 1.5)), Window((96, 96, 96)))


class Hungry(nn.Module):
    """Holds a hundred times its input for a moment."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 100, 1, 1, 1).relu()[:, :2].clone()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_windows_memory_is_its_peak() -> None:
    cost = window_cost(Hungry(), (1, 1, 64, 64, 64), device=CPU)
    assert 0.8 * 2 * 100 * 64**3 * 4 < cost.num_bytes < 1.5 * 2 * 100 * 64**3 * 4
    assert cost.seconds > 0


def test_more_classes_take_half_a_patch_and_some_planes_each_and_longer_scans_their_own_voxels() -> None:
    source = Geometry.from_spacing((512, 512, 800), (0.8, 0.8, 0.8))
    cost = WindowCost(seconds=2.0, num_bytes=10**9)
    few, more = (plan_of(spec(n), source, cost, batch_size=1, on_gpu=False) for n in (2, 3))
    assert few.num_windows == len(Windows.over((273, 273, 427), spec(2).window))
    assert few.seconds == 2.0 * few.num_windows
    held = (96 - 47) * 273 * 273 + 47 * (96 + 44) * 273  # windows begin every 47 planes and every 44 rows
    assert more.host_bytes - few.host_bytes == 4 * (held + 2 * 273 * 273)
    longer = plan_of(spec(2), Geometry.from_spacing((512, 512, 900), (0.8, 0.8, 0.8)), cost, batch_size=1, on_gpu=False)
    assert (longer.host_bytes - few.host_bytes) / 100 < 1.2e6
    assert few.device_bytes == 0


def test_on_a_gpu_the_logits_are_its_memorys() -> None:
    source = Geometry.from_spacing((300, 300, 300), (1.5, 1.5, 1.5))
    cost = WindowCost(seconds=0.1, num_bytes=10**9)
    here, there = (plan_of(spec(5), source, cost, batch_size=4, on_gpu=on_gpu) for on_gpu in (False, True))
    strips = STRIP_BYTES["cuda"] - STRIP_BYTES["cpu"]
    assert there.host_bytes == here.host_bytes - (there.device_bytes - strips - 4 * 300**3)
    assert there.seconds == pytest.approx(0.1 * -(-there.num_windows // 4))
