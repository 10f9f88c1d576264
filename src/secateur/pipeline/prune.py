"""Pruning from disk to disk: the loop between a checkpoint and a new one."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import Checkpoint
from ..models.disk_host import DiskHost
from ..models.gguf import as_checkpoint
from ..models.matrices import watching
from ..models.shards import digest
from ..models.source import load_tokenizer, locate, open_checkpoint
from ..progress import Progress
from .allocating import known_plans, with_allocation
from .calibration import Tokens
from .disk_run import DiskRun
from .estimate import disk_bytes, estimate
from .files import check_room, write_text
from .loop import Job, prune_blocks
from .machine import choose_device, peak_memory_bytes, threads
from .output import Describe, check_output, make_report, write_checkpoint
from .packing import packed_bytes
from .plan import Plan, Request, announce, make_plan, written_dtype
from .run_directory import REPORT, RunDirectory, finished_result, run_of
from .self_text import tokens_for
from .stream import Stream

log = logging.getLogger("secateur")

Evaluate = Callable[[Path], dict[str, Any]]


def prune_checkpoint(
    model: str,
    output: Path,
    request: Request,
    progress: Progress,
    *,
    tokenizer: Any = None,
    evaluate: Evaluate | None = None,
    describe: Describe | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
) -> dict[str, Any]:
    """Prune a checkpoint into a new one, one block in memory at a time; go on where a killed run stopped.

    Args:
        model: MODEL as the user names it.
        output: directory of the new checkpoint.
        request: the options.
        progress: hears of the work.
        tokenizer: in place of the model's own.
        evaluate: measures a checkpoint's directory; called before and after.
        describe: adds to the finished directory what people read.
        dry_run: plan only, write nothing, and return the plan with estimates.
        overwrite: replace a result of ours.
        resume: go on with an earlier run.

    Returns:
        The report, equal to ``secateur.json``.
    """
    started = time.perf_counter()
    request.check()
    path = locate(model, request.trust_remote_code)
    check_output(output, path, overwrite)
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch, threads(request.threads):
            host, tokens, plan, _ = _prepare(model, path, Path(scratch), request, progress, tokenizer)
            return {**plan.record, **estimate(plan, host, tokens)}
    with run_of(output, resume) as run, threads(request.threads):
        host, tokens, plan, source = _prepare(
            model, path, run.path, request, progress, tokenizer, known_plans(run, overwrite)
        )
        finished = None if overwrite else finished_result(run.output, plan.record)
        if finished is not None:
            run.forget()
            return finished
        run.begin(plan.record)
        if plan.allocation_seconds:
            run.note({"allocated_in": plan.allocation_seconds})
        announce(plan)
        return _run(run, host, source, tokens, plan, path, progress, evaluate, describe, started)


def _prepare(
    model: str,
    path: Path,
    scratch: Path,
    request: Request,
    progress: Progress,
    tokenizer: Any,
    known: Sequence[Mapping[str, Any]] = (),
) -> tuple[DiskHost, Tokens | None, Plan, Checkpoint]:
    dtype = written_dtype(request.dtype)
    source = open_checkpoint(as_checkpoint(path, scratch, dtype), request.trust_remote_code)
    trained = torch.float32 if request.reconstruct else None  # in 16 bits small steps vanish
    host = DiskHost(source, choose_device(request.device), dtype, computing=trained)
    tokens = None
    if request.calibrates:
        tokenizer = tokenizer or load_tokenizer(source.directory, request.trust_remote_code)
        tokens = tokens_for(
            host, request.calibration, tokenizer, request.samples, request.seqlen, request.seed, progress
        )
    files = source.files if path.is_dir() else [path]
    progress.start("reading the model", sum(file.stat().st_size for file in files))
    facts = {"name": model, "digest": digest(files, progress.advance)}
    progress.finish()
    source.check_cast(dtype)
    request = with_allocation(request, host, facts, tokens, scratch / "allocating", known, progress)
    plan = make_plan(request, host, facts, tokens)
    streamed = plan.job.method.needs or plan.job.reconstruct
    return host, tokens if streamed else None, plan, source


def _run(
    run: RunDirectory,
    host: DiskHost,
    source: Checkpoint,
    tokens: Tokens | None,
    plan: Plan,
    path: Path,
    progress: Progress,
    evaluate: Evaluate | None,
    describe: Describe | None,
    started: float,
) -> dict[str, Any]:
    check_room(run.path, 0 if run.blocks else disk_bytes(plan, host, tokens), "this run")
    before = evaluated(run, plan.record, "before", source.directory, evaluate)
    results = DiskRun(run, host, plan.record["format"], plan.record["values"])
    if results.done:
        log.info("going on from block %d of %d", results.done + 1, len(host.skeleton.real))
    if results.done < len(host.skeleton.real):
        stream = dense = None
        if tokens:
            stream = stream_at(run, host, results, tokens, plan.job, progress)
        if stream and tokens and plan.job.reconstruct:
            if results.done:
                dense = stream_at(run, host, results, tokens, plan.job, progress, dense=True)
            else:
                dense = stream.beside(run.path / "hidden" / "dense")
        prune_blocks(host, plan.job, stream, results, progress, dense)
        for passed in (stream, dense):
            if passed:
                passed.close()
    target = run.path / "output"
    write_checkpoint(source, [run.block_tensors(i) for i in range(results.done)], target, host.dtype, progress)
    after = evaluated(run, plan.record, "after", target, evaluate)
    report = make_report(
        plan,
        run.blocks,
        seconds={"pruning": pruning_seconds(run), "this_process": time.perf_counter() - started},
        peak_memory_bytes=peak_memory_bytes(),
        bytes=file_bytes(path, source, target),
        packed=packed_bytes(Checkpoint.open(target)),
        evaluation={"before": before, "after": after} if after else None,
    )
    write_text(target / REPORT, json.dumps(report, indent=1))
    if describe:
        describe(target, source.directory)
    run.install()
    return report


def pruning_seconds(run: RunDirectory) -> float:
    """What finding an allocation and pruning all blocks took, in however many processes."""
    found = sum(line.get("allocated_in", 0.0) for line in run.journal)
    return float(found + sum(block["seconds"] for block in run.blocks))


def file_bytes(source: Path, checkpoint: Checkpoint, target: Path) -> dict[str, int]:
    """Bytes of the source's files, of its tensors in 16 bits, and of the output's tensors."""
    files = checkpoint.files if source.is_dir() else [source]
    return {
        "source_files": sum(file.stat().st_size for file in files),
        "dense_16_bit": sum(2 * i.weights for i in checkpoint.tensors.values() if i.dtype.is_floating_point),
        "output": Checkpoint.open(target).bytes,
    }


def evaluated(
    run: RunDirectory, plan: Mapping[str, Any], when: str, directory: Path, evaluate: Evaluate | None
) -> dict[str, Any] | None:
    """Measure a checkpoint, unless the journal knows the result; None if nothing is to be measured."""
    if evaluate is None:
        return None
    what = {"evaluated": when, "of": plan["evaluate"]}  # another text may be asked for on resume
    for line in run.journal:
        if what.items() <= line.items():
            result: dict[str, Any] = line["result"]
            return result
    result = evaluate(directory)
    run.note({**what, "result": result})
    return result


def stream_at(
    run: RunDirectory,
    host: DiskHost,
    results: DiskRun,
    tokens: Tokens,
    job: Job,
    progress: Progress,
    *,
    dense: bool = False,
) -> Stream:
    """The calibration tokens at the first unfinished block, in the pruned model or in the dense one."""
    done, folder = results.done, run.path / "hidden"
    first = done if run.hidden_is_sound else 0
    stream = Stream(host, tokens.rows, folder / "dense" if dense else folder, first, job.batch_tokens)
    if first < done:
        progress.start("repeating hidden states", done * len(stream.batches))
        for index in range(done):
            written = None if dense or job.propagate == "dense" else results.written(index)
            with host.block(index, written) as block, _as_first_run(host, job, index):
                stream.forward(index, block, progress)
        progress.finish()
    return stream


def _as_first_run(host: DiskHost, job: Job, index: int) -> AbstractContextManager[None]:
    """Repeat a forward as it was: under "sequential" it was watched, which changes the last bits of experts."""
    watched = job.chosen(host, index) if job.propagate == "sequential" else {}
    return watching(watched, lambda inputs: None)
