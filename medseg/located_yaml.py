"""YAML in which every value knows its file, line and column; plain values only, nothing that could run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from medseg.errors import WorkflowError
from medseg.registry import did_you_mean

SET = "--set"
"""Where a field stands that an override gave."""

MAX_BYTES = 1_000_000
MAX_NODES = 10_000

FieldPath = tuple[str | int, ...]
Positions = dict[FieldPath, str]
"""Field → ``file:line:column``."""


def read_yaml(path: Path) -> tuple[dict[str, Any], Positions]:
    """Read a YAML mapping.

    Returns:
        Plain dictionaries, lists and scalars, and where each field stands.

    Raises:
        WorkflowError: If it cannot be read, is not plain YAML, repeats a key, or is absurdly large.
    """
    return _plain(_parse(path), path)


def override(plain: dict[str, Any], positions: Positions, assignment: str) -> None:
    """Apply ``section.key=value`` (the value in YAML) to what `read_yaml` returned.

    Raises:
        WorkflowError: If it does not look like that.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise WorkflowError("E-SET", f"{assignment!r} must look like train.batch_size=4", where="--set")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise WorkflowError("E-SET", f"{text!r} is not a YAML value", where=f"--set {key}") from None
    section: Any = plain
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents, start=1):
        if not isinstance(section.get(parent), dict):
            _open_section(section, positions, tuple(parents[:depth]))
        section = section[parent]
    if last == "name" and value != section.get("name"):
        _drop_arguments(section, positions, tuple(parents))
    section[last] = value
    path = (*parents, last)
    for known in [known for known in positions if known[: len(path)] == path]:
        del positions[known]
    positions[path] = SET


def _drop_arguments(section: dict[str, Any], positions: Positions, at: FieldPath) -> None:
    """Another part than the file's has arguments of its own; those that were set on the command line stay."""
    if isinstance(section.get("args"), dict):
        section["args"] = {k: v for k, v in section["args"].items() if positions.get((*at, "args", k)) == SET}


def _open_section(section: dict[str, Any], positions: Positions, at: tuple[str, ...]) -> None:
    """Make room for what an override puts below a field; the name of a part, as in ``network: unet``, stays."""
    former = section.get(at[-1])
    if isinstance(former, list):
        message = "is a list, whose entries cannot be set one by one; set the whole of it"
        raise WorkflowError("E-SET", message, where=f"{SET} {dotted(at)}")
    section[at[-1]] = {}
    if isinstance(former, str):
        section[at[-1]]["name"] = former
        positions[(*at, "name")] = positions[at]
    positions[at] = SET


def line_of(place: str) -> tuple[int, ...]:
    """Line and column of ``file:line:column``, to sort by."""
    return tuple(int(part) for part in place.split(":")[-2:] if part.isdigit())


def place(at: Sequence[str | int], positions: Mapping[FieldPath, str], path: Path) -> str:
    """Where a field stands, or the closest section that the file has."""
    for length in range(len(at), 0, -1):
        if tuple(at[:length]) in positions:
            return positions[tuple(at[:length])]
    return str(path)


def dotted(at: Sequence[str | int]) -> str:
    """``loss[0].weight``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).lstrip(".")


def _parse(path: Path) -> CommentedMap:
    try:
        text = path.read_bytes()
    except OSError as error:
        near = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = did_you_mean(str(path), near) if near else ""
        raise WorkflowError("E-WORKFLOW", f"cannot be read ({error.strerror}){hint}", where=str(path)) from None
    if len(text) > MAX_BYTES:
        raise WorkflowError("E-WORKFLOW", f"is {len(text):,} bytes; a workflow has a few hundred", where=str(path))
    try:
        tree = YAML(typ="rt").load(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise WorkflowError("E-WORKFLOW", "is not UTF-8 text", where=str(path)) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = (error.problem or str(error)).split("\n")[0]
        raise WorkflowError(
            "E-YAML", f"{problem}; the file must be plain YAML with each key once", where=place
        ) from None
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise WorkflowError(
            "E-YAML", f"cannot be parsed ({type(error).__name__}: {str(error).splitlines()[0]})", where=str(path)
        ) from None
    if not isinstance(tree, CommentedMap):
        raise WorkflowError("E-YAML", "must be a mapping: name, data, network, train", where=str(path))
    return tree


def _plain(tree: CommentedMap, path: Path) -> tuple[dict[str, Any], Positions]:
    """The tree without YAML's own types, and where each field stands."""
    positions: Positions = {}

    def walk(node: Any, at: FieldPath) -> Any:
        if len(positions) > MAX_NODES:
            raise WorkflowError(
                "E-YAML", f"has more than {MAX_NODES} values (aliases count each time)", where=str(path)
            )
        if isinstance(node, TaggedScalar) or (isinstance(node, CommentedMap | CommentedSeq) and node.tag.value):
            raise WorkflowError(
                "E-YAML-TAG",
                f"{node.tag.value} is a YAML tag; only plain values are read",
                where=f"{place(at, positions, path)} {dotted(at)}",
            )
        if isinstance(node, CommentedMap):
            for key in node:
                line, column = node.lc.key(key)
                positions[(*at, str(key))] = f"{path}:{line + 1}:{column + 1}"
            return {str(key): walk(value, (*at, str(key))) for key, value in node.items()}
        if isinstance(node, CommentedSeq):
            for n in range(len(node)):
                line, column = node.lc.item(n)
                positions[(*at, n)] = f"{path}:{line + 1}:{column + 1}"
            return [walk(value, (*at, n)) for n, value in enumerate(node)]
        if isinstance(node, bool) or node is None:
            return node
        for kind in (int, float, str):  # ruamel's scalars are their children
            if isinstance(node, kind):
                return kind(node)
        return str(node)  # a date, say: the schema will refuse it where it stands

    return walk(tree, ()), positions
