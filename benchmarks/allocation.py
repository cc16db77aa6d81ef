"""What freed memory costs that is given back to the kernel: a window and a training step, before and with
`medseg.memory.keep_freed_memory`.

    python benchmarks/allocation.py [--channels 16 32 64 128] [--patch 96] [--rounds 3] [--repeats 10]

On the CPU, medseg's U-Net with 25 classes. Each round runs every case in a process of its own, medians of some calls
after one to warm up; faults are the pages that the kernel had to clear for the process, and memory is the process's
highest. Training takes batches of two half as large.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

CASES = {"window, fp32": False, "window, bf16": False, "training step, fp32": True, "training step, bf16": True}


def work(options: argparse.Namespace) -> None:
    """One case in this process."""
    import torch

    from medseg.memory import keep_freed_memory
    from medseg.nets import NETS

    if options.keep:
        keep_freed_memory()
    torch.manual_seed(0)
    network = NETS["unet"].network(3, 1, 25, channels=tuple(options.channels))
    training = CASES[options.case]
    size = (options.patch // 2,) * 3 if training else (options.patch,) * 3
    image = torch.randn(2 if training else 1, 1, *size)
    target = torch.randint(0, 25, (2, *size))
    optimizer = torch.optim.AdamW(network.parameters())

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.case.endswith("bf16")):
            return network(image)

    def predict() -> None:
        with torch.inference_mode():
            forward()

    def step() -> None:
        torch.nn.functional.cross_entropy(forward().float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    network.train(training)
    call: Callable[[], None] = step if training else predict
    seconds = []
    for _ in range(options.repeats + 1):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"seconds": median(seconds[1:]), "faults": used.ru_minflt, "mb": used.ru_maxrss * 1024 / 1e6}))


def main() -> None:
    """Run the cases in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        work(options)
        return
    found: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for case in CASES:
            for keep in (False, True):
                command = [sys.executable, __file__, *sys.argv[1:], "--case", case, *["--keep"] * keep]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found.setdefault((case, keep), []).append(json.loads(done.stdout.splitlines()[-1]))
    print("| | given back, s | kept, s | ratio | page faults | peak MB |\n|---|---|---|---|---|---|")
    for case in CASES:
        before, after = (
            {key: median(run[key] for run in found[case, keep]) for key in ("seconds", "faults", "mb")}
            for keep in (False, True)
        )
        ratio = before["seconds"] / after["seconds"]
        faults, mb = (f"{before[key]:,.0f} → {after[key]:,.0f}" for key in ("faults", "mb"))
        print(f"| {case} | {before['seconds']:.3f} | {after['seconds']:.3f} | {ratio:.2f} | {faults} | {mb} |")


if __name__ == "__main__":
    main()
