"""How a command ends: its result on stdout, or its fault as one message on stderr, and its exit code."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from medseg.display import console
from medseg.errors import MedsegError
from medseg.files import NO_ROOM

Result = Mapping[str, Any]

WORSE = 1
REFUSED = 2
SOME_CASES_FAILED = 3
INTERNAL_ERROR = 4
INTERRUPTED = 130


class OneMessage(TyperGroup):
    """Runs a command so that a fault ends in one message on stderr and the exit code that belongs to it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take ``--debug`` anywhere: people append it to the command that has just failed."""
        if "--debug" in args:
            args = ["--debug", *(argument for argument in args if argument != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise  # typer's own: --help, or a usage error, which it prints and exits 2 with
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED, debug=ctx.params["debug"])
        except MedsegError as error:
            _fail(str(error), error.exit_code, debug=ctx.params["debug"])
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                place = f" {error.filename}" if error.filename else ""
                message = f"E-DISK{place}: {error.strerror}; make room, then go on where this ended (--resume)"
                _fail(message, INTERNAL_ERROR, debug=ctx.params["debug"])
            if isinstance(error, OSError) and error.filename:
                _fail(_file_message(error), REFUSED, debug=ctx.params["debug"])
            found = f"{type(error).__name__}: {error}".rstrip(": ").splitlines()[0]
            message = f"internal error: {found}; this is a fault of medseg: run with --debug for the traceback"
            _fail(message, INTERNAL_ERROR, debug=ctx.params["debug"])


def _file_message(error: OSError) -> str:
    """Of a file that medseg was about to write, the folder is named and not its own hidden name."""
    path = Path(os.fsdecode(error.filename))
    path = path.parent if path.name.startswith(".") and path.suffix == ".tmp" else path
    if isinstance(error, FileExistsError | NotADirectoryError):
        file = next((place for place in (path, *path.parents) if place.is_file()), path)
        return f"E-FILE {file}: is a file; give a folder"
    remedy = "; give a place that can be written" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else ""
    return f"E-FILE {path}: {error.strerror}{remedy}"


@contextmanager
def stdout_kept_free() -> Iterator[None]:
    """Send what libraries print to stderr: stdout carries the result and nothing else."""
    with redirect_stdout(sys.stderr):
        yield


def print_result(result: Result, as_json: bool, table: Callable[[Result], RenderableType] | None = None) -> None:
    """Print a result on stdout: one JSON object, or what people like to read."""
    if as_json:
        sys.stdout.write(json_text(result) + "\n")
    else:
        shown = (table or _listing)(result)
        is_text = isinstance(shown, str | Text)  # one message a line, however long, so that grep and scripts find it
        Console(highlight=False).print(shown, markup=False, soft_wrap=is_text, crop=False)


def json_text(result: Result, *, indent: int | None = None) -> str:
    """A result as JSON; numbers that JSON does not know are null."""
    return json.dumps(_plain(result), allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """The same in JSON's types; numbers that JSON does not know become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):  # NumPy's too
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _listing(result: Result, indent: str = "") -> str:
    """A line each, nested things indented."""
    lines = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", _listing(value, indent + "  ")]
        elif isinstance(value, list | tuple):
            lines += [f"{indent}{key} ({len(value)})", *(f"{indent}  {_one_line(item)}" for item in value)]
        else:
            lines.append(f"{indent}{key}  {_one_line(value)}")
    return "\n".join(line for line in lines if line.strip())


def _one_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return "  ".join(_one_line(inner) for inner in value.values())
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def training_summary(result: Result) -> RenderableType:
    """How well each organ was found, where everything is, and what to do next."""
    if "folds" in result:
        return _folds_summary(result)
    if "model_dir" not in result:  # a rehearsal
        return Text(_listing(result))
    best, last = result["best"], result["last"]
    table = Table("held-out Dice", *best["dice"], "mean", box=None, padding=(0, 2, 0, 0))
    for name, found in (("best", best), ("last", last)):
        dice = [f"{value:.3f}" for value in (*found["dice"].values(), found["mean_dice"])]
        table.add_row(f"{name} checkpoint, iteration {found['step']}", *dice)
    run = result["run_dir"]
    places = {
        "model": result["model_dir"],
        "pictures": result["pictures"],
        "per case": result["per_case"],
        **({"report": result["report"]} if "report" in result else {}),
        "MLflow run": f"{result['mlflow_run_id']}   (medseg ui)",
        "next": f"medseg predict {run} SCAN -o segmentations",
    }
    return Group(table, _places(places))


def _folds_summary(result: Result) -> RenderableType:
    """How well each organ was found in each fold and in all of them."""
    best, folds = result["best"], result["folds"]
    table = Table("held-out Dice", *best["dice"], "mean", box=None, padding=(0, 2, 0, 0))
    rows = {f"fold {fold['fold']}, iteration {fold['best']['step']}": fold["best"] for fold in folds}
    for name, found in {**rows, "all cases": best}.items():
        table.add_row(name, *(f"{value:.3f}" for value in (*found["dice"].values(), found["mean_dice"])))
    places = {
        "models": f"{folds[0]['model_dir']} and {len(folds) - 1} more",
        "per case": result["per_case"],
        **({"report": result["report"]} if "report" in result else {}),
        "MLflow run": f"{result['mlflow_run_id']}   (medseg ui)",
        "next": f"medseg predict {folds[0]['run_dir']} SCAN -o segmentations",
    }
    return Group(table, _places(places))


def _places(places: Mapping[str, str]) -> Text:
    lines = "\n".join(f"{name:<12}{place}" for name, place in places.items())
    return Text(f"\n{lines}\n", overflow="ignore", no_wrap=True)


def _fail(message: str, exit_code: int, *, debug: bool) -> NoReturn:
    """Print a message (within an ``except``: the traceback before it, if asked for) and leave."""
    people = console()
    if debug:
        people.print_exception(width=None)
    people.print(message, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(exit_code)
