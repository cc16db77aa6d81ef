import logging

import pytest
import torch

from medseg.errors import ModelError
from medseg.training.checkpoint import Checkpoints


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((3,), float(step))}


def test_the_newest_is_loaded_and_only_so_many_are_kept(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(state(step), step)
    assert store.load()["step"] == 3
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["step-00000002.pt", "step-00000003.pt"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    store = Checkpoints(tmp_path, keep=2)
    store.save(state(1), 1)
    newest = store.save(state(2), 2)
    newest.write_bytes(newest.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING, logger="medseg"):
        assert store.load()["step"] == 1
    assert "W-CHECKPOINT" in caplog.text


def test_without_any_intact_checkpoint_nothing_is_pretended(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    assert store.load() is None
    store.save(state(1), 1).write_bytes(b"")
    with pytest.raises(ModelError, match="E-CHECKPOINT"):
        store.load()


def test_a_kill_between_the_two_files_leaves_the_one_before(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    store.save(state(1), 1)
    store.save(state(2), 2).with_suffix(".sha256").unlink()
    assert Checkpoints(tmp_path, keep=2).load()["step"] == 1
    assert not (tmp_path / "step-00000002.pt").exists()


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    store = Checkpoints(tmp_path, keep=1)

    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    store.save({"x": Evil()}, 1)
    with pytest.raises(ModelError, match="E-CHECKPOINT"):
        store.load()
