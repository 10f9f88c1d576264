"""Rows of comparisons: what they are called, and which of them can be compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..words import is_shrunken, windows
from .wording import percent, short

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Rows of one model whose perplexities were measured on the same text.

    Attributes:
        model: its name.
        conditions: text and windows in words; empty if nothing was evaluated.
        rows: in the order of the comparison.
    """

    model: str
    conditions: str
    rows: Sequence[Row]

    @property
    def dense(self) -> Row | None:
        """The row of the unpruned model, if it was evaluated."""
        return next((row for row in self.rows if is_dense(row) and row.get("evaluation")), None)


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Put together what can be compared; a row without an evaluation goes with the first rows of its model."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        conditions = conditions_of(row)
        if conditions is None:
            conditions = next((c for r in rows if r["model"] == row["model"] and (c := conditions_of(r))), "")
        found.setdefault((row["model"], conditions), []).append(row)
    return [Group(model, conditions, rows) for (model, conditions), rows in found.items()]


def conditions_of(row: Row) -> str | None:
    """On what a row's perplexity was measured."""
    evaluation = row.get("evaluation")
    return windows(evaluation) if evaluation and evaluation.get("text") is not None else None


def is_dense(row: Row) -> bool:
    """Whether a row is the unpruned model."""
    return bool(row["method"] == "dense")


def is_nm(pattern: str | None) -> bool:
    """Whether a pattern is N:M, whose sparsity cannot be chosen."""
    return bool(re.fullmatch(r"\d+:\d+", pattern or ""))


def perplexity_of(row: Row) -> float | None:
    """A row's perplexity; None if there is none, or none that a number could hold."""
    found = (row.get("evaluation") or {}).get("perplexity")
    return found if found is not None and found > 0 else None


def decode_speed(row: Row) -> Mapping[str, float] | None:
    """Tokens per second at the smallest batch: median, slowest, fastest."""
    models = (row.get("bench") or {}).get("models") or ()
    speeds = models[0]["speeds"] if models else ()
    return min(speeds, key=lambda speed: speed["batch"])["decode"] if speeds else None


def setting(row: Row, with_target: bool = False) -> str:
    """Method and pattern of a row, and how much was to be removed."""
    if is_dense(row):
        return "dense"
    if is_shrunken(row):  # there is no other pattern, and many options
        words = [short(row["method"], 70)]
    else:
        words = [short(row["method"], 40), *([short(row["pattern"], 20)] if row.get("pattern") else [])]
    if with_target and row.get("target") is not None:
        words.append(percent(row["target"], 0))
    return ", ".join(words)


def legend(row: Row) -> str:
    """A row's setting where there is little room: of options that their values tell, only those.

    >>> legend({"method": "shrink:of=neurons:criterion=flap:compensate=no", "pattern": "structured"})
    'shrink neurons flap compensate=no'
    """
    return re.sub(":(of=|criterion=|depth=)?", " ", setting(row)) if is_shrunken(row) else setting(row)


def label(row: Row, groups: Sequence[Group]) -> str:
    """A row's setting, with its model where there are several."""
    several = len({group.model for group in groups}) > 1
    return f"{short(row['model'], 40)}, {setting(row, True)}" if several else setting(row, True)
