"""Every loss, forward and backward, beside MONAI's; where MONAI has none, beside torch's or the authors' formula.

    python benchmarks/losses.py [--only dice lovasz] [--size 96 96 96] [--rounds 5] [--threads 2] [--device cpu]

A batch of two patches with three classes: background, a large ellipsoid and a small ball in it, float32 logits that
are noise around them. Each run has a process of its own, warmed up by one call; the sides take turns. Memory is what
the process holds at its peak beyond what it held with logits and target made, on a GPU what torch allocated. Both
sides are set to the same formula, and their values are shown; MONAI's clDice and focal loss average otherwise, and the
smoothing term of its generalized Dice outweighs large organs.
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

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH, CLASSES = 2, 3
BYTES_PER_MB = 1e6
REPEATS = 3
SIDES = ("medseg", "peer")
Loss = Callable[[Tensor, Tensor], Tensor]

MONAI = {
    "focal": ("FocalLoss", {"use_softmax": True, "to_onehot_y": True, "gamma": 2.0}),
    "dice": ("DiceLoss", {"softmax": True, "to_onehot_y": True, "include_background": False, "batch": True}),
    "generalized_dice": ("GeneralizedDiceLoss", {"softmax": True, "to_onehot_y": True, "batch": True}),
    "tversky": (
        "TverskyLoss",
        {"softmax": True, "to_onehot_y": True, "include_background": False, "batch": True, "alpha": 0.3, "beta": 0.7},
    ),
    "boundary": ("BoundaryLoss", {"softmax": True, "to_onehot_y": True, "include_background": False}),
    "hausdorff": ("HausdorffDTLoss", {"softmax": True, "to_onehot_y": True, "include_background": False}),
    "cldice": ("SoftclDiceLoss", {"softmax": True, "to_onehot_y": True, "include_background": False}),
}
"""Class and arguments."""


def peer(name: str) -> Loss:
    """The other side."""
    if name in MONAI:
        from monai import losses

        kind, arguments = MONAI[name]
        loss = getattr(losses, kind)(**arguments)
        return lambda logits, target: loss(logits, target.unsqueeze(1))
    return {
        "cross_entropy": F.cross_entropy,
        "binary_cross_entropy": binary_cross_entropy,
        "top_k": top_k,
        "focal_tversky": focal_tversky,
        "lovasz": lovasz_softmax,
    }[name]


PEERS = {
    "cross_entropy": "torch",
    "binary_cross_entropy": "torch",
    "top_k": "torch",
    "focal_tversky": "MONAI's Tversky",
    "lovasz": "the authors' formula",
}
"""Where it is not a loss of MONAI's."""


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Each class against the rest."""
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(target, CLASSES).movedim(-1, 1).float())


def top_k(logits: Tensor, target: Tensor) -> Tensor:
    """The mean of the hardest tenth."""
    losses = F.cross_entropy(logits, target, reduction="none").flatten()
    return losses.topk(round(0.1 * losses.numel())).values.mean()


def focal_tversky(logits: Tensor, target: Tensor) -> Tensor:
    """A power of MONAI's Tversky loss of each class."""
    from monai.losses import TverskyLoss

    _, arguments = MONAI["tversky"]
    return TverskyLoss(**arguments, reduction="none")(logits, target.unsqueeze(1)).pow(0.75).mean()


def lovasz_softmax(logits: Tensor, target: Tensor) -> Tensor:
    """Errors of each class sorted, times the differences of the Jaccard loss."""
    probs = logits.softmax(1).movedim(1, -1).flatten(0, -2)
    losses = []
    for value in range(CLASSES):
        inside = (target.flatten() == value).float()
        errors, order = (inside - probs[:, value]).abs().sort(descending=True)
        truth = inside[order]
        jaccard = 1 - (truth.sum() - truth.cumsum(0)) / (truth.sum() + (1 - truth).cumsum(0))
        losses.append(errors @ jaccard.diff(prepend=jaccard.new_zeros(1)))
    return torch.stack(losses).mean()


def organs(size: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """Logits and target."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    target = torch.zeros(BATCH, *size, dtype=torch.long)
    for sample in target:
        center = (0.4 * torch.rand(len(size), generator=generator) - 0.2).tolist()
        radius = sum((x - c) ** 2 for x, c in zip(grid, center, strict=True)).sqrt()
        sample[radius < 0.6] = 1
        sample[radius < 0.15] = 2
    hot = F.one_hot(target, CLASSES).movedim(-1, 1)
    logits = 2 * hot + torch.randn(hot.shape, generator=generator)
    return logits.to(device).requires_grad_(), target.to(device)


def peak_mb(device: str) -> float:
    """Of the process so far, or on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / BYTES_PER_MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / BYTES_PER_MB


def measure(side: str, name: str, size: tuple[int, ...], *, threads: int, device: str) -> dict[str, float]:
    """One side of one loss; called in a process of its own."""
    torch.set_num_threads(threads)
    if side == "medseg":
        from medseg.losses import LOSSES

        loss: Loss = LOSSES[name]()
    else:
        loss = peer(name)
    value = step(loss, *organs((16,) * len(size), device))  # imports and first calls take memory of their own
    logits, target = organs(size, device)
    before = peak_mb(device)
    seconds = []
    for _ in range(REPEATS + 1):
        logits.grad = None
        start = time.perf_counter()
        value = step(loss, logits, target)
        seconds.append(time.perf_counter() - start)
    return {"seconds": median(seconds[1:]), "peak_mb": peak_mb(device) - before, "value": value}


def step(loss: Loss, logits: Tensor, target: Tensor) -> float:
    """Forward and backward; on a GPU waits for the end."""
    value = loss(logits, target)
    value.backward()
    return value.item() + 0 * logits.grad[(0,) * logits.dim()].item()


def child(*arguments: str) -> dict[str, float]:
    """What this script prints when another process runs it."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    names = [*PEERS, *MONAI]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--size", type=int, nargs="+", default=(96, 96, 96))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = tuple(options.size)
    if options.side:
        found = measure(options.side, options.only[0], size, threads=options.threads, device=options.device)
        print(json.dumps(found))
        return
    shape = " × ".join(map(str, (BATCH, CLASSES, *size)))
    print(f"{shape}, {options.rounds} rounds, {options.threads} threads, {options.device}")
    print(
        f"{'':21s} {'seconds':>8s} {'peer':>8s} {'ratio':>7s} {'MB':>6s} {'peer':>6s} {'ratio':>7s} {'value':>9s} beside"
    )
    for name in options.only:
        arguments = ["--only", name, "--threads", str(options.threads), "--device", options.device]
        arguments += ["--size", *map(str, size)]
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side, found in runs.items():
                found.append(child("--side", side, *arguments))
        report(name, runs)


def report(name: str, runs: dict[str, list[dict[str, float]]]) -> None:
    """One line: medians, ratios, and by how much the values differ."""
    ours, theirs = ({key: median(run[key] for run in runs[side]) for key in runs[side][0]} for side in SIDES)
    print(
        f"{name:21s} {ours['seconds']:8.3f} {theirs['seconds']:8.3f} {theirs['seconds'] / ours['seconds']:6.2f}× "
        f"{ours['peak_mb']:6.0f} {theirs['peak_mb']:6.0f} {theirs['peak_mb'] / max(ours['peak_mb'], 1):6.2f}× "
        f"{ours['value']:9.5f} {theirs['value']:.5f}, {PEERS.get(name, 'MONAI')}",
        flush=True,
    )


if __name__ == "__main__":
    main()
