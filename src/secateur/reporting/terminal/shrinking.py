"""What `shrink` did, or would do, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..removed import removed_share
from ..words import duration, number, size, windows


def shrink_table(report: Mapping[str, Any]) -> Table:
    """What was removed, what it cost, and what it gained."""
    plan, parameters, sizes = report["plan"], report["parameters"], report["bytes"]
    table = Table(title=f"{escape(plan['model']['name'])}: {escape(removed_words(report))}")
    for heading, justify in (("", "left"), ("before", "right"), ("after", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    if evaluation := report.get("evaluation"):
        before, after = evaluation["before"], evaluation["after"]
        table.add_row("perplexity", number(before["perplexity"]), number(after["perplexity"]), escape(windows(after)))
    for what, key in (("parameters", ""), ("parameters of blocks", "blocks_")):
        old, new = parameters[f"{key}before"], parameters[f"{key}after"]
        table.add_row(what, f"{old:,}", f"{new:,}", f"{1 - new / old:.1%} removed")
    for name, (old, new) in report["config"].items():
        if not isinstance(new, list):
            former = "not said" if old is None else str(old)
            table.add_row(escape(name), escape(former), escape(str(new)), "config.json")
    ratio = sizes["output"] / sizes["dense_16_bit"]
    table.add_row(
        "checkpoint", size(sizes["dense_16_bit"]), size(sizes["output"]), f"{ratio:.2f} of it in 16 bits before"
    )
    if removed := report["removed_layers"]:
        chosen = "as asked" if isinstance(plan["layers"], list) else f"chosen by {plan['depth']}"
        table.add_row("blocks removed", "", ", ".join(map(str, removed)), chosen)
    if calibration := plan["calibration"]:
        what = f"{calibration['samples']} sequences, {calibration['tokens']:,} tokens of {calibration['source']}"
        table.add_row("calibration", "", "", escape(what))
    table.add_row(
        "time to shrink", "", duration(report["seconds"]["shrinking"]), f"{plan['threads']} threads, {plan['device']}"
    )
    table.add_row("peak memory", "", size(report["peak_memory_bytes"]), "of the whole process")
    return table


def removed_words(report: Mapping[str, Any]) -> str:
    """What was removed, in a few words: ``18.7% of its blocks' parameters removed, by obs``."""
    plan, share = report["plan"], removed_share(report["parameters"])
    how = f", by {plan['criterion']}{'' if plan['compensate'] else ' without compensation'}"
    return f"{share:.1%} of its blocks' parameters removed{how if report['matrices'] else ''}"


def outlook_table(plan: Mapping[str, Any]) -> Table:
    """What would be written, as far as no measurement decides it."""
    table = Table(title=f"{escape(plan['model']['name'])}: nothing is written (dry run)", show_header=False)
    for name, (old, new) in plan["config"].items():
        table.add_row(escape(name), escape(f"{old} becomes {new}"))
    for candidate in plan["candidates"]:
        table.add_row("to be tried out", escape(candidate))
    if calibration := plan["calibration"]:
        table.add_row("calibration", escape(f"{calibration['tokens']:,} tokens of {calibration['source']}"))
    return table
