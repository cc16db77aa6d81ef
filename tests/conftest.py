"""What all tests share: the folder of real scans, a cache of their own, one thread each, DICOM files to make."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DESELECTED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    # Read when torch and NumPy are first imported, which is later: a process a core beats threads on small arrays.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config.stash[DESELECTED] = 0
    folder = os.environ.get("MEDSEG_DATA")
    if folder and not Path(folder).is_dir():
        raise pytest.UsageError(f"MEDSEG_DATA={folder} is not a folder: set it to the real scans, or unset it")
    if not folder and os.environ.get("MEDSEG_REQUIRE_DATA") == "1":
        raise pytest.UsageError("MEDSEG_REQUIRE_DATA=1 but MEDSEG_DATA is not set: set it to the folder of real scans")


@pytest.hookimpl(trylast=True)  # after -m and -k, so that the count is of tests that would have run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("MEDSEG_DATA"):
        return
    real = [item for item in items if item.get_closest_marker("real_data")]
    if real:
        config.hook.pytest_deselected(items=real)
        items[:] = [item for item in items if item not in real]
    config.stash[DESELECTED] = len(real)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist: it collects, its controller reports
        session.config.workeroutput["deselected"] = session.config.stash[DESELECTED]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    counted = getattr(node, "workeroutput", {}).get("deselected", 0)  # a worker that crashed says nothing
    node.config.stash[DESELECTED] = max(counted, node.config.stash[DESELECTED])  # each collects all tests


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash[DESELECTED]:
        terminalreporter.write_line(f"{count} real-data tests deselected: set MEDSEG_DATA", yellow=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real scans, for tests marked ``real_data``."""
    return Path(os.environ["MEDSEG_DATA"])


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests out of the user's cache; for the session, so that fixtures of any scope are covered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def write_slice(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``make_slice(z, …)`` to a name below `tmp_path`."""
    from .dicom_files import make_slice, save

    def write(name: str, z: float = 0.0, pixels: Any = None, **elements: Any) -> Path:
        return save(make_slice(z, pixels, **elements), tmp_path / name)

    return write


@pytest.fixture
def write_enhanced(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``make_enhanced(pixels, groups, …)`` to a name below `tmp_path`."""
    from .dicom_files import make_enhanced, save

    def write(name: str, pixels: Any, groups: list[dict[str, dict[str, Any]]], **elements: Any) -> Path:
        return save(make_enhanced(pixels, groups, **elements), tmp_path / name)

    return write
