"""Memory: what running out of it looks like, and using freed memory again."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from medseg.memory import keep_freed_memory

keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(10):
    torch.ones(1 << 22)
before = faults()
for _ in range(100):
    torch.ones(1 << 22)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
@pytest.mark.parametrize(("told", "is_kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False)])
def test_freed_memory_is_used_again_unless_the_environment_decides(monkeypatch, told, is_kept):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 50_000) is is_kept  # 16 MiB a hundred times: 400 thousand pages
