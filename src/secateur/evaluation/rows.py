"""The rows of a comparison, and their arithmetic against the dense row of the same model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SecateurError
from .grid import Cell

DENSE = "dense"


def make_row(
    name: str,
    cell: Cell | None,
    format: str,
    dense_bytes: int | None,
    results: Mapping[str, Any],
    dense: Mapping[str, Any] | None,
    error: Exception | None = None,
) -> dict[str, Any]:
    """Make the row of one cell; what was not measured is None.

    Args:
        name: of the model.
        cell: how it was pruned or shrunken; None is dense.
        format: of pruned matrices; a shrunken model has none.
        dense_bytes: of the dense model's tensors; None if it could not be opened.
        results: the measurements that were made, by their names.
        dense: the row of the dense model; None for that row itself.
        error: why not all were made.
    """
    pruned, bench = results.get("pruned"), results.get("bench")
    size = (pruned["bytes"]["output"] if pruned else None) if cell else dense_bytes
    decode, resident = _ratios(bench) if bench and cell else (None, None)
    row = {
        "model": name,
        "method": cell.method if cell else DENSE,
        "pattern": cell.pattern if cell else None,
        "target": cell.sparsity if cell else None,
        "seed": cell.seed if cell else None,
        "format": format if cell and not cell.shrinks else DENSE,
        "sparsity": pruned["sparsity"] if pruned else None if cell else 0.0,
        "calibration": pruned["calibration"] if pruned else None,
        "evaluation": results.get("evaluation"),
        **_losses(results.get("evaluation"), dense and dense["evaluation"]),
        "tasks": results.get("tasks"),
        "task_mean_change": _difference(results.get("tasks"), dense and dense["tasks"]),
        "seconds": pruned["seconds"] if pruned else None,
        "peak_memory_bytes": pruned["peak_memory_bytes"] if pruned else None,
        "bytes": size,
        "bytes_ratio": size / dense_bytes if size and dense_bytes else None,
        "bench": bench,
        "decode_ratio": decode,
        "resident_ratio": resident,
        "error": _words(error) if error else None,
    }
    return row | ({"generations": results["generations"]} if "generations" in results else {})


def _words(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, SecateurError) else f"{type(error).__name__}: {first}"


def _losses(evaluation: Mapping[str, Any] | None, dense: Mapping[str, Any] | None) -> dict[str, float | None]:
    if evaluation is None or dense is None:
        names = ("loss_increase", "loss_increase_stderr", "perplexity_increase", "perplexity_ratio")
        return dict.fromkeys(names)
    before, after = dense["perplexity"], evaluation["perplexity"]
    known = before is not None and after is not None
    return {
        "loss_increase": evaluation["loss"] - dense["loss"],
        "loss_increase_stderr": (evaluation.get("fidelity") or {}).get("loss_increase_stderr"),
        "perplexity_increase": after - before if known else None,
        "perplexity_ratio": after / before if known else None,
    }


def _difference(tasks: Mapping[str, Any] | None, dense: Mapping[str, Any] | None) -> float | None:
    if tasks is None or dense is None or tasks["mean"] is None or dense["mean"] is None:
        return None
    return float(tasks["mean"] - dense["mean"])


def _ratios(bench: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Decode speed of the smallest batch and resident memory, against the dense model timed in turn with it."""
    pruned, dense = bench["models"]
    medians = [model["speeds"][0]["decode"]["median"] for model in (pruned, dense)]
    return medians[0] / medians[1], pruned["resident_bytes"] / dense["resident_bytes"]
