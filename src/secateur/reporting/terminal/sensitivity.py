"""Sensitivity as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..words import duration, number, windows


def sensitivity_table(model: str, found: Mapping[str, Any]) -> Group:
    """A row for each block, with the sparsity that it is given, and one for each kind of matrix."""
    parts: list[Any] = []
    allocation = found["allocation"]
    for by in ("block", "kind"):
        if rows := found[f"{by}s"]:
            given = allocation["sparsities"] if by == "block" and allocation else None
            parts.append(_table(f"{model}: {by} by {by}, pruned alone", by, rows, given))
    lines = [
        f"{found['method']}, {found['pattern']}, {found['sparsity']:.0%} removed; KL and loss in nats per token on "
        f"{windows(found)}; the dense model's perplexity is {number(found['perplexity'])}"
    ]
    if allocation:
        lines.append(f"allocated: mean {allocation['mean']:.4f}, spread {allocation['spread']:g}")
    lines.append(f"measured in {duration(found['seconds'])}, {found['threads']} threads")
    return Group(*parts, Text("\n".join(lines)))


def _table(title: str, by: str, rows: Sequence[Mapping[str, Any]], given: Mapping[str, float] | None) -> Table:
    table = Table(title=escape(title))
    table.add_column(by, justify="right" if by == "block" else "left")
    for heading in ("weights", "sparsity", "KL", "same likeliest token", "loss", *(["allocated"] if given else [])):
        table.add_column(heading, justify="right")
    for row in rows:
        error = row["loss_increase_stderr"]
        table.add_row(
            escape(str(row[by])),
            f"{row['weights']:,}",
            f"{row['sparsity']:.2%}",
            "infinite" if row["kl"] is None else f"{row['kl']:.5f}",
            f"{row['top1']:.2%}",
            f"{row['loss_increase']:+.4f}" + ("" if error is None else f" ± {error:.4f}"),
            *([f"{given[str(row[by])]:.4f}"] if given else []),
        )
    return table
