"""Results as Markdown for GitHub and Hugging Face, in which text from anywhere stays text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

NOTHING = "–"
FIDELITY = (
    "KL: mean divergence of the predictions from the dense model's; top-1: how often the likeliest token is the "
    "dense model's."
)

# What Markdown reads as more than itself. Hugging Face looks for formulas before Markdown is read, so what begins one
# ($ and \( ) must be an entity; and addresses become links without being asked for.
SPECIAL = re.compile(r"[\\$&<>`*_\[\]|~@]|:(?=//)|(?<=www)\.|^[-+=#]|(?<=^\d)[.)](?=\s|$)", re.IGNORECASE)
ENTITIES = {"\\": "&#92;", "$": "&#36;", "&": "&amp;", "<": "&lt;", ">": "&gt;"}

Row = Mapping[str, Any]
Column = tuple[str, str, Callable[[Row], str | None]]  # heading, l or r, and what of a row is shown


def plain(text: object) -> str:
    """One line without control characters, marks that turn the direction of text, and halves of characters.

    >>> plain("two\\nlines, one\\x07bell")
    'two lines, one�bell'
    """
    line = " ".join(str(text).split())
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in line)


def markdown_text(text: object) -> str:
    r"""Escape any text, so that a sentence or a table's cell shows it as it is.

    >>> markdown_text("q_proj|<b>")
    'q\\_proj\\|&lt;b&gt;'
    """
    return SPECIAL.sub(lambda found: ENTITIES.get(found[0], "\\" + found[0]), plain(text))


def markdown_code(text: object) -> str:
    """Return any text as code, in which GitHub makes no links and no pictures of ``:train:``; escaped if it cannot be.

    >>> markdown_code("hf:ptb:penn:train:text")
    '`hf:ptb:penn:train:text`'
    """
    line = plain(text)
    return f"`{line}`" if line and not re.search(r"[`|\\$<>&]", line) else markdown_text(line)


def markdown_fence(lines: str, language: str = "") -> str:
    """Return lines as a block of code that nothing in them ends."""
    marks = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", lines)), 0)
    return f"{marks}{language}\n{lines}\n{marks}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Return a table.

    Args:
        header: headings, which are Markdown already, as are the cells.
        rows: the cells; each row has as many as the header.
        align: a letter for each column: l or r.
    """
    marks = [{"l": ":--", "r": "--:"}[letter] for letter in align]
    width = len(header)
    lines = [header, marks, *rows]
    if any(len(line) != width for line in lines):
        raise ValueError(f"a row of the table has not {width} cells")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short_name(name: object) -> str:
    """Return a model's name as a title shows it: of a path on somebody's machine, the last part.

    >>> short_name("/home/me/models/tiny"), short_name("org/model")
    ('tiny', 'org/model')
    """
    text = str(name)
    return PurePath(text).name or text if text.startswith(("/", "~", ".")) else text


def rounded(value: float | None) -> str:
    """A perplexity, or a ratio of two, for people.

    >>> rounded(29.187), rounded(2941.3), rounded(8.1e9), rounded(None)
    ('29.19', '2,941', '8.1e+09', 'beyond measure')
    """
    if value is None:
        return "beyond measure"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.1e}"


def table_of(rows: Sequence[Row], kinds: Sequence[Column], if_varied: Sequence[str] = ()) -> str:
    """Return a table of rows: columns in which something was measured; `if_varied`, only if it is not one for all."""
    columns: list[tuple[str, str, list[str]]] = []
    for heading, align, cell in kinds:
        cells = [cell(row) for row in rows]
        told = {text for row, text in zip(rows, cells, strict=True) if text is not None}
        if told and not (heading in if_varied and len(told) < 2):
            columns.append((heading, align, [NOTHING if text is None else text for text in cells]))
    headings, aligns, texts = zip(*columns, strict=True)
    return markdown_table(headings, zip(*texts, strict=True), "".join(aligns))


def get_at(*path: str) -> Callable[[Row], Any]:
    """Return what finds the end of a path of keys in a row; None where it breaks off."""

    def get(row: Row) -> Any:
        value: Any = row
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return get


def shown(show: Callable[[Any], str], *path: str) -> Callable[[Row], str | None]:
    """Return what shows the end of a path of keys in a row; None where there is none."""
    get = get_at(*path)
    return lambda row: None if get(row) is None else show(get(row))


def measured_on(evaluation: Row) -> str:
    """On what a perplexity was measured: text, window, windows, tokens."""
    return (
        f"{markdown_code(evaluation['text'])}, {evaluation['windows']:d} windows of {evaluation['seqlen']:d} tokens, "
        f"{evaluation['tokens']:,} of {evaluation['available_tokens']:,} tokens"
    )


def calibrated_on(calibration: Row) -> str:
    """On what was calibrated: source, sequences, tokens, seed."""
    return (
        f"{markdown_code(calibration['source'])}, {calibration['samples']:,} sequences, "
        f"{calibration['tokens']:,} tokens, seed {calibration['seed']:d}"
    )


def versions(software: Mapping[str, Any]) -> str:
    """Versions of what computed."""
    words = [
        f"{'Secateur' if key == 'secateur' else key} {value}" for key, value in software.items() if key != "machine"
    ]
    return markdown_text(", ".join([*words, str(software.get("machine", ""))]).removesuffix(", "))
