"""Asking a tracking store on behalf of a person: what it does not answer is told in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from medseg.errors import ModelError
from medseg.tracking.mlflow_tracker import ask, open_store
from medseg.tracking.sender import StoreError
from medseg.tracking.uri import absolute_uri, sqlite_file, without_password

if TYPE_CHECKING:
    from medseg.tracking.mlflow_tracker import MlflowClient

T = TypeVar("T")


def connect(uri: str | None) -> MlflowClient:
    """A client of a store that is there already.

    Args:
        uri: None: $MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``.

    Raises:
        ModelError: If there is none, or it does not answer.
    """
    uri = absolute_uri(uri)
    database = sqlite_file(uri)
    if database is not None and not database.exists():  # else looking for a run would make a store
        message = "does not exist, and neither does a folder of that name; name a folder, or the store's URI"
        raise ModelError("E-RUN", f"the tracking store {message}", where=uri)
    return answer(uri, open_store, uri)


def answer(uri: str | None, function: Callable[..., T], *args: Any) -> T:
    """What the store says.

    Raises:
        ModelError: If it refuses or says nothing.
    """
    try:
        return ask(function, *args)
    except StoreError as error:
        raise silent(uri, error) from None


def silent(uri: str | None, error: StoreError) -> ModelError:
    """The error to raise for a store that refuses or says nothing."""
    said = "refuses" if error.refused else "does not answer"
    return ModelError("E-TRACK-DOWN", f"{said}: {error}", where=shown(uri))


def shown(uri: str | None) -> str:
    """A store's URI as people may see it."""
    return without_password(absolute_uri(uri))
