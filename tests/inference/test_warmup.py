from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from medseg.inference.warmup import lay_out

CPU = torch.device("cpu")


class Net(nn.Module):
    """Slow in one of the two layouts."""

    def __init__(self, slow_if_last: bool) -> None:
        super().__init__()
        self.layer = nn.Conv3d(3, 2, 3, padding=1)
        self.slow_if_last = slow_if_last

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.weight.is_contiguous() is not self.slow_if_last:
            time.sleep(0.05)
        return self.layer(x)


@pytest.mark.parametrize("slow_if_last", [True, False])
def test_the_faster_layout_is_taken_and_says_the_same(slow_if_last: bool) -> None:
    torch.manual_seed(0)
    network = Net(slow_if_last).eval()
    x = torch.rand(1, 3, 9, 8, 7)
    with torch.inference_mode():
        expected = network(x)
        assert lay_out(network, x.shape, device=CPU, autocast=None) is not slow_if_last
        torch.testing.assert_close(network(x), expected, atol=1e-6, rtol=1e-5)
    assert network.layer.weight.is_contiguous() is slow_if_last
