"""Evaluations and comparisons as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..words import SHRUNKEN, duration, is_shrunken, number, size, windows


def evaluation_table(model: str, found: Mapping[str, Any]) -> Group:
    """All answers of one model, beside those of the dense one if it was asked too."""
    parts: list[Any] = []
    if "text" in found:
        parts.append(_perplexity(model, found))
    if "tasks" in found:
        parts.append(_tasks(model, found))
    if "generations" in found:
        parts.append(_generations(model, found))
    return Group(*parts)


def _table(title: str, *headings: str, right: int = 99) -> Table:
    table = Table(title=escape(title))
    for column, heading in enumerate(headings):
        table.add_column(escape(heading), justify="right" if 0 < column < right else "left", overflow="fold")
    return table


def _perplexity(model: str, found: Mapping[str, Any]) -> Table:
    against = found.get("against")
    names = [model] if against is None else [model, against["model"]]
    table = _table(model, "", *names, *(["change"] if against else []))
    table.caption, table.caption_justify = escape(windows(found)), "left"
    if against is None:
        table.add_row("perplexity", number(found["perplexity"]))
        table.add_row("loss, nats per token", f"{found['loss']:.4f}")
        return table
    ratio = _ratio(found["perplexity"], against["perplexity"])
    table.add_row("perplexity", number(found["perplexity"]), number(against["perplexity"]), ratio)
    losses = found["loss"], against["loss"]
    table.add_row("loss, nats per token", *(f"{loss:.4f}" for loss in losses), f"{losses[0] - losses[1]:+.4f}")
    fidelity = found["fidelity"]
    table.add_row("KL divergence, nats per token", _digits(fidelity["kl"], 4), "", "")
    table.add_row("same likeliest token", f"{fidelity['top1']:.2%}", "", "")
    if (last := fidelity["blocks"][-1]) is not None:
        table.add_row("distance after the last block", f"{last:.4f}", "", "")
    return table


def _tasks(model: str, found: Mapping[str, Any]) -> Table:
    theirs = (found.get("against") or {}).get("tasks")
    names = [model] if theirs is None else [model, found["against"]["model"], "difference"]
    table = _table(f"{model}: tasks by {found['tasks']['library']}", "task", "metric", *names, "questions", "shots")
    others = {row["task"]: row for row in (theirs or {"results": []})["results"]}
    for row in found["tasks"]["results"]:
        for metric, mine in row["metrics"].items():
            cells = [_with_error(mine)]
            if theirs is not None:
                other = others.get(row["task"], {"metrics": {}})["metrics"].get(metric)
                cells += [_with_error(other), _difference(mine, other)] if other else ["", ""]
            table.add_row(escape(row["task"]), escape(metric), *cells, str(row["questions"]), str(row["shots"]))
    if (mean := found["tasks"]["mean"]) is not None:
        cells = [f"{mean:.4f}"]
        if theirs is not None:
            cells += ["", ""] if theirs["mean"] is None else [f"{theirs['mean']:.4f}", f"{mean - theirs['mean']:+.4f}"]
        table.add_section()
        table.add_row("mean", "acc", *cells, "", "")
    return table


def _generations(model: str, found: Mapping[str, Any]) -> Table:
    theirs = (found.get("against") or {}).get("generations")
    names = [model] if theirs is None else [model, found["against"]["model"]]
    table = _table("the likeliest words after a prompt, and the share of them said before", "prompt", *names, right=0)
    for place, mine in enumerate(found["generations"]):
        sides = [mine] if theirs is None else [mine, theirs[place]]
        table.add_row(
            Text(mine["prompt"], "dim"), *(Text(f"{g['continuation']} ({g['repetition']:.0%})") for g in sides)
        )
        table.add_section()
    return table


def comparison_table(document: Mapping[str, Any]) -> Group:
    """A row for each model and cell; columns only for what was measured or differs."""
    rows: Sequence[Mapping[str, Any]] = document["rows"]
    columns = [column for column in COLUMNS if any(column[1](row) for row in rows)]
    if len({row["model"] for row in rows}) == 1:
        columns = columns[1:]
    ends = [place for place, (row, after) in enumerate(pairwise(rows)) if row["model"] != after["model"]]
    parts: list[Any] = [Fitted([(heading, [cell(row) or "" for row in rows]) for heading, cell in columns], ends)]
    evaluation = next((row["evaluation"] for row in rows if row["evaluation"]), None)
    if evaluation:
        parts.append(
            Text(f"Perplexity on {windows(evaluation)}; {document['processor']}, {document['threads']} threads")
        )
    if any(map(is_shrunken, rows)):
        parts.append(Text(SHRUNKEN))
    parts += [Text(f"{row['model']}, {row['method']} {row['pattern'] or ''}: {row['error']}", "red") for row in rows
              if row["error"]]  # fmt: skip
    return Group(*parts)


@dataclass(frozen=True)
class Fitted:
    """A table that is cut into several, one under another, where it is wider than the terminal: no number is cut.

    Attributes:
        columns: of each its heading and its cells.
        ends: numbers of the rows under which a line is drawn.
    """

    columns: Sequence[tuple[str, Sequence[str]]]
    ends: Sequence[int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the tables; if they are several, rows have numbers."""
        widths = [3 + max(map(cell_len, (heading, *cells))) for heading, cells in self.columns]
        if sum(widths) < options.max_width:
            yield self._part(self.columns)
            return
        numbers = ("row", [str(row) for row in range(1, 1 + len(self.columns[0][1]))])
        part: list[tuple[str, Sequence[str]]] = [numbers]
        used = 7
        for column, width in zip(self.columns, widths, strict=True):
            if len(part) > 1 and used + width > options.max_width:
                yield self._part(part)
                part, used = [numbers], 7
            part.append(column)
            used += width
        yield self._part(part)

    def _part(self, columns: Sequence[tuple[str, Sequence[str]]]) -> Table:
        table = _table("", *(heading for heading, _ in columns))
        for row, cells in enumerate(zip(*(cells for _, cells in columns), strict=True)):
            table.add_row(*map(escape, cells), end_section=row in self.ends)
        return table


def _calibration(row: Mapping[str, Any]) -> str:
    found = row["calibration"]
    if found:
        return f"{found['source']}, {found['samples']} x {found['seqlen']}, seed {found['seed']}"
    return f"seed {row['seed']}" if row.get("seed") is not None and row["sparsity"] is not None else ""


def _digits(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _ratio(after: float | None, before: float | None) -> str:
    return f"x {_times(after / before, 3)}" if after and before else ""


def _times(ratio: float, digits: int) -> str:
    return f"{ratio:.{digits}f}" if ratio < 1000 else number(ratio)


def _with_error(metric: Mapping[str, Any]) -> str:
    error = metric["stderr"]
    return _digits(metric["value"], 4) + ("" if error is None else f" ± {error:.4f}")


def _difference(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return "" if None in (mine["value"], other["value"]) else f"{mine['value'] - other['value']:+.4f}"


def _fidelity(row: Mapping[str, Any], what: str) -> float | None:
    value: float | None = ((row["evaluation"] or {}).get("fidelity") or {}).get(what)
    return value


# Heading, and the text of a row's cell; a column in which no row has any is left out.
COLUMNS: list[tuple[str, Any]] = [
    ("model", lambda row: row["model"]),
    ("method", lambda row: row["method"]),
    ("pattern", lambda row: row["pattern"]),
    ("sparsity", lambda row: "" if row["sparsity"] is None else f"{row['sparsity']:.2%}"),
    ("calibration", _calibration),
    ("perplexity", lambda row: row["evaluation"] and number(row["evaluation"]["perplexity"])),
    ("to dense", lambda row: row["perplexity_ratio"] and f"x {_times(row['perplexity_ratio'], 2)}"),
    ("KL", lambda row: _digits(_fidelity(row, "kl"), 3)),
    ("top-1", lambda row: "" if (value := _fidelity(row, "top1")) is None else f"{value:.1%}"),
    ("tasks", lambda row: row["tasks"] and _digits(row["tasks"]["mean"], 4)),
    ("size", lambda row: row["bytes"] and size(row["bytes"])),
    ("memory", lambda row: row["resident_ratio"] and f"x {row['resident_ratio']:.2f}"),
    ("decode", lambda row: row["decode_ratio"] and f"x {row['decode_ratio']:.2f}"),
    ("time to prune", lambda row: "" if row["seconds"] is None else duration(row["seconds"])),
    ("peak memory", lambda row: row["peak_memory_bytes"] and size(row["peak_memory_bytes"])),
]
