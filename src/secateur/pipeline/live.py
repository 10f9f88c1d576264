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
from ..models.in_memory import eager, model_in_memory, refuse_adapters, refuse_quantised
from ..models.live_host import LiveHost
from ..models.matrices import Matrix
from ..models.source import directory_of, first_line, load_tokenizer, quiet_transformers
from ..progress import Progress
from .allocating import with_allocation
from .files import check_room, write_text
from .loop import prune_blocks
from .machine import peak_memory_bytes, threads
from .output import LEGAL, PROCESSORS, Describe, check_output, copy, make_report, small_files
from .plan import Request, announce, make_plan
from .run_directory import REPORT, RunDirectory, run_of, run_path
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
    model: Any,
    request: Request,
    progress: Progress,
    *,
    tokenizer: Any = None,
    output: Path | None = None,
    describe: Describe | None = None,
) -> dict[str, Any]:
    """Prune a model in memory, in place; it leaves as it came but for its zeros.

    Args:
        model: the model, or what torch or accelerate have wrapped it in.
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
    refuse_adapters(model)
    live = model_in_memory(model)
    refuse_quantised(live)
    if output is not None:
        _check_output(live, output)
    if getattr(live, "quantization_method", None) == QUANT_METHOD:
        raise ModelError(
            f"{live.name_or_path}: is packed, and stays so in memory; prune it from disk to disk, or unpack it first"
        )
    with eager(live):
        if output is None:
            return _prune(live, request, progress, tokenizer)
        with run_of(output) as run:  # an OUTPUT that cannot be written is found out before the work
            check_room(run.path, sum(tensor.nbytes for tensor in live.state_dict().values()), "the model")
            report = _prune(live, request, progress, tokenizer)
            _save_live(run, live, tokenizer, report, describe)
            return report


def _prune(model: PreTrainedModel, request: Request, progress: Progress, tokenizer: Any) -> dict[str, Any]:
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
    return make_report(
        plan,
        results.blocks,
        seconds={"pruning": spent, "this_process": time.perf_counter() - started},
        peak_memory_bytes=peak_memory_bytes(),
        bytes=None,
        packed=None,
        evaluation=None,
    )


def _check_output(model: PreTrainedModel, output: Path) -> None:
    check_output(output, Path(model.name_or_path or "."), overwrite=False)
    if output.exists() and any(output.iterdir()):
        raise OutputError(f"{output}: is not empty; choose another directory")
    if (unfinished := run_path(output)).exists():
        raise OutputError(f"{unfinished}: holds an unfinished run; finish it, remove it, or choose another OUTPUT")


def _save_live(
    run: RunDirectory, model: PreTrainedModel, tokenizer: Any, report: Mapping[str, Any], describe: Describe | None
) -> None:
    target = run.path / "output"
    try:
        with quiet_transformers():
            _save_model(model, target)
        tokenizer = tokenizer or load_tokenizer(model.name_or_path)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
    except Exception as error:  # whatever transformers, safetensors or a tokenizer raises, a full disk among it
        why = unwritable(error) if isinstance(error, OSError) else f"cannot be saved ({first_line(error)[:160]})"
        raise OutputError(f"{run.output}: {why}; the model in memory is pruned") from error
    source = directory_of(str(model.name_or_path or ""))
    for path in small_files(source, (*LEGAL, *PROCESSORS)) if source else []:
        copy(path, target / path.name)
    write_text(target / REPORT, json.dumps(report, indent=1))
    if describe:
        describe(target, source or Path("nowhere"))
    run.install()


def _save_model(model: PreTrainedModel, target: Path) -> None:
    """Save a model whole, also with a generation config that transformers loads and refuses to save."""
    own: Any = model.generation_config if model.can_generate() else None
    try:
        if own is not None:
            own.validate(strict=True)
    except ValueError:
        model.generation_config = type(own)()
        try:
            model.save_pretrained(target)
        finally:
            model.generation_config = own
        write_text(target / "generation_config.json", own.to_json_string() + "\n")
    else:
        model.save_pretrained(target)
