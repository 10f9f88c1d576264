"""The kinds of picture that reports are made of: heat map, values by block, intervals, series of points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator

from .pictures import HEAT, INK, MARKERS, SERIES, SURFACE, draw, legend_columns, limits, log_ticks, tick_label
from .wording import short

NARROWEST = 0.02  # a heat map of fractions that differ by less would show noise: it then spans 0 to 1
LABEL = 46  # letters of a legend's line, on a phone
DASHES = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class Axis:
    """One axis: its title with unit, whether it is logarithmic, and whether it counts."""

    title: str
    log: bool = False
    percent: bool = False
    whole: bool = False


@dataclass
class Series:
    """Points that belong together.

    Attributes:
        label: its name in the legend.
        points: x, y, and how far the interval reaches below and above, along the axis that has intervals.
        colour: a number; series of one colour are alike.
        mark: a number of a mark's shape, or None for a line alone.
        dash: a number of a line's kind, or None for points that no line joins.
    """

    label: str
    colour: int
    mark: int | None
    dash: int | None = None
    points: list[tuple[float, float, float, float]] = field(default_factory=list)


def heat_map(
    id: str,
    title: str,
    says: str,
    cells: Mapping[tuple[str, int], float],
    what: Axis,
) -> Markup:
    """Draw a value for each kind of matrix (down) in each block (across); what is missing stays empty."""
    kinds, blocks = list(dict.fromkeys(k for k, _ in cells)), sorted({b for _, b in cells})
    levels = heat_levels(list(cells.values()), what.percent)
    labels = kind_labels(kinds)

    def paint(axes: Axes) -> None:
        values = [[cells.get((kind, block), float("nan")) for block in blocks] for kind in kinds]
        colours = ListedColormap(HEAT[: len(levels) - 1])
        norm = BoundaryNorm(levels, len(levels) - 1)
        width = 0.6 if len(blocks) <= 64 else 0
        drawn = axes.pcolormesh(values, cmap=colours, norm=norm, edgecolors=SURFACE, linewidth=width, antialiased=True)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_yticks([row + 0.5 for row in range(len(kinds))], labels)
        step = max(1, round(len(blocks) / 7))
        axes.set_xticks([i + 0.5 for i in range(0, len(blocks), step)], [str(b) for b in blocks[::step]])
        axes.set_xlabel("Block")
        figure = axes.get_figure()
        assert figure is not None
        bar = figure.colorbar(drawn, ax=axes, orientation="horizontal", aspect=32, pad=0.02, ticks=levels)
        _finish_bar(bar, what)

    return draw(id, title, says, min(7.0, 1.55 + 0.26 * len(kinds)), paint)


def _finish_bar(bar: Colorbar, what: Axis) -> None:
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=10)
    bar.ax.xaxis.set_major_formatter(_labels(what))
    bar.set_label(what.title)


def heat_levels(values: Sequence[float], fractions: bool) -> list[float]:
    """Bounds of the classes of a heat map: round numbers, at most one more than there are colours."""
    low, high = min(values), max(values)
    if fractions and high - low < NARROWEST:
        return [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] if low >= 0 and high <= 1 else [low - 1, high + 1]
    found = MaxNLocator(len(HEAT) - 2).tick_values(low, high)
    return [float(value) for value in found]


def kind_labels(kinds: Sequence[str]) -> list[str]:
    """The shortest endings by which kinds of matrices can be told apart."""

    def ending(kind: str, parts: int) -> str:
        return ".".join(kind.split(".")[-parts:])

    parts = [
        next((n for n in range(1, 9) if sum(ending(k, n) == ending(kind, n) for k in kinds) == 1), 9) for kind in kinds
    ]
    return [short(ending(kind, n), 22) for kind, n in zip(kinds, parts, strict=True)]


def by_block_chart(
    id: str, title: str, says: str, values: Mapping[int, float], what: Axis, bars: bool = False
) -> Markup:
    """Draw one value for each block."""

    def paint(axes: Axes) -> None:
        blocks, heights = list(values), list(values.values())
        if bars:
            axes.bar(blocks, heights, width=0.78, color=SERIES[0], linewidth=0)
        else:
            marker = "o" if len(blocks) <= 48 else ""
            axes.plot(blocks, heights, color=SERIES[0], marker=marker, markersize=4.5, markeredgecolor=SURFACE)
        axes.set_xlabel("Block")
        axes.set_xlim(blocks[0] - 0.6, blocks[-1] + 0.6)
        axes.set_title(what.title)
        axes.set_ylim(bottom=0 if min(heights) >= 0 else None, top=None if max(heights) > 0 else 1)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(_labels(what))
        axes.grid(visible=False, axis="x")

    return draw(id, title, says, 2.75, paint)


def intervals(id: str, title: str, says: str, rows: Sequence[str], series: Sequence[Series], what: Axis) -> Markup:
    """Draw points with standard errors, one row of them under another; y of a point is the number of its row."""
    spread = 0.26 if len(series) > 1 else 0.0

    def paint(axes: Axes) -> None:
        for index, one in enumerate(series):
            off = spread * (index - (len(series) - 1) / 2)
            _points(axes, one, [(x, y + off, low, high) for x, y, low, high in one.points])
        axes.set_yticks(range(len(rows)), [short(row, 26) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(what.title)
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(_labels(what))

    return draw(id, title, says, min(12.0, 1.3 + 0.36 * len(rows)), paint, legend=len(series) > 1)


def scatter(
    id: str,
    title: str,
    says: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    level: tuple[str, float] | None = None,
) -> Markup:
    """Draw series of points, joined by lines where they have a dash, and a level to compare them with."""

    def paint(axes: Axes) -> None:
        for one in series:
            _points(axes, one, one.points)
        if level:
            axes.axhline(level[1], color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1, label=level[0])
        points = [point for one in series for point in one.points]
        _scale(axes, "x", x, [end for p in points for end in (p[0] - p[2], p[0] + p[3])])
        _scale(axes, "y", y, [p[1] for p in points] + ([level[1]] if level else []))
        axes.set_xlabel(x.title)
        axes.set_title(y.title)

    labels = [short(one.label, LABEL) for one in series] + ([level[0]] if level else [])
    rows = math.ceil(len(labels) / legend_columns(labels))
    return draw(id, title, says, 2.75 + 0.19 * rows, paint, legend=True)


def _points(axes: Axes, one: Series, points: Sequence[tuple[float, float, float, float]]) -> None:
    """Draw points, their intervals along x, and the line that joins them."""
    colour, marker = SERIES[one.colour % len(SERIES)], "" if one.mark is None else MARKERS[one.mark % len(MARKERS)]
    style = "none" if one.dash is None else DASHES[one.dash % len(DASHES)]
    if any(low or high for _, _, low, high in points):
        reach = [[low for *_, low, _ in points], [high for *_, high in points]]
        axes.errorbar(
            [p[0] for p in points], [p[1] for p in points], xerr=reach, fmt="none", ecolor=colour, elinewidth=1.3
        )
    axes.plot(
        [p[0] for p in points], [p[1] for p in points],
        label=short(one.label, LABEL), color=colour, marker=marker, linestyle=style,
        markeredgecolor=SURFACE, markeredgewidth=0.7, markersize=11 if marker == "*" else 8,
    )  # fmt: skip


def _scale(axes: Axes, which: str, what: Axis, values: Sequence[float]) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    if what.log:
        low, high = limits([value for value in values if value > 0])
        axes.set(**{f"{which}lim": (low, high), f"{which}scale": "log"})
        ticks = log_ticks(low, high)
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FixedFormatter([tick_label(tick) for tick in ticks]))
        axis.set_minor_locator(FixedLocator([]))
    else:
        low, high = min(values), max(values)
        room = 0.07 * (high - low) or 0.1 * abs(high) or 0.1
        if what.percent:  # what differs by less than a point stands in one place
            room = max(room, 0.02)
        axes.set(**{f"{which}lim": (low - room, high + room)})
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=what.whole, min_n_ticks=1))
        axis.set_major_formatter(_labels(what))


def _labels(what: Axis) -> FuncFormatter:
    return FuncFormatter((lambda value, _: f"{100 * value:.4g}%") if what.percent else tick_label)
