"""Checkpoints that a kill cannot tear: written whole, verified by sha256, the one before kept as a spare."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from medseg.errors import ModelError
from medseg.files import remove_leftovers, write_atomically

log = logging.getLogger("medseg")

State = dict[str, Any]


class Checkpoints:
    """The checkpoints of one kind (``last``, ``best``) of a run.

    Each is ``step-<n>.pt`` beside ``step-<n>.sha256``; the second is written last, so a checkpoint
    without it does not exist.

    Args:
        folder: Made if need be.
        keep: How many of the newest stay.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)

    def save(self, state: State, step: int) -> Path:
        """Write a state of tensors and plain values, then drop all but the newest."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = self.folder / f"step-{step:08d}.pt"
        write_atomically(path, buffer.getbuffer())
        digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
        write_atomically(path.with_suffix(".sha256"), digest.encode())
        for old in sorted(self.folder.glob("step-*.sha256"))[: -self.keep]:
            old.unlink()
        self._drop_unfinished()
        return path

    def load(self) -> State | None:
        """The newest intact state, None if there is none yet.

        Raises:
            ModelError: If there are checkpoints but none is intact.
        """
        self._drop_unfinished()
        stamps = sorted(self.folder.glob("step-*.sha256"), reverse=True)
        for stamp in stamps:
            path = stamp.with_suffix(".pt")
            try:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == stamp.read_text().strip():
                    return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
                log.warning("W-CHECKPOINT %s: damaged (sha256 differs); falling back to the one before", path)
            except (OSError, RuntimeError, pickle.UnpicklingError) as error:
                log.warning("W-CHECKPOINT %s: cannot be used (%s); falling back to the one before", path, error)
        if stamps:
            raise ModelError(
                "E-CHECKPOINT", "no checkpoint is intact; start again without --resume", where=str(self.folder)
            )
        return None

    def clear_after(self, step: int) -> None:
        """Forget checkpoints later than a step: a resumed run will write them again."""
        for stamp in self.folder.glob("step-*.sha256"):
            if int(stamp.stem.split("-")[1]) > step:
                stamp.unlink()
        self._drop_unfinished()

    def _drop_unfinished(self) -> None:
        for path in self.folder.glob("step-*.pt"):
            if not path.with_suffix(".sha256").exists():
                path.unlink()
