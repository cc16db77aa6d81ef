"""MLflow's own pages on a store, for this machine alone."""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
from functools import partial

from medseg.display import console
from medseg.errors import WorkflowError
from medseg.tracking.mlflow_tracker import ENVIRONMENT
from medseg.tracking.store import answer, connect
from medseg.tracking.uri import absolute_uri, sqlite_file

VIEW = "runs?workflowType=machine_learning"
"""The table of runs; MLflow opens its pages on language models otherwise, and no tag of an experiment changes that."""

NUM_LISTED = 10


def serve_ui(uri: str | None = None, host: str = "127.0.0.1", port: int = 5000, *, auth: bool = False) -> int:
    """Run the MLflow UI on a store until it is interrupted, and tell what to open on stderr.

    Args:
        uri: A database; None: $MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``.
        host: Address to listen on; others than this machine's own need `auth`.
        port: Port to listen on.
        auth: Ask for users and passwords (MLflow's basic-auth app, which needs ``mlflow[auth]``).

    Returns:
        The exit code of ``mlflow server``.

    Raises:
        WorkflowError: If anybody on the network could read and delete runs, or there is no such store.
        ModelError: If the store does not answer.
    """
    if not auth and not _is_loopback(host):
        message = (
            f"{host} would let everybody on the network read and delete runs; use 127.0.0.1 "
            "(from elsewhere: ssh -L), or turn on authentication"
        )
        raise WorkflowError("E-UI-HOST", message, where="--host")
    uri = absolute_uri(uri)
    if uri.startswith(("http://", "https://")):
        raise WorkflowError("E-UI-STORE", "is a server with a UI of its own; open it in a browser", where=uri)
    database = sqlite_file(uri)
    if database is not None and not database.exists():
        raise WorkflowError(
            "E-UI-STORE", "no runs here yet; train first, or name the store with --uri", where=str(database)
        )
    addresses = _addresses(uri, f"http://{f'[{host}]' if ':' in host else host}:{port}")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", host, "--port", str(port)]
    command += ["--workers", "1", *(["--app-name", "basic-auth"] if auth else [])]
    if database is not None:
        command += ["--artifacts-destination", str(database.parent / "mlartifacts")]
    console().print(f"MLflow is starting; then open\n{addresses}", markup=False, soft_wrap=True)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must not outlive this process
    try:
        with subprocess.Popen(command, env={**ENVIRONMENT, **os.environ}) as server:
            try:
                return server.wait()
            except KeyboardInterrupt:  # Ctrl-C reaches the server too, which ends by itself
                server.terminate()
                server.wait()
                return 0
    finally:
        signal.signal(signal.SIGTERM, former)


def _addresses(uri: str, server: str) -> str:
    """A line for each of the newest experiments: its name, and the address of its runs."""
    experiments = answer(uri, partial(connect(uri).search_experiments, max_results=NUM_LISTED))
    width = max((len(each.name) for each in experiments), default=0)
    return "\n".join(f"{each.name:{width}}  {server}/#/experiments/{each.experiment_id}/{VIEW}" for each in experiments)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
