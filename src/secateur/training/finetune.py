"""Training from disk to disk: a checkpoint is loaded whole, trained under its masks, and written as it came."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ModelError, NumericsError
from ..models.checkpoint import Checkpoint
from ..models.disk_host import DiskHost
from ..models.formats import Packing, pack
from ..models.gguf import as_checkpoint
from ..models.matrices import Matrix
from ..models.source import load_tokenizer, locate, open_checkpoint
from ..pipeline.calibration import Tokens, training_rows
from ..pipeline.files import check_room, write_text
from ..pipeline.machine import choose_device, peak_memory_bytes, threads
from ..pipeline.output import SCHEMA, Describe, check_output, write_checkpoint
from ..pipeline.packing import packed_bytes
from ..pipeline.prune import Evaluate, evaluated, file_bytes
from ..pipeline.run_directory import REPORT, RunDirectory, finished_result, report_of, run_of
from ..progress import Progress
from ..pruning.patterns import detect_pattern
from .masks import model_matrices
from .plan import make_plan, open_teacher, source_digest
from .recovery import MOST_HELD_OUT, Recovery
from .request import FinetuneRequest

log = logging.getLogger("secateur")

# The smallest numbers above 0.
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 2.0**-1074}


def finetune_checkpoint(
    model: str,
    output: Path,
    request: FinetuneRequest,
    progress: Progress,
    *,
    tokenizer: Any = None,
    evaluate: Evaluate | None = None,
    describe: Describe | None = None,
    overwrite: bool = False,
    resume: bool = True,
) -> dict[str, Any]:
    """Train a checkpoint so that its zeros stay, or come on the way; go on where a killed run stopped.

    Args:
        model: MODEL as the user names it.
        output: directory of the new checkpoint.
        request: the options.
        progress: hears of the work.
        tokenizer: in place of the model's own.
        evaluate: measures a checkpoint's directory; called before and after.
        describe: adds to the finished directory what people read.
        overwrite: replace a result of ours.
        resume: go on with an earlier run.

    Returns:
        The report, equal to ``secateur.json``.
    """
    request.check()
    path = locate(model, request.trust_remote_code)
    check_output(output, path, overwrite)
    device = choose_device(request.device)
    with run_of(output, resume) as run, threads(request.threads):
        source = open_checkpoint(as_checkpoint(path, run.path), request.trust_remote_code)
        host = DiskHost(source, torch.device("cpu"))
        tokens = training_rows(
            request.data,
            tokenizer or load_tokenizer(source.directory, request.trust_remote_code),
            host.model.config,
            request.seqlen,
            request.rows + MOST_HELD_OUT,
        )
        teacher = open_teacher(request, run.path, host, tokens.seqlen) if request.teacher else None
        plan = make_plan(request, {"name": model, "digest": source_digest(path, source)}, tokens, teacher, str(device))
        finished = None if overwrite else finished_result(run.output, plan)
        if finished is not None:
            run.forget()
            return finished
        run.begin(plan)
        before = evaluated(run, plan, "before", source.directory, evaluate)
        trained = _trained(run, host, request, tokens, teacher, progress)
        report = _written(run, host, path, plan, trained, before, evaluate, progress)
        if describe:
            describe(run.path / "output", source.directory)
        run.install()
        return report


def _trained(
    run: RunDirectory,
    host: DiskHost,
    request: FinetuneRequest,
    tokens: Tokens,
    teacher: DiskHost | None,
    progress: Progress,
) -> dict[str, Any]:
    """Train, write what changed to the run directory, and return the record; or the one that is there."""
    for line in run.journal:
        if line.get("step") == "trained":
            return {key: value for key, value in line.items() if key != "boot"}
    model = host.whole()
    zeros = {name: _zeros(matrix.read()) for name, matrix in model_matrices(model).items()}
    recovery = Recovery(model, request, tokens)
    if not run.begun:
        check_room(run.path, 3 * recovery.bytes + 2 * host.checkpoint.bytes, "this run")
    _announce(recovery, request, tokens)
    outcome = recovery.run(run.path / "trainer", None if teacher is None else teacher.whole(), progress, run.note)
    model = recovery.finished()
    tensors, packings = _packed(host, host.on_disk(_as_written(host, model, recovery.changed)))
    records = [
        {**_record(matrix, recovery.masks.keep(matrix)), "zeros_before": zeros[name]}
        for name, matrix in model_matrices(model).items()
    ]
    run.write_block(0, tensors, packings)
    record = {"step": "trained", **outcome, "matrices": records, "seconds": seconds(run)}
    run.note(record)
    return record


def _announce(recovery: Recovery, request: FinetuneRequest, tokens: Tokens) -> None:
    log.info(
        "training %s: %d parameters, %d steps of %d rows of %d tokens from %s; %d rows held out",
        request.trained, recovery.trainable, request.steps, request.batch_size * request.accumulate, tokens.seqlen,
        tokens.source, len(recovery.held_out),
    )  # fmt: skip
    if request.rows > len(recovery.rows):
        log.info(
            "the text has %d rows, so each is read %.1f times", len(recovery.rows), request.rows / len(recovery.rows)
        )
    if not recovery.held_out:
        log.warning("the text has too few rows to hold some out, so nothing tells when training begins to harm")


def _as_written(host: DiskHost, model: PreTrainedModel, changed: Collection[str]) -> dict[str, Tensor]:
    """Cast parameters, also in the model, and return them by all names that they have on disk.

    Every zero becomes +0.0, and no other number becomes zero: what is too small for float16 is rounded away from it.

    Raises:
        NumericsError: NaN or Inf.
    """
    shared = {id(parameter) for name, parameter in model.named_parameters() if name in changed}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in shared and name in host.names_of:
            dtype = host.dtype_on_disk(name)
            value = parameter.detach().cpu() + 0.0
            found[name] = value.to(dtype)
            lost = (found[name] == 0) & (value != 0)
            if lost.any():
                found[name][lost] = torch.copysign(torch.full((), SMALLEST[dtype]), value[lost]).to(dtype)
            parameter.data.copy_(found[name])
            if not torch.isfinite(found[name]).all():
                kind = str(dtype).removeprefix("torch.")
                raise NumericsError(f"{name}: what was trained does not fit {kind}; give a lower --learning-rate")
    return found


def _zeros(W_OI: Tensor) -> int:
    return W_OI.numel() - int(W_OI.count_nonzero())


def _record(matrix: Matrix, keep_OI: Tensor) -> dict[str, Any]:
    """What became of a matrix; of values in 8 bits, before they are rounded again.

    Raises:
        ModelError: a zero was lost.
    """
    W_OI = matrix.read()
    if (W_OI[~keep_OI] != 0).any():
        raise ModelError(f"{matrix.name}: lost zeros in training; this is a defect of Secateur, please report it")
    zeros = _zeros(W_OI)
    return {
        "name": matrix.name,
        "shape": list(matrix.shape),
        "pattern": detect_pattern(W_OI),
        "zeros": zeros,
        "sparsity": zeros / W_OI.numel(),
    }


def _packed(host: DiskHost, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Packing]]:
    """Pack again what the source holds packed, in the same way."""
    found, packings = dict(tensors), {}
    for name, info in host.checkpoint.packed.items():
        held, former = found[name] if name in found else host.checkpoint.read(name), info.packing
        packed = pack(
            name, held.T if former.transposed else held, former.format, "int8" if former.values == "int8" else None
        )
        if packed is not None:
            packings[name] = replace(packed[0], transposed=former.transposed)
            found.pop(name, None)
            found |= {name + suffix: part for suffix, part in packed[1].items()}
    return found, packings


def _written(
    run: RunDirectory,
    host: DiskHost,
    path: Path,
    plan: dict[str, Any],
    trained: dict[str, Any],
    before: dict[str, Any] | None,
    evaluate: Evaluate | None,
    progress: Progress,
) -> dict[str, Any]:
    source, target = host.checkpoint, run.path / "output"
    write_checkpoint(source, [run.block_tensors(0)], target, None, progress)
    after = evaluated(run, plan, "after", target, evaluate)
    matrices = trained["matrices"]
    weights = sum(m["shape"][0] * m["shape"][1] for m in matrices)
    zeros, zeros_before = (sum(m[key] for m in matrices) for key in ("zeros", "zeros_before"))
    report = {
        "schema": SCHEMA,
        "plan": plan,
        "sparsity": zeros / weights,
        "sparsity_before": zeros_before / weights,
        "weights": weights,
        "zeros": zeros,
        "training": {key: value for key, value in trained.items() if key not in ("step", "matrices", "seconds")},
        "matrices": matrices,
        "seconds": {"training": trained["seconds"]},
        "peak_memory_bytes": peak_memory_bytes(),
        "bytes": file_bytes(path, source, target),
        "packed": packed_bytes(Checkpoint.open(target)),
        "evaluation": {"before": before, "after": after} if after else None,
        "former": report_of(source.directory),
    }
    write_text(target / REPORT, json.dumps(report, indent=1))
    return report


def seconds(run: RunDirectory) -> float:
    """What training took, in all processes, up to the last checkpoint."""
    return float(sum(line["seconds"] for line in run.journal if line.get("step") == "saved"))
