"""The sparsity that `prune` is not told: the largest that costs no more than the user allows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from ..errors import OptionError
from ..evaluation.grid import Cell
from ..evaluation.search import largest_sparsity
from ..evaluation.subject import Conditions
from ..models.source import locate
from ..pipeline.machine import threads
from ..pipeline.output import check_output
from ..pipeline.plan import Request, listed
from ..pipeline.run_directory import report_of
from ..progress import Progress
from ..pruning import parse_pattern
from .places import DEFAULT_TEXT


def search_path(output: Path) -> Path:
    """Where a search for `output` keeps what it measured, until the output is there."""
    return output.with_name(output.name + ".search")


def sought(
    model: str, output: Path, request: Request, max_loss: float, progress: Progress, *, dry_run: bool, overwrite: bool
) -> Request:
    """Return the request with the sparsity found, and a record of the search.

    Raises:
        OptionError: options between which nothing is left to seek.
    """
    text = request.evaluate or DEFAULT_TEXT
    pattern = request.pattern or request.parsed_method.pattern
    _check(request, max_loss, pattern, dry_run)
    check_output(output, locate(model, request.trust_remote_code), overwrite)  # before the work, not after it
    settings = {"max_loss": max_loss, "evaluate": text}
    former = None if overwrite else (report_of(output) or {}).get("plan", {})
    if former and settings.items() <= (former.get("search") or {}).items():  # found before; the plan tells the rest
        return replace(request, sparsity=former["sparsity"], evaluate=text, search=former["search"])
    calibrated = bool(request.parsed_method.needs)
    cell = Cell(
        str(request.method), pattern, 0.5, request.calibration if calibrated else None,
        request.samples if calibrated else None, request.seed if calibrated else None,
    )  # fmt: skip
    conditions = Conditions(
        text=text, seqlen=request.seqlen, propagate=request.propagate, format=request.format, values=request.values,
        dtype=request.dtype, include=listed(request.include), exclude=listed(request.exclude), device=request.device,
        trust_remote_code=request.trust_remote_code,
    )  # fmt: skip
    with threads(request.threads):
        found = largest_sparsity(model, cell, conditions, max_loss, search_path(output), progress)
    return replace(request, sparsity=found["sparsity"], evaluate=text, search={**settings, **found})


def _check(request: Request, max_loss: float, pattern: str, dry_run: bool) -> None:
    if not (math.isfinite(max_loss) and max_loss > 0):
        raise OptionError(
            f"max_loss {max_loss}: is the rise allowed, in nats per token, above 0; 0.01 is about 1 % of perplexity"
        )
    if request.sparsity is not None or parse_pattern(pattern).fixed_sparsity is not None:
        raise OptionError("max_loss seeks a sparsity: leave out --sparsity and N:M patterns, which set one")
    if request.allocation != "uniform":
        raise OptionError("max_loss seeks one sparsity for all matrices; leave out --allocation")
    if request.reconstruct:
        raise OptionError("max_loss prunes about seven times to find out; leave out --reconstruct and --preset best")
    if dry_run:
        raise OptionError("max_loss has to prune about seven times to find out; leave out --dry-run")
    if not isinstance(request.method, str) or not isinstance(request.calibration, str):
        raise OptionError("max_loss needs a method and a calibration text by name")
    request.check()
