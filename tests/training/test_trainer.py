"""The loop, on a network of one convolution: fast, and exact to the bit."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from medseg.errors import Interrupted, ModelError, TrainingError
from medseg.labels import Labels
from medseg.losses import Compound, CrossEntropy
from medseg.tracking.mlflow_tracker import MlflowTracker, open_store
from medseg.training import optim
from medseg.training import trainer as module
from medseg.training.run_folder import RunFolder
from medseg.training.state import Settings, Validation
from medseg.training.trainer import Trainer

LABELS = Labels({0: "background", 1: "organ"})


class Recorder:
    """Tracker and observer in one."""

    def __init__(self):
        self.metrics, self.notes = [], []

    def log_metrics(self, metrics, step):
        self.metrics += [(name, step, value) for name, value in metrics.items()]

    def log_picture(self, picture, name, step): ...

    def rewind(self, step, count): ...

    def on_step(self, step, loss): ...

    def on_validation(self, step, dice, mean, best): ...

    def note(self, message):
        self.notes.append(message)


def keyed_batches(first, last=1000, *, poison=()):
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        image = torch.randn((2, 1, 6, 6, 6), generator=generator)
        if number in poison:
            image[0, 0, 0, 0, 0] = math.nan
        yield {"image": image, "label": (image > 0).to(torch.uint8), "case": ["a", "b"]}


@pytest.fixture
def make():
    """Makes trainers, and closes their folders after the test."""
    made = []

    def factory(*args, **options):
        made.append(make_trainer(*args, **options))
        return made[-1]

    yield factory
    for trainer, _ in made:
        trainer.fit.args[0].close()


def make_trainer(
    folder: Path, *, batches=keyed_batches, validate=None, dropout=0.3, **numbers
) -> tuple[Trainer, Recorder]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Dropout3d(dropout), nn.Conv3d(4, 2, 1))
    settings = Settings(**{"iterations": 12, "validate_every": 4, "lr": 0.01, "clip_grad_norm": 1.0, **numbers})
    recorder = Recorder()
    optimizer = optim.make_optimizer(
        "adamw", network.parameters(), lr=0.01, weight_decay=0.1, momentum=0.9, betas=(0.9, 0.99)
    )
    trainer = Trainer(
        Fabric(accelerator="cpu", devices=1),
        network,
        loss=Compound([CrossEntropy()], [1.0]),
        optimizer=optimizer,
        rate=optim.poly(12),
        batches=batches,
        target=LABELS.target,
        validate=validate or (lambda net: Validation([("a", "organ", 0.5 + 0.01 * float(net[0].bias.sum().detach()))])),
        settings=settings,
        observer=recorder,
    )
    trainer.fit = partial(trainer.fit, RunFolder(folder), recorder)
    return trainer, recorder


def weights(trainer: Trainer) -> list[np.ndarray]:
    return [tensor.numpy().copy() for tensor in trainer.trained.state_dict().values()]


def same(a: Trainer, b: Trainer) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_an_interrupted_and_resumed_training_ends_with_the_same_bits(make, tmp_path, ema, stop_after):
    whole, recorded = make(tmp_path / "whole", ema=ema)
    whole.fit()

    def interrupting(first):
        for number, batch in enumerate(keyed_batches(first), first):
            if number == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    first, before = make(tmp_path / "broken", ema=ema, batches=interrupting)
    with pytest.raises(Interrupted, match="SIGTERM after"):
        first.fit()
    first.folder.close()
    second, after = make(tmp_path / "broken", ema=ema)
    second.fit()
    assert same(whole, second)
    assert second.progress == whole.progress
    assert dict.fromkeys(before.metrics + after.metrics) == dict.fromkeys(recorded.metrics)
    for name in ("log.jsonl", "validation.csv"):
        assert (tmp_path / "broken" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_accumulated_batches_count_as_one_large_batch(make, tmp_path):
    def pairs(first):  # the same samples, two batches at once
        for number in range(first, 100):
            a, b = (next(iter(keyed_batches(2 * number + n))) for n in range(2))
            yield {key: torch.cat([a[key], b[key]]) for key in ("image", "label")} | {"case": ["a"]}

    def without_norm(trainer):
        trainer.network.module[1] = nn.Identity()  # batch statistics would differ
        return trainer

    small = without_norm(make(tmp_path / "small", accumulate=2, dropout=0.0)[0])
    large = without_norm(make(tmp_path / "large", batches=pairs, dropout=0.0)[0])
    small.fit()
    large.fit()
    for a, b in zip(weights(small), weights(large), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_a_single_nan_is_skipped(make, tmp_path):
    trainer, _ = make(tmp_path, batches=lambda first: keyed_batches(first, poison=[3]))
    progress = trainer.fit()
    assert progress.step == 12
    assert progress.restores == 0
    assert all(np.isfinite(w).all() for w in weights(trainer))


def test_a_loss_that_stays_nan_ends_with_the_cases_named(make, tmp_path):
    trainer, recorder = make(tmp_path, batches=lambda first: keyed_batches(first, poison=range(5, 100)))
    with pytest.raises(TrainingError, match=r"E-NAN-LOSS .* look at cases a, b"):
        trainer.fit()
    assert sum("learning rate ×" in note for note in recorder.notes) == 3


def test_training_stops_early_when_nothing_improves(make, tmp_path):
    scores = iter([0.1, 0.5, 0.4, 0.45, 0.3, 0.2])
    trainer, _ = make(
        tmp_path, validate=lambda net: Validation([("a", "organ", next(scores))]), early_stop=2, iterations=24
    )
    progress = trainer.fit()
    assert progress.step == 16
    assert progress.best_step == 8


def test_the_best_checkpoint_holds_the_weights_of_its_step(make, tmp_path):
    seen = {}

    def validate(net):
        step = 4 * (len(seen) + 1)
        seen[step] = net[0].weight.detach().clone()
        return Validation([("a", "organ", {4: 0.2, 8: 0.6, 12: 0.4}[step])])

    trainer, _ = make(tmp_path, validate=validate)
    trainer.fit()
    best = trainer.best.load()
    assert best["step"] == 8
    assert torch.equal(best["network"]["0.weight"], seen[8])


def test_an_organ_absent_from_every_case_does_not_count(make, tmp_path):
    rows = [("a", "liver", 0.8), ("a", "tumour", math.nan), ("b", "liver", 0.6), ("b", "tumour", math.nan)]
    dice = Validation(rows).dice
    assert dice["liver"] == pytest.approx(0.7)
    assert math.isnan(dice["tumour"])
    trainer, _ = make(tmp_path, validate=lambda net: Validation(rows))
    assert trainer.fit().scores[-1] == pytest.approx(0.7)


def test_logged_losses_are_means_over_ten_steps_or_what_the_end_leaves_and_people_see_the_same(make, tmp_path):
    trainer, recorder = make(tmp_path)
    seen = {}
    recorder.on_step = seen.__setitem__
    losses = []
    step = trainer.train_step
    trainer.train_step = lambda batches: losses.append(step(batches)) or losses[-1]
    trainer.fit()
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["step"]: line["train/loss"] for line in logged} == pytest.approx(
        {10: np.mean(losses[:10]), 12: np.mean(losses[10:])}
    )
    assert seen == pytest.approx(
        {n + 1: np.mean(losses[: n + 1]) for n in range(9)}
        | dict.fromkeys((10, 11), np.mean(losses[:10]))
        | {12: np.mean(losses[10:])}
    )


@pytest.mark.parametrize("stop_at", [None, 3, 7])
def test_a_burst_of_nans_leads_back_to_the_last_validation_whether_or_not_the_run_was_interrupted(
    make, tmp_path, stop_at
):
    """The burst ends once the learning rate was halved, as one that a too high rate causes would."""

    def fitted(folder: str, stop_at: int | None = None) -> Trainer:
        def batches(first):
            for number in range(first, 1000):
                if number == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                bursts = 5 <= number < 11 and trainer.progress.restores == 0
                yield from keyed_batches(number, number + 1, poison=[number] if bursts else [])

        trainer, recorder = make(tmp_path / folder, batches=batches)
        if stop_at is None:
            trainer.fit()
            assert any("back to iteration 4, learning rate × 0.5" in note for note in recorder.notes)
        else:
            with pytest.raises(Interrupted):
                trainer.fit()
            trainer.folder.close()
        return trainer

    whole = fitted("whole")
    if stop_at is not None:
        fitted("broken", stop_at)
    again = fitted("broken")
    assert same(whole, again)
    assert again.progress == whole.progress
    assert (tmp_path / "broken" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_after_a_burst_of_nans_the_store_ends_with_the_numbers_of_the_log(make, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOG_EVERY", 1)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def batches(first):
        for number in range(first, 1000):
            bursts = 6 <= number < 12 and trainer.progress.restores == 0
            yield from keyed_batches(number, number + 1, poison=[number] if bursts else [])

    trainer, _ = make(tmp_path / "run", batches=batches)
    tracker = MlflowTracker.start(tmp_path / "run", uri=uri, experiment="e", run_name="r", params={}, tags={})
    trainer.fit.func(trainer.fit.args[0], tracker)
    tracker.finish("FINISHED")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    history = open_store(uri).get_metric_history(tracker.run_id, "train/lr")
    latest = {m.step: m.value for m in sorted(history, key=lambda m: m.timestamp)}
    assert latest == {line["step"]: line["train/lr"] for line in lines}
    assert sorted(m.step for m in history) == sorted([*latest, 5, 6])  # both courses are there


def test_a_checkpoint_of_another_version_is_refused(make, tmp_path):
    trainer, _ = make(tmp_path)
    trainer.fit()
    trainer.last.save(trainer._state() | {"progress": {"step": 13, "best_dice": {}}}, 13)
    again, _ = make(tmp_path / "other")
    with pytest.raises(ModelError, match=r"E-CHECKPOINT .*another version of medseg"):
        again.fit.func(trainer.fit.args[0], trainer.fit.args[1])
