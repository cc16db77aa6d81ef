"""The training loop: how long it waits for data, and what a step costs in fp32 and bf16, beside MONAI's DynUNet.

    MEDSEG_DATA=/path/to/data python benchmarks/training.py [--steps 30] [--rounds 3]

Runs the real loop's parts (cache, augmentation, loader, loss, optimizer) on the phantom liver and, with
MEDSEG_DATA, on the hippocampus. The two networks take turns on the same batch with the same loss and
optimizer; the ratio is the claim. Memory is the process's peak so far.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from pathlib import Path
from statistics import median

import torch
from monai.networks.nets import DynUNet
from torch import nn

from medseg.build.data import manifest, training_data
from medseg.build.model import Hardware
from medseg.build.training import trainer as make_trainer
from medseg.display import console
from medseg.training.live import LiveDisplay
from medseg.training.trainer import Trainer
from medseg.workflow import Workflow

WORKFLOWS = Path(__file__).parents[1] / "workflows"


def build(workflow: Workflow) -> Trainer:
    """Everything that `medseg train` would train with."""
    display = LiveDisplay(console(), workflow.name, workflow.train.iterations)
    return make_trainer(workflow, training_data(workflow, manifest(workflow), 0), observer=display, hardware=Hardware())


def waiting_share(trainer: Trainer, steps: int) -> tuple[float, float]:
    """Share of the loop's time spent waiting for a batch, and seconds a step; the first batches are not counted."""
    waited = worked = 0.0
    trainer.network.train()
    asked = time.perf_counter()
    for number, batch in enumerate(trainer.batches(0)):
        got = time.perf_counter()
        trainer.train_step([trainer.fabric.to_device(batch)])
        done = time.perf_counter()
        if number >= 3:
            waited += got - asked
            worked += done - got
        asked = done
        if number == steps + 2:
            break
    return waited / (waited + worked), (waited + worked) / steps


def dynunet(channels: tuple[int, ...], in_channels: int, out_channels: int) -> nn.Module:
    """MONAI's network of the same levels and channels."""
    depth = len(channels)
    return DynUNet(
        3,
        in_channels,
        out_channels,
        kernel_size=[3] * depth,
        strides=[1] + [2] * (depth - 1),
        upsample_kernel_size=[2] * (depth - 1),
        filters=channels,
    )


def step_seconds(trainer: Trainer, network: nn.Module, *, autocast: torch.dtype | None, steps: int) -> float:
    """Median of forward, loss, backward and update."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    batch = trainer.fabric.to_device(next(iter(trainer.batches(0))))
    target, mask = trainer.target(batch["label"])
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast(trainer.fabric.device.type, autocast, enabled=autocast is not None):
            logits = network(batch["image"])
        trainer.loss(logits, target, mask).backward()
        optimizer.step()
        optimizer.zero_grad()
        if trainer.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def report(name: str, overrides: list[str], *, steps: int, rounds: int) -> None:
    """Measure one workflow and print its lines."""
    workflow = Workflow.load(WORKFLOWS / f"{name}.yaml", overrides)
    trainer = build(workflow)
    share, seconds = waiting_share(trainer, steps)
    print(f"{name}: patch {workflow.train.patch_size}, batch {workflow.train.batch_size}")
    print(f"  waiting for data {share:.1%} of the loop, {seconds:.3f} s an iteration")
    ours = trainer.network.module
    theirs = dynunet(tuple(workflow.network.args["channels"]), 1, ours.head.out_channels).to(trainer.fabric.device)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for side, network in (("medseg", ours), ("DynUNet", theirs)):
            for precision, autocast in (("fp32", None), ("bf16", torch.bfloat16)):
                found = step_seconds(trainer, network, autocast=autocast, steps=3)
                times.setdefault((side, precision), []).append(found)
    for (side, precision), found in times.items():
        print(f"  {side:8s} {precision}: {median(found):.3f} s a step")
    fp32, bf16 = (median(times["medseg", precision]) for precision in ("fp32", "bf16"))
    print(f"  bf16 is {fp32 / bf16:.2f} times as fast as fp32", end="; ")
    print(f"DynUNet takes {median(times['DynUNet', 'bf16']) / bf16:.2f} times as long in bf16")
    print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {device}")
    report("liver", [], steps=options.steps, rounds=options.rounds)
    if os.environ.get("MEDSEG_DATA"):
        report("hippocampus", [], steps=options.steps, rounds=options.rounds)
    else:
        print("hippocampus: left out, as MEDSEG_DATA is not set")


if __name__ == "__main__":
    main()
