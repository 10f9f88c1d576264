"""What a page is built of: cells, tables, pictures, cards and sections. The template shows them as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..words import duration, size
from .wording import digits, percent


@dataclass(frozen=True)
class Cell:
    """One entry of a table: what is shown, and the recorded number itself where it is one."""

    text: str
    value: float | None = None

    @property
    def exact(self) -> str | None:
        """The number as it was recorded, to the last digit."""
        return None if self.value is None else repr(self.value)


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first cell of each row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds numbers."""
        return [any(row[index].value is not None for row in self.rows) for index in range(len(self.head))]


@dataclass(frozen=True)
class Picture:
    """A picture, what it says in words, and the numbers that it shows; a caption where the words are too many."""

    id: str
    title: str
    says: str
    svg: Markup
    table: Table
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """One figure that matters. Where it is missing, the command that measures it."""

    title: str
    value: str
    note: str = ""
    missing: str | None = None


@dataclass(frozen=True)
class Sample:
    """What models write after one prompt: of each, name, continuation, and how much of it is repetition."""

    prompt: str
    versions: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Section:
    """A part of the page under its own heading."""

    id: str
    title: str
    text: Sequence[str] = ()
    cards: Sequence[Card] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()
    facts: Sequence[tuple[str, str]] = ()
    code: Sequence[tuple[str, str]] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.text or self.cards or self.pictures or self.tables or self.samples or self.facts or self.code)


@dataclass(frozen=True)
class Page:
    """A whole page: its heading, a sentence or two that say it all, and its sections."""

    title: str
    kind: str
    lead: str
    sections: Sequence[Section]
    made_from: str
    note: str = ""


def numeric(form: Callable[[Any], str]) -> Callable[[float | None], Cell]:
    """A maker of cells for numbers that are shown in one form; None becomes an empty cell."""
    return lambda value: Cell("" if value is None else form(value), value)


plain, share, bytes_, seconds = numeric(digits), numeric(percent), numeric(size), numeric(duration)
exact = numeric(lambda value: f"{value:,}")


def words(*texts: Any) -> list[Cell]:
    """Cells that hold text."""
    return [Cell("" if text is None else str(text)) for text in texts]


def by_block(caption: str, columns: Sequence[str], rows: Iterable[tuple[int, Sequence[Cell]]]) -> Table:
    """A table with one row for each block."""
    return Table(caption, ["Block", *columns], [[Cell(str(block)), *cells] for block, cells in rows])
