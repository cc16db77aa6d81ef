"""Optimizers by name, and learning rates as pure functions of step and scores, so resume has nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

Rate = Callable[[int, Sequence[float]], float]
"""(step, validation scores so far) → what the base learning rate is multiplied by."""


def make_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    betas: tuple[float, float],
) -> Optimizer:
    """SGD with Nesterov momentum, Adam or AdamW; weight decay spares biases and norms, which it would only shrink."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    return {"adam": Adam, "adamw": AdamW}[name](groups, lr=lr, betas=betas)


def poly(iterations: int, *, power: float = 0.9) -> Rate:
    """(1 - step / iterations) ** power, as DeepLab and nnU-Net decay."""
    return lambda step, scores: max(0.0, 1 - step / iterations) ** power


def cosine(iterations: int) -> Rate:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts)."""
    return lambda step, scores: (1 + math.cos(math.pi * min(1.0, step / iterations))) / 2


def plateau(*, patience: int, factor: float) -> Rate:
    """Multiplied by `factor` whenever `patience` validations in a row brought no better score."""

    def rate(step: int, scores: Sequence[float]) -> float:
        best, waited, scale = -math.inf, 0, 1.0
        for score in scores:
            best, waited = (score, 0) if score > best else (best, waited + 1)
            if waited == patience:
                waited, scale = 0, scale * factor
        return scale

    return rate


def constant() -> Rate:
    """Always 1."""
    return lambda step, scores: 1.0


def with_warmup(rate: Rate, steps: int) -> Rate:
    """Ramped up linearly over the first steps."""
    return lambda step, scores: rate(step, scores) * min(1.0, (step + 1) / (steps + 1))
