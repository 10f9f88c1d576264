"""What `finetune` did, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..trained import held_out, improved, loss_name, loss_words, remarks, zeros_words
from ..words import duration, number, packed_words, size, windows


def training_table(report: Mapping[str, Any]) -> Table:
    """What became of the zeros, what training won, what it took, and what went wrong with it."""
    plan, training, sizes = report["plan"], report["training"], report["bytes"]
    title = f"{escape(plan['model']['name'])}: {escape(training_words(report))}"
    table = Table(title=title, caption=escape("\n".join(advice(report))) or None, caption_justify="left")
    for heading, justify in (("", "left"), ("before", "right"), ("after", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    if evaluation := report.get("evaluation"):
        before, after = evaluation["before"], evaluation["after"]
        table.add_row("perplexity", number(before["perplexity"]), number(after["perplexity"]), escape(windows(after)))
    if pair := held_out(training):
        what = "held-out loss" if training["loss"] != "divergence" else loss_name(training)
        table.add_row(what, *map(loss_words, pair), f"nats per token, {training['held_out_rows']} rows held out")
    table.add_row(
        "sparsity", f"{report['sparsity_before']:.2%}", f"{report['sparsity']:.2%}", f"of {report['weights']:,} weights"
    )
    ratio = sizes["output"] / sizes["dense_16_bit"]
    dense = size(sizes["dense_16_bit"])
    table.add_row("checkpoint", dense, size(sizes["output"]), f"{ratio:.2f} of the 16-bit dense checkpoint")
    if packed := report["packed"]:
        table.add_row("packed matrices", size(packed["dense"]), size(packed["true"]), packed_words(packed))
    data = plan["data"]
    table.add_row("trained", "", f"{training['trainable']:,}", f"parameters, learning rate {plan['learning_rate']:g}")
    table.add_row("data", "", f"{data['samples']:,}", escape(f"rows, {data['tokens']:,} tokens of {data['source']}"))
    if teacher := plan["teacher"]:
        table.add_row("teacher", "", "", escape(teacher["name"]))
    table.add_row("time", "", duration(report["seconds"]["training"]), f"{plan['threads']} threads, {plan['device']}")
    table.add_row("peak memory", "", size(report["peak_memory_bytes"]), "of the whole process")
    return table


def training_words(report: Mapping[str, Any]) -> str:
    """What was done, in a few words: ``trained for 200 steps (lora), every zero was kept``."""
    return f"trained for {report['training']['steps']:,} steps ({report['plan']['train']}), {zeros_words(report)}"


def advice(report: Mapping[str, Any]) -> list[str]:
    """What must be said of how training ended, and what may help if it won nothing."""
    said = remarks(report)
    lost = not report["plan"]["course"] and not improved(report["training"])
    if report["training"]["stopped"] is not None or lost:
        said.append(f"Try a lower --learning-rate than {report['plan']['learning_rate']:g}, or more text.")
    return said
