"""Comparing models, dense and pruned in many ways; and the report of all that was recorded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import OptionError, OutputError, unwritable
from ..evaluation.comparison import compare_models
from ..evaluation.grid import DEFAULT_SPARSITY, OWN, Grid
from ..evaluation.records import now
from ..evaluation.speed import Measurement
from ..evaluation.subject import Conditions
from ..models.in_memory import is_path, model_name
from ..pipeline.files import write_text
from ..pipeline.machine import processor, software
from ..pipeline.machine import threads as using_threads
from ..pipeline.plan import Request
from ..pipeline.presets import DEFAULT_METHOD
from ..progress import Progress
from ..reporting.markdown.comparison import comparison_markdown
from ..reporting.terminal.progress import terminal_progress
from .measuring import task_options
from .places import DEFAULT_TEXT, command_line, note_evaluation, output_path
from .undisturbed import undisturbed

COMPARISON, MARKDOWN = "comparison.json", "comparison.md"


@undisturbed
def compare(
    models: str | Path | Sequence[str | Path],
    *,
    methods: Sequence[str] = ("magnitude", "wanda", "sparsegpt", DEFAULT_METHOD),
    sparsities: Sequence[float] = (DEFAULT_SPARSITY,),
    patterns: Sequence[str] = (OWN,),
    calibration: str | Sequence[str] = "c4",
    samples: int | Sequence[int | None] | None = None,
    seeds: Sequence[int] = (0,),
    seqlen: int | None = None,
    propagate: str = "block",
    format: str = "bitmask",
    values: str | None = None,
    dtype: str = "auto",
    text: str = DEFAULT_TEXT,
    windows: int | None = None,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    generations: int = 0,
    bench: bool = False,
    output: str | Path = "comparison",
    device: str = "auto",
    threads: int | None = None,
    record: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure models dense, and pruned in every combination of methods, sparsities and patterns.

    What is measured is kept in `output` and never measured twice: a stopped comparison goes on, and one with more
    methods or another seed takes over what is there already.

    Args:
        models: directories, hub ids, ``.gguf`` files, ``smollm2``.
        methods: with options (``sparsegpt:damping=0.02``) and updates (``wanda+pcg``); ``shrink`` removes whole parts,
            as `shrink` does, and takes its options ``of`` (``heads+neurons``), ``criterion``, ``depth``, ``compensate``
            (``yes``, ``no``), ``round`` and ``propagate``: ``shrink:of=layers:depth=influence``.
        sparsities: fractions removed; N:M patterns have their own; the `target` of ``shrink``.
        patterns: ``own`` is each method's own; else as in `prune`; not for ``shrink``.
        calibration: one SOURCE or several.
        samples: calibration sequences, one number or several; None is 128, or as many as there are.
        seeds: of the random crops.
        seqlen: tokens of a window, and of a calibration sequence; None is min(2048, context).
        propagate: as in `prune`, of pruning alone.
        format: of the pruned matrices; decides bytes, memory and speed.
        values: as in `prune`.
        dtype: as in `prune`.
        text: a SOURCE for perplexity.
        windows: how many windows; None is 40, or as many as there are.
        tasks: as in `evaluate`.
        task_data: as in `evaluate`.
        batch_size: as in `evaluate`.
        limit: as in `evaluate`.
        num_fewshot: as in `evaluate`.
        generations: how many texts each model goes on with.
        bench: measure memory and speed too, each pruned model in turn with its dense one.
        output: directory of the comparison: measurements.jsonl, comparison.json, comparison.md.
        device: where to compute.
        threads: for torch; None leaves them alone.
        record: append a dense model's evaluation to its ``evaluations.jsonl`` if Secateur wrote it.
        trust_remote_code: let Python code that comes with the model run.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Returns:
        The conditions, and a row for each model and cell, dense first (docs/json.md).

    Raises:
        SecateurError: one line that says what, where, and what to do; of single cells only if all of them failed.
    """
    given = locals()
    several: Iterable[Any] = models if isinstance(models, Iterable) and not is_path(models) else [models]
    names = list(dict.fromkeys(map(model_name, several)))
    if not names:
        raise OptionError("models: give at least one")
    command, date = command_line(compare, names, given), now()
    grid = Grid(
        methods=tuple(methods), sparsities=tuple(sparsities), patterns=tuple(patterns), seeds=tuple(seeds),
        calibrations=(calibration,) if isinstance(calibration, str) else tuple(calibration),
        samples=(samples,) if samples is None or isinstance(samples, int) else tuple(samples),
    )  # fmt: skip
    Request(threads=threads).check()
    with using_threads(threads):
        conditions = Conditions(
            text=text, windows=windows, seqlen=seqlen, propagate=propagate, format=format, values=values, dtype=dtype,
            tasks=task_options(tasks, task_data, batch_size, limit, num_fewshot), generations=generations,
            bench=Measurement((1,), 128, 32, 5, torch.get_num_threads()) if bench else None,
            device=device, trust_remote_code=trust_remote_code,
            record=note_evaluation if record else None,
        )  # fmt: skip
        cells = grid.cells(**conditions.pruning)
        conditions.check()
        folder = output_path(output)

        def document(rows: list[dict[str, Any]]) -> dict[str, Any]:
            return {
                "schema": 1, "command": command, "date": date, "processor": processor(),
                "threads": torch.get_num_threads(), "software": software(),
                "planned": len(names) * (len(cells) + 1), "rows": rows,
            }  # fmt: skip

        def keep(rows: list[dict[str, Any]]) -> None:
            write_text(folder / COMPARISON, json.dumps(document(rows), indent=1) + "\n")
            write_text(folder / MARKDOWN, comparison_markdown(document(rows)))

        return document(
            compare_models(names, cells, conditions, folder, progress or terminal_progress(lines=False), keep)
        )


@undisturbed
def report(model: str | Path, *, output: str | Path = "report.html") -> Path:
    """Write a page about what was pruned, measured or compared: one HTML file that needs nothing else.

    Args:
        model: a directory that `prune`, `pack` or `compare` wrote, an unfinished run, or a ``comparison.json``.
        output: the file; a former one is replaced.

    Returns:
        Where it was written.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    from ..reporting.page.records import load_records
    from ..reporting.page.render import is_page, render_page

    target = output_path(output)
    if target.is_dir():
        raise OutputError(f"{target}: is a directory; give a file's name, such as {target / 'report.html'}")
    if target.exists() and not is_page(target):
        raise OutputError(f"{target}: is there and is no page of Secateur's; choose another name")
    page = render_page(load_records(output_path(model_name(model))))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target.parent}: {unwritable(error)}") from error
    write_text(target, page)
    return target
