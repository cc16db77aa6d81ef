import multiprocessing
import os
import socket

import pytest

from medseg.files import is_running, remove_leftovers, temporary_path, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    write_atomically(target, b"old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match="is no file"):
            write_atomically(tmp_path / name, b"new")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_only_leftovers_of_dead_processes_of_this_machine_are_removed(tmp_path):
    child = multiprocessing.get_context("spawn").Process(target=int)
    child.start()
    child.join()
    mine = temporary_path(tmp_path / "x")
    dead = tmp_path / f".abc.{socket.gethostname()}.{child.pid}.tmp"
    elsewhere = tmp_path / ".abc.another.host.1.tmp"
    folder = tmp_path / f".def.{socket.gethostname()}.{child.pid}.tmp"
    for path in (mine, dead, elsewhere):
        path.write_bytes(b"")
    folder.mkdir()
    (folder / "image.npy").write_bytes(b"")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere])


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="processes' states are not told here")
def test_a_process_that_has_ended_with_nobody_to_take_note_is_not_running():
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 0"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # which leaves it as it is
    assert not is_running(pid)
    os.waitpid(pid, 0)
    assert is_running(os.getpid())
