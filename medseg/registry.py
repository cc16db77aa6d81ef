"""Tables from name to part (network, loss, optimiser …) whose errors help the person who mistyped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from medseg.errors import WorkflowError

T = TypeVar("T")


def did_you_mean(name: str, options: Collection[str]) -> str:
    """``"; did you mean 'unet'?"`` where an option is close, else the options themselves."""
    close = get_close_matches(name.lower(), [option.lower() for option in options], n=1, cutoff=0.6)
    for option in options:
        if close and option.lower() == close[0]:
            return f"; did you mean {option!r}?"
    return f"; known: {', '.join(sorted(options))}"


class Registry(Mapping[str, T]):
    """An explicit, read-only table.

    Args:
        kind: What the entries are, for messages: ``"network"``.
        entries: Name to entry.
    """

    def __init__(self, kind: str, entries: Mapping[str, T]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            hint = did_you_mean(name, self._entries)
            raise WorkflowError("E-UNKNOWN-NAME", f"no {self.kind} is called {name!r}{hint}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:  # Mapping's own would swallow only KeyError
        return name in self._entries


def check_arguments(
    what: str, function: Callable[..., Any], args: Mapping[str, Any], given: Collection[str] = ()
) -> None:
    """Refuse arguments that a part does not take, before it is called.

    Args:
        what: The part, for the message: ``"network 'unet'"``.
        function: The class or function that will be called.
        args: The user's keyword arguments.
        given: Parameters that medseg fills in itself and a user may not set.

    Raises:
        WorkflowError: If an argument is unknown or one that medseg sets.
    """
    parameters = inspect.signature(function).parameters
    own = [name for name, p in parameters.items() if name not in given and p.kind is not p.VAR_KEYWORD]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in args:
        if name in given:
            raise WorkflowError("E-ARGUMENT", f"{what}: {name!r} is set by medseg itself; remove it")
        if name not in own and not takes_any:
            raise WorkflowError("E-ARGUMENT", f"{what} has no argument {name!r}{did_you_mean(name, own)}")
