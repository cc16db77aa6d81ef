"""What prediction does when memory runs out: less at once, then less of it on the GPU, then none."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from medseg.data.transforms import Prepared
from medseg.geometry import Geometry
from medseg.inference.predictor import Predictor, ways
from medseg.labels import Labels
from medseg.model import ModelSpec, Preprocessing, Window

GRID = Geometry.from_spacing((24, 24, 8), (1, 1, 1))
SPEC = ModelSpec(
    network="any",
    network_args={},
    spatial_dims=3,
    channels=("image",),
    labels=Labels({0: "background", 1: "bright"}),
    preprocessing=Preprocessing(),
    window=Window((8, 8, 8)),
)


class Bright(torch.nn.Module):
    """Finds what is positive, and has room for a number of windows."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.tried: list[int] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.tried.append(len(image))
        if len(image) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return torch.cat([-image, image], dim=1)


@pytest.fixture
def prepared() -> Prepared:
    image = np.random.default_rng(0).normal(size=(1, *GRID.shape)).astype(np.float32)
    return Prepared(image, None, GRID, GRID, name="scan.nii.gz")


def test_windows_that_do_not_fit_together_are_predicted_one_by_one(prepared, caplog):
    network = Bright(room=1)
    found = Predictor(SPEC, network, batch_size=4, precision="fp32").segment_prepared(prepared)
    assert network.tried[0] == 4 and set(network.tried[1:]) == {1}
    np.testing.assert_array_equal(found.label.array, prepared.image > 0)
    (told,) = caplog.messages
    assert told.startswith("W-MEMORY scan.nii.gz: out of memory with 4 windows at once on cpu; going on with 1 window")


def test_one_window_that_does_not_fit_is_an_error(prepared):
    with pytest.raises(torch.OutOfMemoryError):
        Predictor(SPEC, Bright(room=0), batch_size=4).segment_prepared(prepared)


def test_other_errors_of_the_network_are_not_taken_for_lack_of_memory(prepared):
    class Broken(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Predictor(SPEC, Broken(), batch_size=4).segment_prepared(prepared)


def test_a_gpu_is_relieved_step_by_step_and_left_last():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    found = [(way.batch_size, way.device, way.sums_on) for way in ways(gpu, 4)]
    assert found == [(4, gpu, gpu), (1, gpu, gpu), (1, gpu, cpu), (1, cpu, cpu)]
    assert len(ways(cpu, 4)) == 2 and len(ways(cpu, 1)) == 1


def test_logits_that_a_gpu_has_no_room_for_are_put_together_on_the_host_from_the_start():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    found = [(way.batch_size, way.device, way.sums_on) for way in ways(gpu, 4, logits_fit=False)]
    assert found == [(4, gpu, cpu), (1, gpu, cpu), (1, cpu, cpu)]


def test_what_a_gpu_has_room_for_is_asked_before_a_scan_is_predicted(prepared, monkeypatch, caplog):
    caplog.set_level("INFO")
    free = 1 << 30
    monkeypatch.setattr("medseg.inference.predictor.free_bytes", lambda device: free)
    predictor = Predictor(SPEC, Bright(room=4), batch_size=4)
    assert predictor._logits_fit(prepared) and not caplog.messages
    free = 1 << 10
    assert not predictor._logits_fit(prepared)
    assert caplog.messages == ["scan.nii.gz: 0.0 GB of logits are put together on the host, not on cpu"]


SMALL_ROOM = """\
import logging, resource, sys, threading
import numpy as np, torch
from pathlib import Path
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from medseg.data.transforms import Prepared
from medseg.geometry import Geometry
from medseg.inference.predictor import Predictor
from medseg.labels import Labels
from medseg.model import ModelSpec, Preprocessing, Window
from medseg.nets import NETS

torch.set_num_threads(1)
labels = Labels({0: "background", 1: "liver"})
spec = ModelSpec("unet", {}, 3, ("image",), labels, Preprocessing(), Window((32, 32, 32)))
network = NETS["unet"].network(spatial_dims=3, in_channels=1, out_channels=2, channels=[16, 32])
grid = Geometry.from_spacing((64, 64, 64), (1, 1, 1))
prepared = Prepared(np.random.default_rng(0).normal(size=(1, 64, 64, 64)).astype(np.float32), None, grid, grid, "scan")
plain = Predictor(spec, network, batch_size=1, precision="fp32").segment_prepared(prepared).label.array
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 220 * 10**6, resource.RLIM_INFINITY))
found = Predictor(spec, network, batch_size=27, precision="fp32").segment_prepared(prepared).label.array
print("equal", bool((found == plain).all()))
"""


def test_a_host_that_really_runs_out_goes_on_with_less(tmp_path):
    """27 windows at once need some 400 MB, one needs 100; the system gives no more than 220."""
    (tmp_path / "small_room.py").write_text(SMALL_ROOM)
    ended = subprocess.run([sys.executable, tmp_path / "small_room.py"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    told, equal = ended.stdout.splitlines()
    assert told.startswith("W-MEMORY scan: out of memory with 27 windows at once on cpu") and equal == "equal True"
