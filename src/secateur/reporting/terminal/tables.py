"""Results as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..pruned import allocation_found, found_words, mean_errors, reconstruction_words
from ..words import arrangement_words, duration, number, packed_words, size, windows


def packing_table(report: Mapping[str, Any]) -> Table:
    """What packing or unpacking did to a checkpoint's bytes."""
    plan, sizes = report["plan"], report["bytes"]
    values = f", values {plan['values']} (rounded)" if plan.get("values") else ""
    table = Table(title=f"{escape(plan['model']['name'])}: {plan['command']} {plan.get('format', '')}{values}".rstrip())
    for heading, justify in (("", "left"), ("before", "right"), ("after", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    ratio = sizes["output"] / sizes["source"]
    table.add_row("checkpoint", size(sizes["source"]), size(sizes["output"]), f"{ratio:.4f} of its bytes")
    if packed := report["packed"]:
        table.add_row("packed matrices", size(packed["dense"]), size(packed["true"]), packed_words(packed))
    if dense := report["dense_matrices"]:
        more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
        table.add_row("left dense", "", str(len(dense)), f"{', '.join(dense[:3])}{more}")
    return table


def prune_table(report: Mapping[str, Any]) -> Table:
    """What a run did, what it cost, and what it gained."""
    plan = report["plan"]
    name = escape(plan["model"]["name"])
    table = Table(title=f"{name}: {_method(plan)}, {plan['pattern']}, {plan['sparsity']:.0%} removed")
    for heading, justify in (("", "left"), ("before", "right"), ("after", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    if evaluation := report.get("evaluation"):
        before, after = evaluation["before"], evaluation["after"]
        table.add_row("perplexity", number(before["perplexity"]), number(after["perplexity"]), escape(windows(after)))
    table.add_row(
        "sparsity",
        "",
        f"{report['sparsity']:.4%}",
        f"{report['zeros']:,} of {report['weights']:,} weights in its matrices",
    )
    if found := allocation_found(plan):
        table.add_row("allocation", "", found["name"], found_words(found).partition(", ")[2])
    if errors := mean_errors(report["blocks"]):
        before, after, count = errors
        what = f"held out, mean over {count} blocks that were reconstructed"
        table.add_row("error of a block", f"{before:.4f}", f"{after:.4f}", what)
    if sizes := report.get("bytes"):
        ratio = sizes["output"] / sizes["dense_16_bit"]
        table.add_row(
            "checkpoint",
            size(sizes["dense_16_bit"]),
            size(sizes["output"]),
            f"{ratio:.2f} of the 16-bit dense checkpoint",
        )
        if sizes["source_files"] < sizes["output"]:
            table.add_row(
                "source file", size(sizes["source_files"]), "", "quantised, and smaller than the pruned checkpoint"
            )
    if packed := report.get("packed"):
        rounded = f"; values {plan['values']} (rounded)" if plan.get("values") else ""
        table.add_row("pruned matrices", size(packed["dense"]), size(packed["true"]), packed_words(packed) + rounded)
    if calibration := plan["calibration"]:
        what = f"{calibration['samples']} sequences, {calibration['tokens']:,} tokens of {calibration['source']}"
        table.add_row("calibration", "", "", what)
    table.add_row(
        "time to prune", "", duration(report["seconds"]["pruning"]), f"{plan['threads']} threads, {plan['device']}"
    )
    table.add_row("peak memory", "", size(report["peak_memory_bytes"]), "of the whole process")
    return table


def _method(plan: Mapping[str, Any]) -> str:
    preset = f" (preset {plan['preset']})" if plan.get("preset") else ""
    return escape(f"{plan['method']}{preset}")


def plan_table(plan: Mapping[str, Any]) -> Table:
    """What a run would do, and about what it would take."""
    guess = plan["estimate"]
    table = Table(title=f"{escape(plan['model']['name'])}: nothing is written (dry run)", show_header=False)
    calibration = plan["calibration"]
    tokens = f"{calibration['tokens']:,} tokens of {calibration['source']}" if calibration else "none needed"
    rows = [
        ("method", f"{_method(plan)}, pattern {plan['pattern']}, propagate {plan['propagate']}"),
        (
            "matrices",
            f"{plan['matrices']:,} with {plan['weights']:,} weights, {plan['mean_sparsity']:.4%} to be removed",
        ),
        ("calibration", tokens),
        ("time, about", duration(guess["seconds"])),
        ("memory, about", size(guess["memory_bytes"])),
        ("disk at most", size(guess["disk_bytes"])),
    ]
    if how := plan.get("reconstruct"):
        rows.insert(1, ("reconstruction", reconstruction_words(how)))
    if found := allocation_found(plan):
        rows.insert(1, ("allocation", found_words(found)))
    for what, value in rows:
        table.add_row(what, value)
    return table


def inspection_table(model: str, found: Mapping[str, Any]) -> Table:
    """One row per kind of matrix, over all blocks, and the total."""
    table = Table(title=f"{escape(model)}: {found['model_type']}, {found['blocks']} blocks")
    packed = any(row["format"] != "dense" for row in found["matrices"])
    runs = ["runs here"] if packed else []
    for heading in ("matrix", "shape", "blocks", "sparsity", "pattern", "format", *runs, "bytes"):
        left = heading in ("matrix", "pattern", "format", "runs here")
        table.add_column(heading, justify="left" if left else "right")
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["matrices"]:
        kinds.setdefault(row["name"].split(f".{row['block']}.", 1)[-1], []).append(row)
    for kind, rows in kinds.items():
        low, high = min(r["sparsity"] for r in rows), max(r["sparsity"] for r in rows)
        table.add_row(
            kind,
            "x".join(map(str, rows[0]["shape"])),
            str(len(rows)),
            f"{low:.2%}" if high - low < 5e-5 else f"{low:.2%} to {high:.2%}",
            ", ".join(pattern for pattern, _ in Counter(r["pattern"] for r in rows).most_common(3)),
            ", ".join(sorted({r["format"] for r in rows})),
            *([", ".join(sorted({r["runs"] for r in rows}))] if packed else []),
            size(sum(r["bytes"] for r in rows)),
        )
    total = sum(row["bytes"] for row in found["matrices"])
    table.add_section()
    empty = [""] * (2 + packed)
    table.add_row("all matrices", f"{found['weights']:,}", "", f"{found['sparsity']:.2%}", *empty, size(total))
    table.add_row("whole checkpoint", "", "", "", *empty, size(found["bytes"]))
    return table


def speed_table(found: Mapping[str, Any]) -> Table:
    """Size, memory and speed of one model, or of two side by side with their ratio, and on what they were measured."""
    models = found["models"]
    table = Table(title=escape(models[0]["name"]), caption=escape(_conditions(found)), caption_justify="left")
    table.add_column("")
    for model in models:
        table.add_column(f"{escape(model['name'])} ({model['dtype']})", justify="right")
    if len(models) == 2:
        table.add_column("ratio", justify="right")

    def row(what: str, cells: list[str], numbers: list[float | None]) -> None:
        ratio = f"{numbers[0] / numbers[1]:.2f}" if len(numbers) == 2 and all(numbers) else ""  # type: ignore[operator]
        table.add_row(what, *cells, *([ratio] if len(numbers) == 2 else []))

    for what, key in (("bytes on disk", "bytes"), ("resident memory", "resident_bytes")):
        row(what, [size(model[key]) for model in models], [model[key] for model in models])
    for batch in dict.fromkeys(speed["batch"] for model in models for speed in model["speeds"]):
        for what in ("prefill", "decode"):
            speeds = [next((s[what] for s in m["speeds"] if s["batch"] == batch), None) for m in models]
            medians = [speed and speed["median"] for speed in speeds]
            row(f"{what}, batch {batch}", [_tokens_per_second(speed) for speed in speeds], medians)
    return table


def _tokens_per_second(speed: Mapping[str, float] | None) -> str:
    if speed is None:
        return "not measured"
    digits = 0 if speed["median"] >= 100 else 1
    return f"{speed['median']:.{digits}f} tokens/s ({speed['slowest']:.{digits}f} to {speed['fastest']:.{digits}f})"


def _conditions(found: Mapping[str, Any]) -> str:
    lines = [
        f"{found['processor']}, {found['threads']} threads; {found['prompt']} tokens of prompt, {found['tokens']} new; "
        f"median of {found['rounds']} rounds in turn (slowest to fastest)"
    ]
    for model in found["models"]:
        if arranged := model["arrangement"]:
            lines.append(f"{model['name']}: {arrangement_words(arranged)}")
        lines += [f"{model['name']} in {dtype} not measured: {why}" for dtype, why in model["not_measured"].items()]
    return "\n".join(lines)


def generation_text(prompt: str, continuation: str) -> Text:
    """A prompt and what a model wrote after it."""
    return Text.assemble((prompt, "dim"), continuation)
