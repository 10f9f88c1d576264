"""Pruning a model in memory, in place: the same loop."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError, OutputError, SecateurError, unwritable
from ..models.checkpoint import QUANT_METHOD
from ..models.live_host import LiveHost
from ..models.matrices import Matrix
from ..models.source import load_tokenizer, quiet_transformers
from ..progress import Progress
from .allocating import with_allocation
from .files import write_text
from .loop import prune_blocks
from .machine import peak_memory_bytes, threads
from .output import Describe, check_output, make_report
from .plan import Request, announce, make_plan
from .run_directory import REPORT, RunDirectory, run_path
from .self_text import tokens_for
from .stream import Stream


class LiveRun:
    """The results of a model in memory: its new weights are in it already."""

    def __init__(self, host: LiveHost) -> None:
        self.host = host
        self.blocks: list[dict[str, Any]] = []

    @property
    def done(self) -> int:
        """How many blocks are finished."""
        return len(self.blocks)

    @contextmanager
    def guarded(self, block: nn.Module) -> Iterator[None]:
        """Give a block its former weights back after an error."""
        former = [parameter.detach().clone() for parameter in block.parameters()]
        try:
            yield
        except BaseException:
            for parameter, weights in zip(block.parameters(), former, strict=True):
                parameter.data.copy_(weights)
            raise

    def as_written(self, matrix: Matrix, W_OI: Tensor) -> Tensor:
        """Cast new weights to the dtype in which the model keeps them."""
        return W_OI.to(self.host.written_dtype(matrix))

    def cast(self, name: str, parameter: Tensor) -> Tensor:
        """Cast a parameter to the dtype in which the model keeps it."""
        return parameter.to(getattr(parameter, "own_dtype", parameter.dtype))

    def keep(self, index: int, pruned: Sequence[Matrix]) -> None:
        """The resident block is the model's own."""

    def finish(self, index: int, record: dict[str, Any]) -> None:
        """Note that a block is finished."""
        self.blocks.append(record)


def prune_live(
    model: PreTrainedModel,
    request: Request,
    progress: Progress,
    *,
    tokenizer: Any = None,
    output: Path | None = None,
    describe: Describe | None = None,
) -> dict[str, Any]:
    """Prune a model in memory, in place; it leaves as it came but for its zeros.

    Args:
        model: the model.
        request: the options; dtype and device are the model's own.
        progress: hears of the work.
        tokenizer: in place of that of ``model.name_or_path``.
        output: where to save the result too.
        describe: adds to the saved directory what people read.

    Returns:
        The report.

    Raises:
        SecateurError: whatever went wrong; the message names the blocks that were pruned before it.
    """
    request.check()
    if output is not None:
        _check_output(model, output)
    if getattr(model, "quantization_method", None) == QUANT_METHOD:
        raise ModelError(
            f"{model.name_or_path}: is packed, and stays so in memory; prune it from disk to disk, or unpack it first"
        )
    started = time.perf_counter()
    host = LiveHost(model, computing=torch.float32 if request.reconstruct else None)
    results = LiveRun(host)
    try:
        with threads(request.threads), host.borrowed(), tempfile.TemporaryDirectory() as folder:
            tokens = None
            if request.calibrates:
                tokenizer = tokenizer or load_tokenizer(model.name_or_path, request.trust_remote_code)
                tokens = tokens_for(
                    host, request.calibration, tokenizer, request.samples, request.seqlen, request.seed, progress
                )
            facts = {"name": model.name_or_path, "digest": None}
            request = with_allocation(request, host, facts, tokens, Path(folder) / "allocating", (), progress)
            plan = make_plan(request, host, facts, tokens)
            announce(plan)
            stream = dense = None
            if tokens and (plan.job.method.needs or plan.job.reconstruct):
                stream = Stream(host, tokens.rows, Path(folder), batch_tokens=plan.job.batch_tokens)
            if stream and plan.job.reconstruct:
                dense = stream.beside(Path(folder) / "dense")
            prune_blocks(host, plan.job, stream, results, progress, dense)
    except SecateurError as error:
        if results.done:
            raise type(error)(f"{error} (blocks 0 to {results.done - 1} are already pruned)") from error
        raise
    spent = plan.allocation_seconds + sum(block["seconds"] for block in results.blocks)
    report = make_report(
        plan,
        results.blocks,
        seconds={"pruning": spent, "this_process": time.perf_counter() - started},
        peak_memory_bytes=peak_memory_bytes(),
        bytes=None,
        packed=None,
        evaluation=None,
    )
    if output is not None:
        _save_live(model, tokenizer, output, report, describe)
    return report


def _check_output(model: PreTrainedModel, output: Path) -> None:
    check_output(output, Path(model.name_or_path or "."), overwrite=False)
    if output.exists() and any(output.iterdir()):
        raise OutputError(f"{output}: is not empty; choose another directory")
    if (unfinished := run_path(output)).exists():
        raise OutputError(f"{unfinished}: holds an unfinished run; finish it, remove it, or choose another OUTPUT")


def _save_live(
    model: PreTrainedModel, tokenizer: Any, output: Path, report: Mapping[str, Any], describe: Describe | None
) -> None:
    run = RunDirectory(output)
    try:
        target = run.path / "output"
        with quiet_transformers():
            model.save_pretrained(target)
        tokenizer = tokenizer or load_tokenizer(model.name_or_path)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        write_text(target / REPORT, json.dumps(report, indent=1))
        if describe:
            describe(target, Path(model.name_or_path or "nowhere"))
        run.install()
    except OSError as error:
        raise OutputError(f"{output}: {unwritable(error)}") from error
    finally:
        run.close()
