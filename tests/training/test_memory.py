"""Requests that no machine can answer, made for real; and what CUDA says, which needs one with a GPU."""

import errno

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from medseg.errors import DataError, TrainingError
from medseg.training.memory import memory_told

ABSURD = 2**60


class Absurd(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return np.empty(ABSURD, np.uint8)


def cuda_says(bytes_asked: str):
    raise torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {bytes_asked}. GPU 0 has a total capacity of …"
    )


def cannot_fork():
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lambda: torch.empty(ABSURD, dtype=torch.uint8), r"is not enough: 1\.15e\+09 GB more were asked for; less"),
        (lambda: np.empty(ABSURD, np.uint8), r"is not enough: 1\.00 EiB more were asked for; less"),
        (lambda: next(iter(DataLoader(Absurd(), sampler=[0], num_workers=1))), r"1\.00 EiB more were asked for; less"),
        (lambda: cuda_says("20.00 GiB"), r"memory of the GPU is not enough: 20\.00 GiB more were asked for; less"),
        (cannot_fork, "the memory is not enough; less"),
    ],
    ids=["torch", "numpy", "worker", "cuda", "fork"],
)
def test_memory_that_runs_out_is_told_with_what_was_asked_for_and_a_remedy(work, told):
    with (
        pytest.raises(TrainingError, match=f"E-MEMORY train.batch_size: .*{told}"),
        memory_told("less", where="train.batch_size"),
    ):
        work()


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), FileNotFoundError("x"), DataError("E-X", "x")])
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, memory_told("less", where="train.batch_size"):
        raise error
    assert caught.value is error
