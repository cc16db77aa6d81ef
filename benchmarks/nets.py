"""Every network of the table: parameters, FLOPs, time and peak memory of a forward pass and of a training step.

    python benchmarks/nets.py [--dims 2 3] [--only unet vnet] [--size-2d 256 256] [--size-3d 96 96 96] [--repeats 3]
    python benchmarks/nets.py --dice 100 --picture networks.png

Networks are as their defaults make them (one channel, two classes), batches of one, bf16 where the hardware has it.
Each runs in a process of its own; memory is what the process holds more at its peak than before the network was
made, on a GPU what torch allocated; freed memory is kept, as medseg keeps it. The FLOPs are those of the forward pass, two a multiplication with its addition.
--dice trains each network for some iterations on phantom pictures of nuclei and draws Dice against a step's time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medseg.inference.predictor import has_bf16
from medseg.losses import LOSSES
from medseg.memory import keep_freed_memory
from medseg.nets import NETS
from medseg.nets.describe import CLASSES, IMAGE_CHANNELS, imagined, number_of_parameters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AUTOCAST = torch.bfloat16 if has_bf16(DEVICE) else None
BYTES_PER_MB = 1e6
DICE_SIZE, DICE_BATCH = (96, 96), 4
NUM_LEARNED, NUM_TESTED = 64, 24
DICE_TICKS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
SECOND_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
LABEL_PLACES = [
    ((x, y), side) for y in (0, 9, -9, 18, -18) for x, side in ((7, "left"), (-7, "right"))
]  # in points, the nearest first


def flops(name: str, size: tuple[int, ...]) -> int:
    """Of a forward pass, counted without computing it."""
    net = imagined(NETS[name], len(size)).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode(False), torch.no_grad():
        net(torch.empty((1, IMAGE_CHANNELS, *size), device="meta"))
    return counter.get_total_flops()


def timed(work: Callable[[], object], repeats: int) -> float:
    """Median seconds, after one call to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def peak_mb() -> float:
    """Of the process so far, or on the GPU."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / BYTES_PER_MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / BYTES_PER_MB


def measure(name: str, size: tuple[int, ...], repeats: int) -> dict[str, float]:
    """One network at one size; called in a process of its own."""
    torch.manual_seed(0)
    image = torch.randn(1, IMAGE_CHANNELS, *size, device=DEVICE)
    target = torch.randint(0, CLASSES, (1, *size), device=DEVICE)
    before = peak_mb()
    net = NETS[name].network(len(size), IMAGE_CHANNELS, CLASSES).to(DEVICE)
    loss = LOSSES["cross_entropy"]()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def forward() -> None:
        with torch.inference_mode(), torch.autocast(DEVICE, AUTOCAST, enabled=AUTOCAST is not None):
            net.eval()(image)

    def step() -> None:
        train_step(net, loss, optimizer, image, target)

    found = {"forward_s": timed(forward, repeats), "forward_mb": peak_mb() - before}
    try:
        found |= {"step_s": timed(step, repeats), "step_mb": peak_mb() - before}
    except Exception as error:  # batch norm on one value, or no room
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def train_step(
    net: nn.Module, loss: nn.Module, optimizer: torch.optim.Optimizer, image: torch.Tensor, target: torch.Tensor
) -> None:
    """Forward, loss of the main output, backward, update."""
    with torch.autocast(DEVICE, AUTOCAST, enabled=AUTOCAST is not None):
        outputs = net.train()(image)
    logits = outputs[0] if isinstance(outputs, list) else outputs
    loss(logits.float(), target).backward()
    optimizer.step()
    optimizer.zero_grad()


def quick_dice(name: str, iterations: int) -> dict[str, float]:
    """Dice of nuclei after some iterations on phantom pictures, and the seconds of a step."""
    from medseg.data.phantom import picture

    torch.manual_seed(0)
    made = [picture(seed, DICE_SIZE) for seed in range(NUM_LEARNED + NUM_TESTED)]
    images = torch.stack([torch.from_numpy(one.image.array) for one in made]).float().div(128).sub(1).to(DEVICE)
    labels = torch.stack([torch.from_numpy(one.label.array[0]) for one in made]).long().to(DEVICE)
    net = NETS[name].network(2, 3, CLASSES).to(DEVICE)
    losses = [LOSSES["cross_entropy"](), LOSSES["dice"]()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=iterations)

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return sum(term(logits, target) for term in losses)

    draw = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(iterations):
        chosen = torch.randint(0, NUM_LEARNED, (DICE_BATCH,), generator=draw)
        start = time.perf_counter()
        train_step(net, loss, optimizer, images[chosen], labels[chosen])
        seconds.append(time.perf_counter() - start)
        schedule.step()
    net.eval()
    with torch.inference_mode():
        found = torch.cat([net(batch).argmax(1) for batch in images[NUM_LEARNED:].split(DICE_BATCH)])
    truth = labels[NUM_LEARNED:]
    overlap = 2 * ((found == 1) & (truth == 1)).sum() / ((found == 1).sum() + (truth == 1).sum())
    return {"dice": float(overlap), "step_s": median(seconds)}


def child(*arguments: str) -> dict[str, Any]:
    """What this script prints when another process runs it."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def report(names: list[str], size: tuple[int, ...], repeats: int) -> None:
    """Print the table of one size."""
    times = "×".join(map(str, size))
    precision = "bf16" if AUTOCAST else "fp32"
    print(f"\n{times}, {precision} on {DEVICE}\n")
    print("| network | parameters M | GFLOPs | forward s | MB | step s | MB |\n|---|---|---|---|---|---|---|")
    for name in names:
        if len(size) not in NETS[name].spatial_dims:
            continue
        counted = number_of_parameters(imagined(NETS[name], len(size))) / 1e6
        found = child("--measure", name, "--size", *map(str, size), "--repeats", str(repeats))
        numbers = [
            f"{found[key]:{digits}}" if key in found else "–"
            for key, digits in (("forward_s", ".3g"), ("forward_mb", ".0f"), ("step_s", ".3g"), ("step_mb", ".0f"))
        ]
        error = f" {found['error']}" if "error" in found else ""
        print(f"| {name} | {counted:.2f} | {flops(name, size) / 1e9:.1f} | {' | '.join(numbers)} |{error}", flush=True)


def draw(found: dict[str, dict[str, float]], file: Path) -> None:
    """Dice against the time of a step; an axis of log odds keeps the good ones apart."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator
    from matplotlib.transforms import Bbox

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="logit")
    axes.set_yticks(DICE_TICKS, [f"{tick:g}" for tick in DICE_TICKS])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(SECOND_TICKS, [f"{tick:g}" for tick in SECOND_TICKS])
    axes.xaxis.set_minor_formatter(NullFormatter())
    size = "×".join(map(str, DICE_SIZE))
    axes.set(xlabel=f"seconds a training step ({DICE_BATCH} pictures of {size}, {DEVICE})", ylabel="Dice")
    axes.margins(0.08)
    axes.grid(visible=True, alpha=0.3)
    for numbers in found.values():
        axes.plot(numbers["step_s"], numbers["dice"], "o", color="tab:blue")
    figure.draw_without_rendering()
    dots = [axes.transData.transform((numbers["step_s"], numbers["dice"])) for numbers in found.values()]
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    for name, numbers in found.items():
        point = (numbers["step_s"], numbers["dice"])
        for offset, side in LABEL_PLACES:
            label = axes.annotate(
                name, point, xytext=offset, textcoords="offset points", ha=side, va="center", fontsize=8
            )
            box = label.get_window_extent()
            if axes.bbox.containsx(box.x1) and not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            label = axes.annotate(name, point, xytext=(7, 0), textcoords="offset points", va="center", fontsize=8)
        taken.append(label.get_window_extent())
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", choices=(2, 3), default=(2, 3))
    parser.add_argument("--only", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--size-2d", type=int, nargs=2, default=(256, 256))
    parser.add_argument("--size-3d", type=int, nargs=3, default=(96, 96, 96))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dice", type=int, metavar="ITERATIONS", help="train on a quick task instead")
    parser.add_argument("--picture", type=Path, default=Path("networks.png"), help="of --dice")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()
    if options.measure and options.dice:
        print(json.dumps(quick_dice(options.measure, options.dice)))
    elif options.measure:
        print(json.dumps(measure(options.measure, tuple(options.size), options.repeats)))
    elif options.dice:
        found = {}
        for name in [name for name in options.only if 2 in NETS[name].spatial_dims]:
            result = child("--measure", name, "--dice", str(options.dice))
            print(f"| {name} | {result}", flush=True)
            if "dice" in result:
                found[name] = result
        draw(found, options.picture)
    else:
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(f"torch {torch.__version__}, {device}")
        for dims in options.dims:
            report(options.only, tuple(options.size_2d if dims == 2 else options.size_3d), options.repeats)


if __name__ == "__main__":
    main()
