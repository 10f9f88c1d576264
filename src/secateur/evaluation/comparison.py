"""Models compared: dense first, then every cell of a grid.

A comparison lives in a directory:

    measurements.jsonl   one line for each finished measurement: never made twice
    work/                models while they are measured
    lock                 held while a process works here; dies with it
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..progress import Progress
from .grid import Cell
from .place import kept_in
from .rows import DENSE, make_row
from .subject import Conditions, Subject

log = logging.getLogger("secateur")


def compare_models(
    models: Sequence[str],
    cells: Sequence[Cell],
    conditions: Conditions,
    folder: Path,
    progress: Progress,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Measure every model dense, and pruned as each cell says; go on where an earlier process stopped.

    Args:
        models: MODELs as the user names them.
        cells: ways to prune them.
        conditions: the same for all.
        folder: where the comparison lives.
        progress: hears of the work.
        keep: called with all rows so far whenever one is finished.

    Returns:
        The rows (docs/json.md), dense first for each model; one that failed says why.

    Raises:
        SecateurError: every pruned row failed, for the first row's reason; or the disk refuses.
    """
    rows: list[dict[str, Any]] = []
    failures: list[Exception] = []
    pace = _Pace(len(models) * (len(cells) + 1))
    with kept_in(folder) as (journal, work):
        for name in models:
            dense: dict[str, Any] | None = None
            with ExitStack() as stack:
                subject: Subject | None = None
                for cell in (None, *cells):
                    pace.say(name, cell)
                    failure: Exception | None = None
                    try:
                        if subject is None:
                            subject = Subject(name, conditions, work, journal, progress)
                            stack.callback(subject.close)
                        subject.measure(cell)
                    except OutputError:  # a full disk is everyone's
                        raise
                    except Exception as error:  # one cell's failure is not the others'
                        if subject is None and len(models) == 1:
                            raise
                        failure = error
                        failures.append(error)
                    size, results = (subject.checkpoint.bytes, subject.known(cell)) if subject else (None, {})
                    rows.append(make_row(name, cell, conditions.format, size, results, dense, failure))
                    if failure:
                        log.warning("%s, %s: %s", name, cell or DENSE, rows[-1]["error"])
                    dense = dense or rows[-1]
                    if any(row["evaluation"] for row in rows):  # a former result gives way to one, not to errors
                        keep(rows)
                    if subject is None:
                        break
    pruned = [row for row in rows if row["method"] != DENSE]
    if failures and all(row["error"] for row in pruned):
        raise failures[0]
    return rows


class _Pace:
    """Tells which row is at hand, and how long the rest may take, by the rows that took time."""

    def __init__(self, rows: int) -> None:
        self.rows, self.row, self.since = rows, 0, time.monotonic()
        self.seconds: list[float] = []

    def say(self, name: str, cell: Cell | None) -> None:
        """Name the row that begins."""
        now = time.monotonic()
        if now - self.since > 1:  # not one that was measured before
            self.seconds.append(now - self.since)
        left = ""
        if self.seconds:
            minutes = statistics.mean(self.seconds) * (self.rows - self.row) / 60
            left = f", about {math.ceil(minutes)} min left"
        self.row, self.since = self.row + 1, now
        log.info("row %d of %d%s: %s, %s", self.row, self.rows, left, name, cell or DENSE)
