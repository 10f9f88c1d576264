"""Finding out where a model can be pruned more, and where less: sensitivity, and an allocation made of it."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError, OutputError, nearest
from ..evaluation.sensitivity import UNITS, find_units, measure_units
from ..models.source import load_tokenizer, open_checkpoint
from ..pipeline.calibration import evaluation_windows
from ..pipeline.files import write_text
from ..pipeline.plan import Request
from ..pipeline.presets import DEFAULT_METHOD
from ..pipeline.prune import prune_checkpoint
from ..progress import Progress
from ..pruning import parse_pattern
from ..pruning.allocation import allocate_by_sensitivity, default_target
from ..reporting.terminal.progress import terminal_progress
from .places import DEFAULT_TEXT, opened, output_path
from .undisturbed import undisturbed


@undisturbed
def sensitivity(
    model: str | Path,
    *,
    method: str = DEFAULT_METHOD,
    sparsity: float | None = None,
    pattern: str | None = None,
    calibration: Any = "c4",
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    text: str = DEFAULT_TEXT,
    windows: int = 8,
    by: Sequence[str] = UNITS,
    target: float | None = None,
    spread: float = 0.1,
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what pruning each block alone, or each kind of matrix alone, does to a model's predictions.

    The model is pruned once, with the statistics of the unpruned model. Time grows with `windows`: they are read about
    n / 2 times for n blocks, and once for each kind of matrix. From the blocks' KL divergences follows a sparsity for
    each, less for the sensitive ones: the rule is that of `pruning.allocation.allocate_by_sensitivity`.

    Args:
        model: directory, hub id, ``.gguf`` file or ``smollm2``.
        method: as in `prune`.
        sparsity: as in `prune`; of what is pruned alone.
        pattern: as in `prune`.
        calibration: as in `prune`.
        samples: as in `prune`.
        seqlen: tokens of a calibration sequence, and of a window; None is min(2048, context).
        seed: as in `prune`.
        text: a SOURCE, on which predictions are compared; of one with splits, its test split.
        windows: how many.
        by: ``block``, ``kind`` or both.
        target: mean sparsity of the allocation; None is `sparsity`.
        spread: how far the allocation goes from the target.
        output: a YAML file for the allocation, as ``prune --allocation`` reads it; None writes none.
        overwrite: replace the file.
        device: where to compute.
        trust_remote_code: let Python code that comes with the model run.
        tokenizer: in place of the model's own.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Returns:
        The conditions, the dense model's figures, ``blocks``, ``kinds`` and ``allocation`` (docs/json.md).

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    started = time.perf_counter()
    progress = progress or terminal_progress(lines=False)
    request = Request(
        method=method, sparsity=sparsity, pattern=pattern, calibration=calibration, samples=samples, seqlen=seqlen,
        seed=seed, propagate="dense", device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    file = None if output is None else output_path(output)
    mean = _check(request, by, target, spread, file, overwrite)
    with opened(model, device, trust_remote_code) as host, tempfile.TemporaryDirectory() as scratch:
        folder, directory = Path(scratch), host.checkpoint.directory
        words = tokenizer or load_tokenizer(directory, trust_remote_code)
        tokens = evaluation_windows(text, words, host.model.config, seqlen, windows)
        report = prune_checkpoint(str(directory), folder / "pruned", request, progress, tokenizer=words)
        units = [unit for name in UNITS if name in by for unit in find_units(host, report["matrices"], name)]
        if not units:
            raise OptionError("sparsity 0 prunes nothing, so there is nothing to compare")
        pruned = open_checkpoint(folder / "pruned", trust_remote_code)
        dense, rows = measure_units(host, pruned, units, tokens, folder, progress)
    found = {
        **{key: report["plan"][key] for key in ("method", "pattern", "sparsity", "calibration")},
        **dense,
        "blocks": rows["block"],
        "kinds": rows["kind"],
        "allocation": None if mean is None else _allocation(rows["block"], mean, spread),
        "threads": report["plan"]["threads"],
        "software": report["plan"]["software"],
        "seconds": time.perf_counter() - started,
    }
    if file is not None:
        write_text(file, _allocation_file(str(model), found))
    return found


def _check(
    request: Request, by: Sequence[str], target: float | None, spread: float, file: Path | None, overwrite: bool
) -> float | None:
    """Return the allocation's mean, or None if none can be made; raise for what can be refused before the work."""
    request.check()
    if not by:
        raise OptionError(f"by: name what is pruned alone: {', '.join(UNITS)}")
    for name in by:
        if name not in UNITS:
            raise OptionError(f"by {name!r}: {nearest(name, UNITS)}")
    pattern = parse_pattern(request.pattern or request.parsed_method.pattern)
    mean = default_target(request.sparsity, pattern).sparsity if target is None else target
    asked = target is not None or file is not None
    if "block" not in by:
        if asked:
            raise OptionError("an allocation gives each block a sparsity: have --by name block")
        return None
    if pattern.fixed_sparsity is not None:
        if asked:
            raise OptionError(
                f"pattern {pattern} has one sparsity, and an allocation several; use another, such as row"
            )
        return None
    allocate_by_sensitivity([1.0], [1], mean, spread)
    if file is not None:
        _check_file(file, overwrite)
    return mean


def _check_file(file: Path, overwrite: bool) -> None:
    if file.is_dir():
        raise OutputError(f"{file}: is a directory; give a file's name, such as {file / 'allocation.yaml'}")
    if file.exists() and not overwrite:
        raise OutputError(f"{file}: is there already; --overwrite replaces it")
    if not os.access(file.parent, os.W_OK):
        raise OutputError(f"{file.parent}: is no directory that can be written")


def _allocation(rows: Sequence[Mapping[str, Any]], target: float, spread: float) -> dict[str, Any]:
    """The sparsity of each block."""
    weights = [row["weights"] for row in rows]
    worst = max((row["kl"] for row in rows if row["kl"] is not None), default=1.0)  # which an infinite KL counts as
    divergences = [worst if row["kl"] is None else row["kl"] for row in rows]
    sparsities = allocate_by_sensitivity(divergences, weights, target, spread)
    return {
        "target": target,
        "spread": spread,
        "mean": sum(s * count for s, count in zip(sparsities, weights, strict=True)) / sum(weights),
        "sparsities": {str(row["block"]): value for row, value in zip(rows, sparsities, strict=True)},
    }


def _allocation_file(model: str, found: Mapping[str, Any]) -> str:
    """The allocation as YAML, with a word on where it comes from; names are quoted, whatever they hold."""
    allocation = found["allocation"]
    lines = [
        f"# A sparsity for each block, for secateur prune --allocation: mean {allocation['mean']:.4f}.",
        f"# From the KL divergence of {json.dumps(model)} with one block pruned alone ({json.dumps(found['method'])},"
        f" {found['pattern']}, {found['sparsity']:g})",
        f"# on {json.dumps(found['text'])}, {found['windows']} windows of {found['seqlen']} tokens.",
        *(f"{block}: {value:.6f}" for block, value in allocation["sparsities"].items()),
    ]
    return "\n".join(lines) + "\n"
