"""Tables from name to part (network, loss, optimiser …) whose errors help the person who mistyped."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from medseg.errors import WorkflowError

T = TypeVar("T")

SET_ELSEWHERE = {"deep_supervision": "where the network has it, train.deep_supervision: true switches it on"}
"""What to do instead of passing an argument that medseg passes itself."""


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
    """Refuse arguments that a part does not take, or not of this type, before it is called.

    Args:
        what: The part, for the message: ``"network 'unet'"``.
        function: The class or function that will be called.
        args: The user's keyword arguments.
        given: Parameters that medseg fills in itself and a user may not set.

    Raises:
        WorkflowError: If an argument is unknown, of the wrong type, or one that medseg sets.
    """
    parameters = inspect.signature(function).parameters
    own = [name for name, p in parameters.items() if name not in given and p.kind is not p.VAR_KEYWORD]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    types = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    for name, value in args.items():
        if name in given:
            remedy = SET_ELSEWHERE.get(name, "remove it")
            raise WorkflowError("E-ARGUMENT", f"{what}: {name!r} is set by medseg itself; {remedy}")
        if name not in own and not takes_any:
            raise WorkflowError("E-ARGUMENT", f"{what} has no argument {name!r}{did_you_mean(name, own)}")
        if name in types and not _is(types[name], value):
            raise WorkflowError("E-ARGUMENT", f"{what}: {name} is {value!r}; it must be {_in_words(types[name])}")


def _is(kind: Any, value: Any) -> bool:
    """Whether a value from a workflow is of a type, by JSON's lists and numbers: ``yes`` is a text, no truth."""
    try:
        TypeAdapter(kind).validate_json(json.dumps(value, default=str), strict=True)
    except PydanticSchemaGenerationError:  # another library's type, which no workflow can write down
        return True
    except ValidationError:
        return False
    return True


def _in_words(kind: Any) -> str:
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
    if kind in plain:
        return plain[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_in_words(one) for one in inner)
    if origin is Literal:
        return f"{'one of ' if len(inner) > 1 else ''}{', '.join(map(str, inner))}"
    if origin in (Sequence, list, tuple):
        kinds = dict.fromkeys(_in_words(one) for one in inner if one is not ...)
        return f"a list of {' and '.join(name.removeprefix('a ') + 's' for name in kinds)}"
    if origin in (Mapping, dict):
        return "names with values, {NAME: VALUE}"
    return str(kind)
