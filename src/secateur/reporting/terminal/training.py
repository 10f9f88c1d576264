"""What `finetune` did, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..words import duration, number, size, windows


def training_table(report: Mapping[str, Any]) -> Table:
    """What became of the zeros, what training won, and what it took."""
    plan, training, sizes = report["plan"], report["training"], report["bytes"]
    table = Table(title=f"{escape(plan['model']['name'])}: {training_words(report)}")
    for heading, justify in (("", "left"), ("before", "right"), ("after", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    if evaluation := report.get("evaluation"):
        before, after = evaluation["before"], evaluation["after"]
        table.add_row("perplexity", number(before["perplexity"]), number(after["perplexity"]), escape(windows(after)))
    if held := training["held_out"]:
        reached = dict(held).get(training["steps"], held[-1][1])
        what = "divergence from the teacher" if training["loss"] == "divergence" else "held-out loss"
        table.add_row(what, f"{held[0][1]:.3f}", f"{reached:.3f}", f"nats per token, {training['held_out_rows']} rows")
    table.add_row(
        "sparsity", f"{report['sparsity_before']:.2%}", f"{report['sparsity']:.2%}", f"of {report['weights']:,} weights"
    )
    table.add_row("checkpoint", "", size(sizes["output"]), f"{sizes['output'] / sizes['dense_16_bit']:.2f} of 16 bits")
    data = plan["data"]
    table.add_row("trained", "", f"{training['trainable']:,}", f"parameters, learning rate {plan['learning_rate']:g}")
    table.add_row("data", "", f"{data['samples']:,}", escape(f"rows, {data['tokens']:,} tokens of {data['source']}"))
    table.add_row("time", "", duration(report["seconds"]["training"]), f"{plan['threads']} threads, {plan['device']}")
    table.add_row("peak memory", "", size(report["peak_memory_bytes"]), "of the whole process")
    return table


def training_words(report: Mapping[str, Any]) -> str:
    """What was done, in a few words: ``trained for 200 steps (lora), zeros kept``."""
    plan, course = report["plan"], report["plan"]["course"]
    how = "zeros kept"
    if course:
        by = course["method"] if course["rounds"] is None else f"{course['method']} in {course['rounds']} rounds"
        how = f"pruned on the way to {report['sparsity']:.1%} by {by}"
    return f"trained for {report['training']['steps']} steps ({plan['train']}), {how}"
