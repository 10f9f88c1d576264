"""What a pruning did beside its method, as every kind of result tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..pipeline.rules import FOUND

Plan = Mapping[str, Any]


def allocation_found(plan: Plan) -> Mapping[str, Any] | None:
    """How the rules of a named allocation were found; None if they were given."""
    found: Mapping[str, Any] | None = plan.get("allocation_found")
    return found if found and found["name"] in FOUND else None


def found_words(found: Mapping[str, Any]) -> str:
    """A named allocation: mean sparsity, and the slope if one was sought.

    >>> found_words({"name": "linear", "mean": 0.7, "slope": 0.15, "slopes": [{"slope": 0.15, "kl": 2.5}]})
    'linear, mean sparsity 70.00%; of 1 slopes, 0.15 changes predictions least'
    """
    tried = found.get("slopes")
    slope = f"; of {len(tried)} slopes, {found['slope']:g} changes predictions least" if tried else ""
    return f"{found['name']}, mean sparsity {found['mean']:.2%}{slope}"


def reconstruction_words(how: Mapping[str, Any]) -> str:
    """How blocks were to be reconstructed.

    >>> reconstruction_words({"epochs": 8, "learning_rate": 2e-3})
    'at most 8 epochs for each block, learning rate 0.002'
    """
    return f"at most {how['epochs']:d} epochs for each block, learning rate {how['learning_rate']:g}"


def mean_errors(blocks: Sequence[Mapping[str, Any]]) -> tuple[float, float, int] | None:
    """Mean held-out error of blocks before and after their reconstruction, and how many they are.

    >>> errors = {"error_before": 0.5, "error_after": 0.25}
    >>> mean_errors([{"block": 0, "reconstruction": errors}, {"block": 1}]), mean_errors([{"block": 0}])
    ((0.5, 0.25, 1), None)
    """
    pairs = errors_by_block(blocks).values()
    if not pairs:
        return None
    before, after = (sum(errors) / len(pairs) for errors in zip(*pairs, strict=True))
    return before, after, len(pairs)


def errors_by_block(blocks: Sequence[Mapping[str, Any]]) -> dict[int, tuple[float, float]]:
    """Held-out error of each block before and after its reconstruction, where both could be measured."""
    found = {}
    for block in blocks:
        one = block.get("reconstruction") or {}
        before, after = one.get("error_before"), one.get("error_after")
        if before is not None and after is not None:
            found[block["block"]] = (before, after)
    return found
