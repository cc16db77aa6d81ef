"""A run's model is found by the run's id, or by the name that it is registered under."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import ModelError, WorkflowError
from medseg.tracking.mlflow_tracker import ask
from medseg.tracking.runs import Run, downloaded, find_run, no_artifact
from medseg.tracking.sender import StoreError
from medseg.tracking.spool import Delivery
from medseg.tracking.store import answer, connect, silent

if TYPE_CHECKING:
    from medseg.tracking.mlflow_tracker import MlflowClient

REGISTERED = "models:/"


def model_folder(model: str, uri: str | None = None) -> Path:
    """The model folder of a run: in its run folder, or else downloaded once into the user's cache.

    Args:
        model: The run's id, or a registered model: ``models:/name@alias`` or ``models:/name/version``.
        uri: Tracking store; None: $MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``. As for all the others.

    Raises:
        ModelError: If there is no such run or registered model, or the run has logged no model.
    """
    client = connect(uri)
    run = find_run(client, _run_of_registered(client, model) if is_registered(model) else model, uri)
    if run.run_dir and (run.run_dir / "model" / "model.json").exists():
        return run.run_dir / "model"
    return downloaded(client, run, "model")


def register(run: str, name: str, *, alias: str | None = None, tracking_uri: str | None = None) -> dict[str, Any]:
    """Make a run's model a version of a registered model, which ``models:/name@alias`` then means.

    A run that is registered under this name already keeps its version, and only the alias moves.

    Args:
        run: A run folder, or an MLflow run id.
        name: Of the registered model, made if need be.
        alias: Given to this version, and taken from the one that had it.
        tracking_uri: Tracking store; None: the run folder's, else as everywhere.

    Returns:
        ``name, version, alias, run_id, model``; ``model`` is what `medseg predict` takes.

    Raises:
        ModelError: If there is no such run, or it has logged no model.
        WorkflowError: If MLflow does not take the name or the alias.
    """
    delivery = Delivery.load(Path(run))
    if not delivery and Path(run).is_dir():
        message = "is a folder, but no run folder of a training that MLflow knows; name a run folder, or a run's id"
        raise ModelError("E-RUN", message, where=run)
    run_id, uri = (
        (delivery.run_id or delivery.local_id, tracking_uri or delivery.uri) if delivery else (run, tracking_uri)
    )
    client = connect(uri)
    found = find_run(client, run_id, uri)
    if not answer(uri, client.list_artifacts, found.run_id, "model"):
        raise no_artifact(found, "model", "nothing there")
    try:
        version = _version_of(client, found, name)
        if alias:
            ask(client.set_registered_model_alias, name, alias, version)
    except StoreError as error:
        if error.code != "INVALID_PARAMETER_VALUE":
            raise silent(uri, error) from None
        raise WorkflowError("E-REGISTRY", f"MLflow does not take it: {error}", where=f"{name}@{alias}") from None
    model = f"{REGISTERED}{name}" + (f"@{alias}" if alias else f"/{version}")
    return {"name": name, "version": int(version), "alias": alias, "run_id": found.run_id, "model": model}


def is_registered(model: str) -> bool:
    """Whether a MODEL argument means a registered model."""
    return model.startswith(REGISTERED)


def _run_of_registered(client: MlflowClient, model: str) -> str:
    """The id of the run that ``models:/name@alias`` or ``models:/name/version`` comes from."""
    name, is_alias, alias = model.removeprefix(REGISTERED).partition("@")
    if not is_alias:
        name, _, number = name.rpartition("/")
    if not name or not (alias if is_alias else number.isdigit()):
        lacks = "a name" if is_alias and not name else "an alias or a version"
        told = _aliases(client, name if is_alias else name or number)
        message = f"lacks {lacks}; write models:/NAME@ALIAS or models:/NAME/VERSION{told}"
        raise ModelError("E-REGISTRY", message, where=model)
    try:
        if is_alias:
            version = ask(client.get_model_version_by_alias, name, alias)
        else:
            version = ask(client.get_model_version, name, number)
    except StoreError as error:
        message = f"{error}{_aliases(client, name)}; medseg register RUN {name} --alias {alias or 'NAME'} makes one"
        raise ModelError("E-REGISTRY", message, where=model) from None
    if not version.run_id:
        message = f"version {version.version} names no run; register it with medseg register RUN {name}"
        raise ModelError("E-REGISTRY", message, where=model)
    return str(version.run_id)


def _aliases(client: MlflowClient, name: str) -> str:
    try:
        known = ask(client.get_registered_model, name).aliases
    except StoreError:
        return ""
    return f"; it has {', '.join(f'{alias} (version {version})' for alias, version in known.items()) or 'no alias'}"


def _version_of(client: MlflowClient, run: Run, name: str) -> str:
    """The run's version of a registered model, made if need be."""
    try:
        ask(client.create_registered_model, name)
    except StoreError as error:
        if error.code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in ask(client.search_model_versions, f"run_id = '{run.run_id}'"):
        if version.name == name:
            return str(version.version)
    # MLflow's register_model wants a model of its own format, and leaves an empty entry if there is none
    return str(ask(client.create_model_version, name, f"{run.artifacts}/model", run.run_id).version)
