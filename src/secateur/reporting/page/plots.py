"""The pictures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..words import is_shrunken, number
from .charts import Axis, Series, intervals, scatter
from .parts import Cell, Picture, Table, plain, share
from .quality import perplexity
from .rows import Group, Row, decode_speed, is_dense, is_nm, legend, perplexity_of, setting
from .wording import counted, digits, listing, percent, short

Place = tuple[float, float, float, float]
PERPLEXITY = Axis("Perplexity (logarithmic)", log=True)
DENSE_COLOUR, DENSE_MARK = 5, 11
KEY = "Lower is better. One colour for each method, one mark for each method with its pattern."


class Look:
    """One colour for each method, one mark for each method and pattern, one dash for each pattern, on all pictures."""

    def __init__(self, groups: Sequence[Group]) -> None:
        """Take the methods and patterns in the order in which they come."""
        rows = [row for group in groups for row in group.rows if not is_dense(row)]
        self.methods = list(dict.fromkeys(row["method"] for row in rows))
        self.settings = list(dict.fromkeys(_line(row) for row in rows))
        self.patterns = list(dict.fromkeys(row.get("pattern") for row in rows if not is_nm(row.get("pattern"))))

    def series(self, row: Row, joined: bool) -> Series:
        """An empty series for rows like this one."""
        if is_dense(row):
            return Series("dense", DENSE_COLOUR, DENSE_MARK)
        pattern = row.get("pattern")
        dash = self.patterns.index(pattern) if joined and not is_nm(pattern) else None
        colour = self.methods.index(row["method"]) % DENSE_COLOUR
        return Series(legend(row), colour, self.settings.index(_line(row)), dash)


def _line(row: Row) -> tuple[str, str | None]:
    """What rows of one line have in common; words for it may be shortened to the same."""
    return row["method"], row.get("pattern")


def pictures_of(groups: Sequence[Group]) -> list[Picture]:
    """All pictures of all groups, as far as there is something to show."""
    look, found = Look(groups), []
    for index, group in enumerate(groups):
        several = len(groups) > 1
        of = f"{short(group.model, 40)}: " if several else ""
        for make in (_against_sparsity, _against_bytes, _against_speed, _tasks):
            if picture := make(group, look, f"-{index}" if several else "", of):
                found.append(picture)
    return found


def _collect(group: Group, look: Look, joined: bool, place: Callable[[Row], Place | None]) -> list[Series]:
    """The rows of a group as series of points."""
    found: dict[tuple[str, str | None], Series] = {}
    for row in group.rows:
        if (point := place(row)) is not None:
            found.setdefault(_line(row), look.series(row, joined)).points.append(point)
    for one in found.values():
        one.points.sort()
    return list(found.values())


def _against_sparsity(group: Group, look: Look, suffix: str, of: str) -> Picture | None:
    def place(row: Row) -> Place | None:
        y, x = perplexity_of(row), row.get("sparsity")
        return None if y is None or x is None or is_dense(row) else (x, y, 0.0, 0.0)

    series = _collect(group, look, True, place)
    if not series:
        return None
    dense = perplexity_of(group.dense) if group.dense else None
    says = _in_words(series, lambda x: percent(x, 0), "sparsity")
    says += f" The dense model has {number(dense)}." if dense else ""
    title, id = f"{of}Perplexity against sparsity", f"by-sparsity{suffix}"
    level = (f"dense {number(dense)}", dense) if dense else None
    removed = ", or parameters removed" if any(map(is_shrunken, group.rows)) else ""
    sparsity = Axis(f"Sparsity, zeros / weights{removed}", percent=True)
    svg = scatter(id, title, says, series, sparsity, PERPLEXITY, level)
    shown = [*([group.dense] if group.dense and dense else []), *(row for row in group.rows if place(row))]
    table = _numbers(title, "Sparsity", shown, lambda row: share(row.get("sparsity")))
    return Picture(
        id, title, says, svg, table, f"{KEY} The dashed line without marks is the dense model." if dense else KEY
    )


def _against_bytes(group: Group, look: Look, suffix: str, of: str) -> Picture | None:
    def place(row: Row) -> Place | None:
        y, x = perplexity_of(row), row.get("bytes")
        return None if y is None or not x else (x / 1e6, y, 0.0, 0.0)

    series = _collect(group, look, False, place)
    if len({point[0] for one in series for point in one.points}) < 2:
        return None  # dense checkpoints of one model are all of one size
    says = _in_words(series, lambda x: f"{digits(x)} MB", "a size")
    title, id = f"{of}Perplexity against bytes", f"by-bytes{suffix}"
    svg = scatter(id, title, says, series, Axis("Checkpoint, MB"), PERPLEXITY)
    rows = [row for row in group.rows if place(row)]
    return Picture(id, title, says, svg, _numbers(title, "Bytes", rows, lambda row: plain(row["bytes"])), KEY)


def _against_speed(group: Group, look: Look, suffix: str, of: str) -> Picture | None:
    def place(row: Row) -> Place | None:
        y, speed = perplexity_of(row), decode_speed(row)
        if y is None or speed is None:
            return None
        middle = speed["median"]
        return middle, y, max(0.0, middle - speed["slowest"]), max(0.0, speed["fastest"] - middle)

    series = _collect(group, look, False, place)
    if not series:
        return None
    says = _in_words(series, lambda x: f"{digits(x)} tokens/s", "a decoding speed")
    bars = " Bars reach from the slowest to the fastest round."
    title, id = f"{of}Perplexity against speed", f"by-speed{suffix}"
    svg = scatter(id, title, says + bars, series, Axis("Decoding, tokens per second"), PERPLEXITY)

    def cell(row: Row) -> Cell:
        speed: Mapping[str, float] = decode_speed(row) or {}
        words = f"{digits(speed['median'])} ({digits(speed['slowest'])} to {digits(speed['fastest'])})"
        return Cell(words, speed["median"])

    rows = [row for row in group.rows if place(row)]
    return Picture(id, title, says + bars, svg, _numbers(title, "Decoding, tokens/s", rows, cell), KEY + bars)


def _tasks(group: Group, look: Look, suffix: str, of: str) -> Picture | None:
    rows = [row for row in group.rows if (row.get("tasks") or {}).get("mean") is not None]
    if not rows:
        return None
    errors = [mean_error(row["tasks"]) for row in rows]
    means = [row["tasks"]["mean"] for row in rows]
    series = Series(
        "mean",
        0,
        0,
        points=[(m, float(i), e or 0.0, e or 0.0) for i, (m, e) in enumerate(zip(means, errors, strict=True))],
    )
    names = [setting(row, with_target=True) for row in rows]
    title, id = f"{of}Zero-shot accuracy", f"by-tasks{suffix}"
    each = listing(f"{name} {percent(mean, 1)}" for name, mean in zip(names, means, strict=True))
    tasks = listing(dict.fromkeys(result["task"] for row in rows for result in row["tasks"]["results"]))
    caption = f"Unweighted mean over {short(tasks, 200)}, with one standard error to each side"
    says = f"{caption}: {each}."
    axis = Axis("Mean accuracy over tasks", percent=True)
    table_rows = [
        [Cell(name), share(mean), Cell("" if error is None else percent(error), error)]
        for name, mean, error in zip(names, means, errors, strict=True)
    ]
    table = Table(title, ["Method, pattern", "Mean accuracy", "Standard error"], table_rows)
    return Picture(id, title, says, intervals(id, title, says, names, [series], axis), table, f"{caption}.")


def mean_error(tasks: Mapping[str, Any]) -> float | None:
    """The standard error of an unweighted mean over tasks, from each task's own.

    >>> mean_error({"results": [{"metrics": {"acc": {"stderr": 0.03}}}, {"metrics": {"acc": {"stderr": 0.04}}}]})
    0.025
    """
    metrics = [result["metrics"].get("acc") or {} for result in tasks["results"]]
    errors = [metric["stderr"] for metric in metrics if metric.get("stderr") is not None]
    return math.hypot(*errors) / len(errors) if errors and len(errors) == len(metrics) else None


def scaling_pictures(groups: Sequence[Group]) -> list[Picture]:
    """What the same pruning costs models of different size: a picture for each sparsity that was asked for."""
    places: dict[float, list[tuple[Group, float, Row]]] = {}
    for group in groups:
        size = (group.dense or {}).get("bytes")
        for row in group.rows:
            if size and not is_dense(row) and row.get("loss_increase") is not None and row.get("target") is not None:
                places.setdefault(row["target"], []).append((group, size, row))
    look = Look(groups)
    return [_scaling(look, index, target, places[target]) for index, target in enumerate(sorted(places))]


def _scaling(look: Look, index: int, target: float, places: Sequence[tuple[Group, float, Row]]) -> Picture:
    found: dict[tuple[str, str | None], Series] = {}
    for _, size, row in places:
        like = look.series(row, True)
        one = found.setdefault(_line(row), Series(like.label, like.colour, like.mark, dash=0))
        one.points.append((size / 1e6, row["loss_increase"], 0.0, 0.0))
    said = []
    for one in found.values():
        one.points.sort()
        said.append(f"{one.label} " + listing(f"{digits(y)} nats at {digits(x)} MB" for x, y, *_ in one.points))
    title, id = f"Loss increase against the model's size, at {percent(target, 0)}", f"scaling-{index}"
    says = f"What pruning adds to the loss: {'; '.join(said)}."
    x, y = Axis("Dense checkpoint, MB (logarithmic)", log=True), Axis("Loss increase, nats per prediction")
    svg = scatter(id, title, says, list(found.values()), x, y)
    rows = [[Cell(g.model), Cell(setting(r)), plain(size), plain(r["loss_increase"])] for g, size, r in places]
    table = Table(title, ["Model", "Method, pattern", "Dense bytes", "Loss increase, nats"], rows)
    return Picture(id, title, says, svg, table, KEY)


def _numbers(caption: str, x: str, rows: Sequence[Row], cell: Callable[[Row], Cell]) -> Table:
    """The numbers behind a picture of perplexity."""
    found = [[Cell(setting(row, with_target=True)), cell(row), perplexity(perplexity_of(row))] for row in rows]
    return Table(caption, ["Method, pattern", x, "Perplexity"], found)


def _in_words(series: Sequence[Series], form: Callable[[float], str], what: str) -> str:
    """From where to where each series goes."""
    said = []
    for one in series:
        first, last = one.points[0], one.points[-1]
        words = f"{short(one.label, 40)} has {number(first[1])} at {form(first[0])}"
        said.append(words + (f" and {number(last[1])} at {form(last[0])}" if len(one.points) > 1 else ""))
    return f"Perplexity at {what} of {counted(len(series), 'series', 'series')}: {'; '.join(said)}."
