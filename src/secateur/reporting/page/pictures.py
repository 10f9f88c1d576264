"""Pictures as inline SVG that takes its colours and its typeface from the page around it."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ...pipeline.machine import alone

WIDTH = 5.0  # inches of 72 units: 360, the width of a phone

# Colours that stand for a variable of the page's style sheet.
INK, MUTED, GRID, SURFACE = "#010101", "#010102", "#010103", "#010104"
SERIES = [f"#0200{index:02x}" for index in range(6)]
HEAT = [f"#0300{index:02x}" for index in range(8)]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)", SURFACE: "var(--surface)"}
VARIABLES |= {colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)}
VARIABLES |= {colour: f"var(--heat-{index})" for index, colour in enumerate(HEAT)}

SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "secateur",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.family": "DejaVu Sans",  # comes with matplotlib, and is wider than what the page will use
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
}


def draw(id: str, title: str, says: str, height: float, paint: Callable[[Axes], None], legend: bool = False) -> Markup:
    """Draw a picture.

    Args:
        id: names it on the page; no other picture has it.
        title: its name, for those who do not see it.
        says: what is to be seen, in words.
        height: in inches; it is `WIDTH` wide.
        paint: draws on the axes.
        legend: explain the marks below the axes.

    Returns:
        An ``<svg>`` element for an HTML page.
    """
    with alone(), matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user has set for other pictures
        matplotlib.rcParams.update(SETTINGS)
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the page's typefaces will have it
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        paint(axes)
        if legend:
            _legend(figure, axes)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(target.getvalue(), id, title, says)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = legend_columns(labels)
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, columnspacing=1.2, fontsize=10.5)


def legend_columns(labels: Sequence[str]) -> int:
    """How many columns of labels fit beside one another."""
    return max(1, min(3, 46 // (max(map(len, labels), default=1) + 6)))


def _inline(svg: str, id: str, title: str, says: str) -> Markup:
    """Make of matplotlib's document an element that lives on a page with others of its kind."""
    drawn = ElementTree.fromstring(svg)
    used = set(re.findall(r"[\"(]#([\w.-]+)", svg))
    root = ElementTree.Element("svg", {"id": id, "class": "picture", "role": "img", "viewBox": drawn.attrib["viewBox"]})
    root.set("aria-labelledby", f"{id}-title {id}-desc")
    ElementTree.SubElement(root, "title", {"id": f"{id}-title"}).text = title
    ElementTree.SubElement(root, "desc", {"id": f"{id}-desc"}).text = says
    for element in drawn.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = element.text if element.tag == "text" else None, None
        for child in [child for child in element if child.tag.endswith(("}style", "}metadata"))]:
            element.remove(child)  # a style in an SVG is one of the whole page
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            if name != "id" or value in used:
                element.set(name.rpartition("}")[2], _attribute(name, value, id))
    root.extend(drawn)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # ElementTree has escaped it


def _attribute(name: str, value: str, id: str) -> str:
    if name == "id":
        return f"{id}-{value}"
    value = re.sub(r"^#(?=\w)" if name.endswith("href") else r"(?<=url\()#", f"#{id}-", value)
    if name.endswith("href"):
        return value
    value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", re.sub(r"font-family: [^;]*;? ?", "", value))
    return re.sub(r"#0[123]00[0-9a-f]{2}|#0101[0-9a-f]{2}", lambda colour: VARIABLES[colour[0]], value)


def tick_label(value: float, position: int | None = None) -> str:
    """A number on an axis."""
    if value and not 1e-4 <= abs(value) < 1e6:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        factor = value / 10.0**exponent
        raised = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return raised if abs(factor - 1) < 1e-6 else f"{factor:.3g}·{raised}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", "\u2212")


def log_ticks(low: float, high: float) -> list[float]:
    """A handful of round numbers on a logarithmic axis from `low` to `high`.

    >>> log_ticks(28, 80)
    [30.0, 40.0, 50.0, 70.0]
    >>> log_ticks(1, 1000)
    [1.0, 10.0, 100.0, 1000.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), [1 + step / 10 for step in range(90)]):
        step = max(1, (last - first) // 6) if factors == (1,) else 1
        found = [factor * 10.0**power for power in range(first, last + 1, step) for factor in factors]
        found = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(found) >= 4:
            break
    return found[:: math.ceil(len(found) / 7)] if found else [low, high]


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis with some room around the values."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.07 * (high - low), 0.02)
    return 10.0 ** max(low - room, -305), 10.0 ** min(high + room, 305)
