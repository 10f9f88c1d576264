"""The largest sparsity whose loss on held-out text rises by no more than the user allows, by bisection."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..progress import Progress
from .grid import Cell
from .place import kept_in
from .rows import make_row
from .subject import Conditions, Subject

log = logging.getLogger("secateur")

HUNDREDTHS = 95  # the most that is tried


def largest_sparsity(
    model: str, cell: Cell, conditions: Conditions, most: float, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Find a sparsity to a hundredth, taking the loss to rise with it; what was tried is not tried again.

    Args:
        model: MODEL as the user names it.
        cell: how to prune it; its own sparsity does not matter.
        conditions: of pruning, and the text on which the loss is measured.
        most: by which the loss may rise, in nats per token.
        folder: where measurements are kept.
        progress: hears of the work.

    Returns:
        sparsity, loss_increase and its standard error over windows, the text, and all that was tried.

    Raises:
        OptionError: even a hundredth costs more.
    """
    tried: list[dict[str, Any]] = []
    with kept_in(folder) as (journal, work):
        subject = Subject(model, conditions, work, journal, progress)

        def rise(hundredths: int) -> float:
            at = replace(cell, sparsity=hundredths / 100)
            subject.measure(at)
            row = make_row(model, at, conditions.format, None, subject.known(at), dense)
            found = {key: row[key] for key in ("loss_increase", "loss_increase_stderr")}
            tried.append({"sparsity": at.sparsity, **found})
            log.info("sparsity %.2f: loss %+.4f ± %.4f", at.sparsity, *(value or 0 for value in found.values()))
            return float(row["loss_increase"])

        try:
            subject.measure(None)
            dense = make_row(model, None, conditions.format, None, subject.known(None), None)
            allowed, refused = 0, HUNDREDTHS + 1
            while refused - allowed > 1:
                middle = (allowed + refused) // 2
                allowed, refused = (middle, refused) if rise(middle) <= most else (allowed, middle)
        finally:
            subject.close()
    if not allowed:
        raise OptionError(
            f"max_loss {most:g}: removing 1 % of the weights raises the loss by {tried[-1]['loss_increase']:.4f} nats "
            "per token already; allow more"
        )
    (chosen,) = (step for step in tried if step["sparsity"] == allowed / 100)
    evaluation = dense["evaluation"]
    text = {key: evaluation[key] for key in ("text", "seqlen", "windows", "tokens")}
    return {**chosen, **text, "tried": tried}
