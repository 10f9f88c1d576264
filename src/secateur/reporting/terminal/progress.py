"""Progress with time left, on stderr: a bar in a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from ...progress import Progress, Silent

EVERY_SECONDS = 10


def terminal_progress(quiet: bool = False, lines: bool = True) -> Progress:
    """The progress that fits stderr: a bar in a terminal, else lines (unless `lines` is False)."""
    if quiet:
        return Silent()
    if sys.stderr.isatty():
        return Bar()
    return Lines() if lines else Silent()


class Bar:
    """One bar for the task at hand."""

    def start(self, task: str, total: float, done: float = 0) -> None:
        """Draw a bar."""
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._bars = RichProgress(*columns, console=Console(stderr=True), transient=True)
        self._bars.start()
        self._task = self._bars.add_task(task, total=total, note="")
        self._bars.update(self._task, completed=done)

    def advance(self, done: float = 1, note: str | None = None) -> None:
        """Move it."""
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self._bars.update(self._task, advance=done, **fields)

    def finish(self) -> None:
        """Take it away."""
        self._bars.stop()


class Lines:
    """Plain lines, for logs."""

    def start(self, task: str, total: float, done: float = 0) -> None:
        """Remember the task."""
        self._task, self._total, self._first, self._done, self._note = task, total, done, done, ""
        self._started = self._said = time.monotonic()

    def advance(self, done: float = 1, note: str | None = None) -> None:
        """Say where it stands, now and then."""
        self._done += done
        self._note = self._note if note is None else note
        now = time.monotonic()
        if now - self._said >= EVERY_SECONDS and self._done > self._first:
            self._said = now
            left = (now - self._started) / (self._done - self._first) * (self._total - self._done)
            note = f", {self._note}" if self._note else ""
            sys.stderr.write(f"{self._task}: {self._done / self._total:.0%}, {left:.0f} s left{note}\n")
            sys.stderr.flush()

    def finish(self) -> None:
        """Nothing is left on the screen."""
