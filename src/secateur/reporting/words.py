"""Recorded figures in words, as every kind of result shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHRUNKEN = "Sparsity of shrunken models, of pattern structured: the share of their blocks' parameters that is gone."


def is_shrunken(row: Mapping[str, Any]) -> bool:
    """Whether parts of a comparison's model were removed, and no weights zeroed."""
    return row.get("pattern") == "structured"


def size(count: float | None) -> str:
    """Bytes for people: ``269.1 MB``."""
    if count is None:
        return "not measured"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds for people: ``2 min 5 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def windows(evaluation: Mapping[str, Any]) -> str:
    """On what a perplexity was measured: text, window, windows, tokens."""
    return (
        f"{evaluation['text']}, {evaluation['windows']} windows of {evaluation['seqlen']} tokens, "
        f"{evaluation['tokens']:,} of {evaluation['available_tokens']:,} tokens"
    )


def number(value: float | None) -> str:
    """A perplexity for people."""
    if value is None:
        return "beyond measure"
    return f"{value:,.2f}" if value < 1e6 else f"{value:.1e}"


def packed_words(packed: Mapping[str, Any]) -> str:
    """How much smaller packed matrices are, and should be."""
    true, predicted = packed["true"] / packed["dense"], packed["predicted"] / packed["dense"]
    return f"{packed['matrices']} packed: {true:.4f} of their dense bytes, {predicted:.4f} predicted"


def arrangement_words(arranged: Mapping[str, Any]) -> str:
    """How the matrices of a packed model run here."""
    words = [f"{arranged['packed']} matrices run packed, {arranged['unpacked']} dense"]
    if arranged["kernels"] is None:
        words.append("no kernels, torch computes (they are compiled at install if there is a C compiler)")
    else:
        words.append(f"{arranged['kernels']} kernels")
    if arranged["activations8"]:
        words.append(f"{arranged['activations8']} with 8-bit activations")
    return "; ".join(words)
