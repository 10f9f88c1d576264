"""The Markdown page of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..words import SHRUNKEN, duration, is_shrunken, size
from .text import (
    FIDELITY,
    Column,
    Row,
    calibrated_on,
    get_at,
    markdown_code,
    markdown_fence,
    markdown_text,
    measured_on,
    plain,
    rounded,
    short_name,
    shown,
    table_of,
    versions,
)


def comparison_markdown(document: Mapping[str, Any]) -> str:
    """Return the Markdown page of a comparison: one table, and under it on what its numbers were measured."""
    names = dict.fromkeys(row["model"] for row in document["rows"])
    if len({short_name(name) for name in names}) == len(names):  # else only their places tell them apart
        document = {**document, "rows": [{**row, "model": short_name(row["model"])} for row in document["rows"]]}
    rows = document["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    title = markdown_text(models[0]) if len(models) == 1 else f"{len(models)} models"
    notes = [f"- {note}" for note in _notes(document)]
    command = markdown_fence(plain(document["command"]))
    return (
        "\n\n".join([f"# {title}, dense and pruned", table_of(rows, COLUMNS, IF_VARIED), "\n".join(notes), command])
        + "\n"
    )


def _sparsity(row: Row) -> str | None:
    if row["sparsity"] is not None:
        return f"{row['sparsity']:.1%}"
    return None if row.get("target") is None else f"({row['target']:.1%})"


def _seed(row: Row) -> str | None:
    found = get_at("calibration", "seed")(row)
    found = row.get("seed") if found is None else found  # what is chosen at random reads no text
    return None if found is None else str(found)


def _perplexity(row: Row) -> str | None:
    evaluation = row.get("evaluation") or {}
    return rounded(evaluation["perplexity"]) if "perplexity" in evaluation else None


def _memory(row: Row) -> str | None:
    models = get_at("bench", "models")(row)
    return size(models[0]["resident_bytes"]) if models else None


COLUMNS: list[Column] = [
    ("Model", "l", lambda row: markdown_code(row["model"])),
    ("Method", "l", lambda row: markdown_code(row["method"]) if row["pattern"] else markdown_text(row["method"])),
    ("Pattern", "l", shown(markdown_code, "pattern")),
    ("Calibration", "l", shown(markdown_code, "calibration", "source")),
    ("Samples", "r", shown("{:,}".format, "calibration", "samples")),
    ("Seed", "r", _seed),
    ("Sparsity", "r", _sparsity),
    ("Perplexity", "r", _perplexity),
    ("Change", "r", shown(lambda value: f"{'' if value < 0 else '+'}{rounded(value)}", "perplexity_increase")),
    ("Ratio", "r", shown(rounded, "perplexity_ratio")),
    ("KL, nats", "r", shown("{:.3g}".format, "evaluation", "fidelity", "kl")),
    ("Top-1", "r", shown("{:.1%}".format, "evaluation", "fidelity", "top1")),
    ("Tasks", "r", shown("{:.3f}".format, "tasks", "mean")),
    ("Tasks, change", "r", shown("{:+.3f}".format, "task_mean_change")),
    ("Size", "r", shown(size, "bytes")),
    ("Size, ratio", "r", shown("{:.2f}".format, "bytes_ratio")),
    ("Memory", "r", _memory),
    ("Memory, ratio", "r", shown("{:.2f}".format, "resident_ratio")),
    ("Decode speed, ratio", "r", shown("{:.2f}".format, "decode_ratio")),
    ("Time to prune", "r", shown(duration, "seconds")),
    ("Peak memory", "r", shown(size, "peak_memory_bytes")),
]
IF_VARIED = ("Model", "Calibration", "Samples", "Seed")


def _notes(document: Mapping[str, Any]) -> list[str]:
    rows = document["rows"]
    texts = dict.fromkeys(measured_on(row["evaluation"]) for row in rows if _perplexity(row))
    calibrations = dict.fromkeys(calibrated_on(row["calibration"]) for row in rows if row["calibration"])
    planned = document.get("planned") or 0
    notes = [f"Unfinished: {len(rows)} of {planned} rows; the command goes on with it."] if len(rows) < planned else []
    notes += [SHRUNKEN] if any(map(is_shrunken, rows)) else []
    notes += [f"Perplexity: {text}; change and ratio against the dense model." for text in texts]
    if any(get_at("evaluation", "fidelity")(row) for row in rows):
        notes.append(FIDELITY)
    notes += dict.fromkeys(_tasks(row["tasks"]) for row in rows if row.get("tasks"))
    notes += [f"Calibration: {text}." for text in calibrations]
    formats = dict.fromkeys(row["format"] for row in rows if row["bytes"] is not None)
    if formats:
        notes.append(f"Size: of all tensors on disk, stored as {', '.join(map(markdown_code, formats))}.")
    notes += dict.fromkeys(_speed(row["bench"]) for row in rows if row.get("bench"))
    notes.append(
        f"Computed on {markdown_text(document['processor'])}, {document['threads']} threads, with "
        f"{versions(document['software'])}; {markdown_text(document['date'])}."
    )
    return notes + [_failure(row) for row in rows if row.get("error")]


def _tasks(tasks: Row) -> str:
    each = [f"{markdown_code(r['task'])} ({r['questions']:,} questions, {r['shots']} shots)" for r in tasks["results"]]
    return f"Tasks: the mean of acc over {', '.join(each)}; {markdown_text(tasks['library'])}."


def _speed(bench: Row) -> str:
    return (
        f"Memory and decode speed: {bench['prompt']} tokens of prompt, {bench['tokens']} new, median of "
        f"{bench['rounds']} rounds in turn with the dense model."
    )


def _failure(row: Row) -> str:
    what = ", ".join(filter(None, (markdown_code(row["method"]), row["pattern"] and markdown_code(row["pattern"]))))
    sparsity = _sparsity(row)
    return f"Failed: {what}{f', {sparsity}' if sparsity else ''}: {markdown_text(row['error'])}"
