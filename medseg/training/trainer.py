"""The training loop, from top to bottom.

Nothing in it depends on when the run was interrupted: samples and dropout are keyed by seed and
step, learning rates are functions of step and scores, and everything else is in the checkpoint.
"""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from medseg.errors import Interrupted, ModelError, TrainingError
from medseg.training.checkpoint import Checkpoints
from medseg.training.optim import Rate
from medseg.training.run_folder import RunFolder
from medseg.training.signals import handled_by
from medseg.training.state import Batch, Observer, Progress, Settings, Target, Tracker, Validation

LOG_EVERY = 10
CHECKPOINT_SECONDS = 300
"""A kill costs at most these seconds of training, besides what stands at each validation."""

MAX_SKIPS = 5
MAX_RESTORES = 3


class Trainer:
    """Trains one network.

    Args:
        fabric: Devices and precision.
        network: Not yet set up by `fabric`.
        loss: (logits, target, mask) → scalar; ``set_step`` is called where it has one.
        optimizer: Over the network's parameters.
        rate: What ``settings.lr`` is multiplied by at each step.
        batches: First batch number → batches from there on, keyed by their number.
        target: Label batch → (target, mask) as the loss wants it.
        validate: Network → scores; None: never.
        settings: The numbers.
        observer: Who watches.
    """

    def __init__(
        self,
        fabric: Fabric,
        network: nn.Module,
        *,
        loss: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        rate: Rate,
        batches: Callable[[int], Iterable[Batch]],
        target: Target,
        validate: Callable[[nn.Module], Validation] | None,
        settings: Settings,
        observer: Observer,
    ) -> None:
        self.fabric = fabric
        self.network, self.optimizer = fabric.setup(network, optimizer)
        self.ema = _averaged(self.network.module, settings.ema)  # only now is it on its device
        self.loss = loss
        self.rate = rate
        self.batches = batches
        self.target = target
        self.validate = validate
        self.settings = settings
        self.observer = observer
        self.progress = Progress()
        self.seconds_waiting = 0.0
        self.seconds_training = 0.0
        self._logged: float | None = None
        self._stop: signal.Signals | None = None

    @property
    def trained(self) -> nn.Module:
        """The network that is validated and kept: the averaged one if there is an EMA."""
        return self.ema.module if self.ema else self.network.module

    def fit(self, folder: RunFolder, tracker: Tracker) -> Progress:
        """Train from where the run folder's last checkpoint stands, to the end.

        Args:
            folder: Where checkpoints, tables and pictures go.
            tracker: Where metrics go.

        Raises:
            Interrupted: After SIGTERM or Ctrl-C; the state is saved.
            TrainingError: If the loss stays NaN or infinite, or no more batches can be had (the state is saved then).
        """
        self.folder, self.tracker = folder, tracker
        self.last = Checkpoints(folder.checkpoints / "last", keep=2)
        self.good = Checkpoints(folder.checkpoints / "good", keep=2)
        self.best = Checkpoints(folder.checkpoints / "best", keep=2)
        self._resume()
        with handled_by(self._ask_to_stop):
            while not self._finished():
                try:
                    self._run_until_done_or_diverged()
                except _Diverged as diverged:
                    self._restore_last_good(diverged)
        return self.progress

    def train_step(self, batches: Sequence[Batch]) -> float:
        """One update of the weights.

        Args:
            batches: `accumulate` batches: ``image`` (B, C, I, J, K), ``label`` (B, 1, I, J, K).

        Returns:
            The loss, NaN or infinite if the update was skipped for it.
        """
        progress, settings = self.progress, self.settings
        torch.manual_seed(_mixed(settings.seed, progress.step))  # dropout is keyed too
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * progress.lr_scale * self.rate(progress.step, progress.scores)
        if hasattr(self.loss, "set_step"):
            self.loss.set_step(progress.step)
        buffers = [
            buffer.clone() for buffer in self.network.buffers()
        ]  # batch norm's, which a NaN would spoil for good
        total = 0.0
        for n, batch in enumerate(batches):
            with self.fabric.no_backward_sync(self.network, enabled=n + 1 < len(batches)):
                target, mask = self.target(batch["label"])
                loss = self.loss(self.network(batch["image"]), target, mask) / len(batches)
                self.fabric.backward(loss)
            total += float(loss.detach())
        norm = self.fabric.clip_gradients(
            self.network, self.optimizer, max_norm=settings.clip_grad_norm or math.inf, error_if_nonfinite=False
        )
        if math.isfinite(total) and bool(torch.as_tensor(norm).isfinite()):
            self.optimizer.step()
            if self.ema:
                self.ema.update_parameters(self.network.module)
        else:
            total = math.nan
            for buffer, before in zip(self.network.buffers(), buffers, strict=True):
                buffer.copy_(before)
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def save(self) -> None:
        """Write the last checkpoint."""
        self.last.save(self._state(), self.progress.step)

    def _save_as_good(self) -> None:
        """Save at a step that does not hang on the clock or on a signal: a divergence goes back there, and to the
        same step whether or not the run was interrupted in between.
        """
        self.good.save(self._state(), self.progress.step)
        self.save()

    def _run_until_done_or_diverged(self) -> None:
        settings, progress = self.settings, self.progress
        self.network.train()
        skipped = progress.skipped
        saved = asked = time.monotonic()
        for batches in _groups(self._loaded(progress.step * settings.accumulate), settings.accumulate):
            batches = [self.fabric.to_device(batch) for batch in batches]
            got = time.monotonic()
            loss = self.train_step(batches)
            progress.step += 1
            self.seconds_waiting += got - asked
            if math.isfinite(loss):
                skipped.clear()
                self._log_loss(loss)
            else:
                skipped += [case for batch in batches for case in batch["case"]]
                if len(skipped) >= MAX_SKIPS * len(batches) * len(batches[0]["case"]):
                    raise _Diverged(list(skipped))
            self.seconds_training += time.monotonic() - asked
            if progress.step == settings.iterations or (progress.step % settings.validate_every == 0 and not skipped):
                self._validate()
                self._save_as_good()
                saved = time.monotonic()
            elif self._stop or (time.monotonic() - saved > CHECKPOINT_SECONDS and not skipped):
                self.save()
                saved = time.monotonic()
            if self._stop:
                raise Interrupted(
                    "E-INTERRUPTED",
                    f"{self._stop.name} after {progress.step} of {settings.iterations} iterations; everything is saved",
                )
            if self._finished():
                return
            asked = time.monotonic()

    def _loaded(self, first: int) -> Iterator[Batch]:
        """The batches; where no more can be had, what was trained so far is saved before that is told."""
        try:
            yield from self.batches(first)
        except TrainingError:
            self.save()
            raise

    def _validate(self) -> None:
        if self.validate is None:
            return
        progress = self.progress
        network = self.trained
        network.eval()
        result = self.validate(network)
        network.train()
        dice = result.dice
        scored = [
            value for organ, value in dice.items() if not math.isnan(value) and organ in (self.settings.scored or dice)
        ]
        mean = float(np.mean(scored)) if scored else 0.0
        if mean > progress.best:
            progress.best_step = progress.step
            self.best.save({"step": progress.step, "network": copy.copy(network.state_dict())}, progress.step)
        progress.scores.append(mean)
        self.folder.add_validation(progress.step, result.rows)
        self.tracker.log_metrics(
            {f"val/dice/{organ}": value for organ, value in dice.items()} | {"val/mean_dice": mean}, progress.step
        )
        for case, picture in result.pictures.items():
            self.tracker.log_picture(picture, case, progress.step)
        self.observer.on_validation(progress.step, dice, mean, progress.best)

    def _log_loss(self, loss: float) -> None:
        progress = self.progress
        progress.loss_sum += loss
        progress.loss_count += 1
        mean = progress.loss_sum / progress.loss_count
        if progress.step % LOG_EVERY == 0 or progress.step == self.settings.iterations:
            values = {"train/loss": mean, "train/lr": self.optimizer.param_groups[0]["lr"]}
            progress.loss_sum, progress.loss_count = 0.0, 0
            self.tracker.log_metrics(values, progress.step)
            self.folder.log(progress.step, values)
            self._logged = mean
        self.observer.on_step(progress.step, mean if self._logged is None else self._logged)

    def _finished(self) -> bool:
        progress, patience = self.progress, self.settings.early_stop
        if patience and len(progress.scores) > patience and max(progress.scores[-patience:]) < progress.best:
            return True
        return progress.step >= self.settings.iterations

    def _state(self) -> dict[str, Any]:
        return {
            "network": self.network.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "progress": vars(self.progress),
        }

    def _resume(self) -> None:
        state = self.last.load()
        step = 0
        if state:
            self._load(state)
            step = self.progress.step
            self.observer.note(f"resuming after {step} of {self.settings.iterations} iterations")
        else:
            self._save_as_good()  # something to go back to if the first iterations diverge
        self.best.clear_after(step)
        self.good.clear_after(step)
        self.folder.continue_from(step)
        if self.progress.restores:
            self.tracker.rewind(step, self.progress.restores)  # in case the kill came before it was told

    def _load(self, state: Mapping[str, Any]) -> None:
        self.network.module.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        try:
            self.progress = Progress(**state["progress"])
        except TypeError as error:
            message = f"was written by another version of medseg ({error}); start again without --resume"
            raise ModelError("E-CHECKPOINT", message, where=str(self.last.folder)) from None

    def _restore_last_good(self, diverged: _Diverged) -> None:
        """Back to the last checkpoint with half the learning rate; after a few times, give up."""
        restores, scale = self.progress.restores + 1, self.progress.lr_scale / 2
        state = self.good.load()
        if restores > MAX_RESTORES or state is None:
            cases = ", ".join(sorted(set(diverged.cases)))
            raise TrainingError(
                "E-NAN-LOSS",
                f"the loss is NaN or infinite at iteration {self.progress.step} although the learning rate was halved "
                f"{restores - 1} times; look at cases {cases}, or lower train.optimizer.lr",
            )
        self._load(state)
        self.folder.continue_from(self.progress.step)
        self.progress.restores, self.progress.lr_scale = restores, scale
        self._save_as_good()
        self.tracker.rewind(self.progress.step, restores)
        self.observer.note(
            f"loss not finite {MAX_SKIPS} times in a row: back to iteration {self.progress.step}, learning rate × {scale}"
        )

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        """End the loop after the step under way; a second Ctrl-C ends it at once."""
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = signal.Signals(number)
        self.observer.note(f"{self._stop.name}: finishing this iteration and saving …")


class _Diverged(Exception):
    def __init__(self, cases: Sequence[str]) -> None:
        super().__init__(cases)
        self.cases = cases


def _averaged(network: nn.Module, decay: float) -> AveragedModel | None:
    if not decay:
        return None
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def _mixed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
