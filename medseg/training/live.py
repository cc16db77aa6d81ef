"""What a person sees of a training: progress, loss, Dice of each organ, time left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class LiveDisplay:
    """A bar and a table that stay in place on a terminal; a line a validation elsewhere.

    Args:
        console: Where to.
        title: Name of the run.
        iterations: Of the whole training.
    """

    def __init__(self, console: Console, title: str, iterations: int) -> None:
        self.console = console
        self.started = time.monotonic()
        self.loss = math.nan
        self._iterations = iterations
        self._bar = Progress(
            TextColumn(f"[bold]{title}[/]"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task(title, total=iterations, loss="–")
        self._table: Table | None = None
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveDisplay:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def on_step(self, step: int, loss: float) -> None:
        self.loss = loss
        self._bar.update(self._task, completed=step, loss=f"{self.loss:.3f}")

    def on_validation(self, step: int, dice: Mapping[str, float], mean: float, best: float) -> None:
        table = Table("Dice at iteration", *dice, "mean", "best mean", box=None, header_style="dim")
        table.add_row(f"{step}", *[f"{value:.3f}" for value in dice.values()], f"[bold]{mean:.3f}[/]", f"{best:.3f}")
        self._table = table
        if not self.console.is_terminal:
            organs = "  ".join(f"{organ} {value:.3f}" for organ, value in dice.items())
            minutes = (time.monotonic() - self.started) / 60
            line = f"iteration {step}/{self._iterations}  {minutes:.1f} min  loss {self.loss:.3f}  Dice: {organs}  mean {mean:.3f}"
            self.console.print(line, soft_wrap=True)

    def note(self, message: str) -> None:
        self.console.print(message, soft_wrap=True)

    def _render(self) -> Group:
        return Group(self._bar, *([self._table] if self._table else []))
