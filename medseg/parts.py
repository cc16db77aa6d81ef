"""What people and programs learn of the parts a workflow chooses from: a table of all, a page of one."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

Result = Mapping[str, Any]

_SECTION = re.compile(r"^(Args|Returns|Raises|References?):\n", flags=re.MULTILINE)


def described(entry: Any) -> dict[str, Any]:
    """An entry of a registry in short: ``title, paper, good_for``."""
    return {"title": entry.title, "paper": entry.paper, "good_for": entry.good_for}


def documented(part: Callable[..., Any]) -> dict[str, Any]:
    """What a class or a function says of itself.

    Returns:
        ``about`` (the docstring before its tables, and what it returns), and ``arguments``: name, default and meaning
        of each that has a default; medseg passes the others.
    """
    about, *rest = _SECTION.split(inspect.cleandoc(part.__doc__ or ""))
    sections = {title: inspect.cleandoc(text) for title, text in zip(rest[::2], rest[1::2], strict=True)}
    meanings = dict(re.findall(r"^(\w+): (.*(?:\n +.*)*)", sections.get("Args", ""), flags=re.MULTILINE))
    arguments = [
        {"name": name, "default": parameter.default, "meaning": " ".join(meanings.get(name, "").split())}
        for name, parameter in inspect.signature(part).parameters.items()
        if parameter.default is not parameter.empty
    ]
    return {"about": "\n\n".join([about.strip(), sections.get("Returns", "")]).strip(), "arguments": arguments}


def parts_table(result: Mapping[str, Result], *, caption: str) -> Table:
    """Entries by name, as `described`: a row each. Names are whole whatever the width, for they are to be typed."""
    table = Table(
        Column("name", no_wrap=True, min_width=max(map(len, result)), style="bold"),
        Column("title", overflow="fold"),
        Column("good for", overflow="fold"),
        box=None,
        pad_edge=False,
        caption=caption,
        caption_justify="left",
    )
    for name, entry in result.items():
        table.add_row(name, entry["title"], entry["good_for"])
    return table


def part_page(result: Result) -> RenderableType:
    """What `described` and `documented` say of one entry."""
    groups = [f"groups    {', '.join(result['groups'])}"] if "groups" in result else []  # of metrics
    return Group(*page_head(result), f"good for  {result['good_for']}", *groups, *arguments_table(result))


def page_head(result: Result) -> list[RenderableType]:
    """Title, paper and docstring."""
    return [Text(f"{result['title']}: {result['paper']}", style="bold"), Padding(_flowing(result["about"]), (1, 0))]


def arguments_table(result: Result) -> list[RenderableType]:
    """A row each; nothing where there are none."""
    table = Table("argument", "default", Column("", overflow="fold"), box=None, pad_edge=False)
    for argument in result["arguments"]:
        default = json.dumps(argument["default"], default=str)  # as a workflow has it
        table.add_row(argument["name"], default, _flowing(argument["meaning"]))
    return [Padding(table, (1, 0))] if result["arguments"] else []


def _flowing(text: str) -> str:
    """A docstring's paragraphs without the ends of its lines and the marks of its markup."""
    return "\n\n".join(" ".join(part.split()) for part in text.replace("`", "").split("\n\n"))
