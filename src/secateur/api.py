"""The Python interface: what the command line does, with the same names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .errors import ModelError, OptionError, OutputError
from .evaluation.generation import continue_text
from .evaluation.inspection import inspect_matrices
from .evaluation.perplexity import perplexity
from .evaluation.records import record_evaluation
from .evaluation.speed import Measurement, measure_speed
from .models.gguf import as_checkpoint
from .models.hosts import DiskHost, Host, LiveHost
from .models.source import load_model, load_tokenizer, locate, open_checkpoint
from .pipeline.calibration import Tokens, evaluation_windows
from .pipeline.live import prune_live
from .pipeline.machine import choose_device
from .pipeline.packing import pack_checkpoint, unpack_checkpoint
from .pipeline.plan import Request
from .pipeline.prune import prune_checkpoint
from .progress import Progress
from .pruning import Method
from .report.terminal import terminal_progress

EVALUATE_WINDOWS = 40


@dataclass(frozen=True)
class PruneResult:
    """What `prune` gives back.

    Attributes:
        model: the pruned model, if one is in memory.
        path: the output directory, if one was written.
        report: the contents of ``secateur.json`` (docs/json.md).
    """

    model: PreTrainedModel | None
    path: Path | None
    report: dict[str, Any]


def prune(
    model: str | Path | PreTrainedModel,
    output: str | Path | None = None,
    *,
    method: str | Method = "wanda",
    sparsity: float | None = None,
    pattern: str | None = None,
    calibration: Any = "c4",
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    allocation: str | Mapping[str, float | str] | Sequence[float] = "uniform",
    propagate: str = "block",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    format: str = "dense",
    values: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    evaluate: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a model in one shot.

    A path or hub id with `output` is pruned from disk to disk, one block in memory at a time, and a killed run
    goes on where it stopped. A live model is pruned in place. A path without `output` is loaded, pruned and
    given back.

    Args:
        model: directory, hub id, ``.gguf`` file, ``smollm2``, or a live model.
        output: directory of the new checkpoint.
        method: ``magnitude``, ``wanda``, ``ria``, ``sparsegpt`` with options (``sparsegpt:damping=0.02``), or a
            `Method` of your own.
        sparsity: fraction of weights removed, in [0, 1); None is 0.5, or what an N:M pattern implies.
        pattern: ``row``, ``matrix``, ``N:M`` (keep N of M), ``block:RxC``; None is the method's own.
        calibration: a SOURCE, strings, token ids [samples, seqlen], records, or a tokenizer's batch.
        samples: calibration sequences; None is 128, or as many as there are.
        seqlen: tokens of a sequence; None is min(2048, context).
        seed: of the random crops.
        allocation: ``uniform``, a YAML file, a mapping of blocks or expressions to sparsities, or one number a block.
        propagate: what later matrices see: ``block``, the pruned blocks before them; ``dense``, the unpruned model;
            ``sequential``, every pruned matrix before them, at the cost of one forward in place of two.
        include: expressions; only matrices in whose name one is found.
        exclude: expressions; no matrix in whose name one is found.
        format: of the pruned matrices: ``dense``, ``bitmask`` (any zeros), ``nm`` (N:M with M up to 16).
        values: ``int8`` rounds packed values to 8 bits, with a scale for each row; None keeps them exactly.
        dtype: of the written tensors; ``auto`` is the source's.
        device: where to compute; ``auto`` is a GPU if there is one.
        threads: for torch; None leaves them alone.
        evaluate: a SOURCE on which perplexity is measured before and after.
        dry_run: plan and estimate only; the report is the plan.
        overwrite: replace an earlier result of Secateur.
        resume: go on with an unfinished run.
        trust_remote_code: let Python code that comes with the model run.
        tokenizer: in place of the model's own.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    progress = progress or terminal_progress(lines=False)
    request = Request(
        method=method, sparsity=sparsity, pattern=pattern, calibration=calibration, samples=samples, seqlen=seqlen,
        seed=seed, allocation=allocation, propagate=propagate, include=include, exclude=exclude, dtype=dtype,
        device=device, threads=threads, evaluate=evaluate, trust_remote_code=trust_remote_code,
        format=format, values=values,
    )  # fmt: skip
    if isinstance(model, PreTrainedModel) or output is None:
        if evaluate or dry_run or dtype != "auto" or format != "dense":
            raise OptionError(
                "evaluate, dry_run, dtype and format are for pruning from disk to disk: give a model's name and output"
            )
        if not isinstance(model, PreTrainedModel):
            live, own = _load(str(model), request)
            tokenizer = tokenizer or own
        else:
            live = model
        target = None if output is None else _path(output)
        report = prune_live(live, request, progress, tokenizer=tokenizer, output=target)
        return PruneResult(live, target, report)

    def measure(directory: Path) -> dict[str, Any]:
        host = DiskHost(open_checkpoint(directory, trust_remote_code), choose_device(device))
        words = tokenizer or load_tokenizer(directory, trust_remote_code)
        tokens = _windows(str(evaluate), host, words, seqlen, None)
        tokens = Tokens(tokens.rows[:EVALUATE_WINDOWS], tokens.source, tokens.available)
        with tempfile.TemporaryDirectory() as folder:
            return perplexity(host, tokens, Path(folder), progress)

    report = prune_checkpoint(
        str(model), _path(output), request, progress, tokenizer=tokenizer, evaluate=measure if evaluate else None,
        dry_run=dry_run, overwrite=overwrite, resume=resume,
    )  # fmt: skip
    return PruneResult(None, None if dry_run else _path(output), report)


def pack(
    model: str | Path,
    output: str | Path,
    *,
    format: str = "bitmask",
    values: str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack the matrices of a pruned checkpoint, so that it is smaller on disk and in memory (docs/formats.md).

    Args:
        model: directory, hub id or ``.gguf`` file of a model that was pruned, by whatever tool.
        output: directory of the packed checkpoint.
        format: ``bitmask`` (any zeros) or ``nm`` (N:M with M up to 16).
        values: ``int8`` rounds values to 8 bits, with a scale for each row; None keeps them exactly.
        overwrite: replace an earlier result of Secateur.
        resume: go on with an unfinished run.
        trust_remote_code: let Python code that comes with the model run.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    return pack_checkpoint(
        str(model), _path(output), format, values, progress or terminal_progress(lines=False), overwrite=overwrite,
        resume=resume, trust_remote_code=trust_remote_code,
    )  # fmt: skip


def unpack(
    model: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a packed checkpoint dense again, as any other tool reads it.

    Args:
        model: directory or hub id of a checkpoint that Secateur packed.
        output: directory of the dense checkpoint.
        overwrite: replace an earlier result of Secateur.
        trust_remote_code: let Python code that comes with the model run.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    return unpack_checkpoint(
        str(model), _path(output), progress or terminal_progress(lines=False), overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def evaluate(
    model: str | Path | PreTrainedModel,
    *,
    text: str = "wikitext2",
    seqlen: int | None = None,
    windows: int | None = None,
    device: str = "auto",
    record: bool = True,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model's perplexity, one block in memory at a time.

    Args:
        model: directory, hub id, ``.gguf`` file, ``smollm2``, or a live model.
        text: a SOURCE; of one with splits, its test split.
        seqlen: tokens of a window; None is min(2048, context).
        windows: how many windows; None is all.
        device: where to compute.
        record: append the result to ``evaluations.jsonl`` if the model is a directory that Secateur wrote.
        trust_remote_code: let Python code that comes with the model run.
        tokenizer: in place of the model's own.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Returns:
        text, seqlen, windows, tokens, available_tokens, loss and perplexity.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    progress = progress or terminal_progress(lines=False)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, PreTrainedModel):
            live = LiveHost(model)
            words = tokenizer or load_tokenizer(model.name_or_path, trust_remote_code)
            tokens = _windows(text, live, words, seqlen, windows)
            with live.borrowed():
                return perplexity(live, tokens, Path(folder), progress)
        with _opened(model, device, trust_remote_code) as host:
            words = tokenizer or load_tokenizer(host.checkpoint.directory, trust_remote_code)
            tokens = _windows(text, host, words, seqlen, windows)
            found = perplexity(host, tokens, Path(folder), progress)
            if record:
                record_evaluation(host.checkpoint.directory, found)
            return found


def inspect(model: str | Path, *, trust_remote_code: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Look at a checkpoint's matrices: shape, sparsity, pattern, format, bytes.

    Args:
        model: directory, hub id, ``.gguf`` file or ``smollm2``.
        trust_remote_code: let Python code that comes with the model run.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    with _opened(model, "cpu", trust_remote_code) as host:
        return inspect_matrices(host, progress or terminal_progress(lines=False))


def generate(
    model: str | Path, prompt: str, *, tokens: int = 40, device: str = "auto", trust_remote_code: bool = False
) -> str:
    """Return what a model writes after a prompt, always taking the likeliest token.

    Args:
        model: directory, hub id, ``.gguf`` file or ``smollm2``.
        prompt: how the text begins.
        tokens: how many tokens are added at most.
        device: where to compute.
        trust_remote_code: let Python code that comes with the model run.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    with tempfile.TemporaryDirectory() as scratch:
        directory = as_checkpoint(locate(str(model), trust_remote_code), Path(scratch))
        return continue_text(directory, prompt, tokens, choose_device(device), trust_remote_code=trust_remote_code)


def bench(
    model: str | Path,
    *,
    against: str | Path | None = None,
    batch: Sequence[int] = (1,),
    prompt: int = 128,
    tokens: int = 32,
    rounds: int = 5,
    threads: int | None = None,
    prefer: str | None = None,
    activations: str | None = None,
    record: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model's bytes on disk, resident memory, and tokens per second in prefill and decode, on the CPU.

    Args:
        model: directory, hub id, ``.gguf`` file or ``smollm2``.
        against: another model, timed in turn with the first.
        batch: how many sequences at once, one measurement for each number.
        prompt: tokens of each sequence before the first new one.
        tokens: new tokens of each sequence.
        rounds: how often everything is run; medians are taken.
        threads: to compute with; None is torch's number.
        prefer: of packed models, ``speed`` or ``memory`` (`secateur.optimize`).
        activations: of packed models, ``int8`` or None (`secateur.optimize`).
        record: append the result to ``evaluations.jsonl`` if the model is a directory that Secateur wrote.
        trust_remote_code: let Python code that comes with the model run.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Returns:
        The conditions, and for each model its numbers (docs/json.md).

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    threads = torch.get_num_threads() if threads is None else threads
    measurement = Measurement(tuple(batch), prompt, tokens, rounds, threads, prefer, activations)
    measurement.check()  # before a model is downloaded or made of a GGUF file
    names = [str(name) for name in (model, against) if name is not None]
    with tempfile.TemporaryDirectory() as scratch:
        places = [
            as_checkpoint(locate(name, trust_remote_code), Path(scratch) / str(number))
            for number, name in enumerate(names)
        ]
        found = measure_speed(
            list(zip(names, places, strict=True)), measurement, progress or terminal_progress(lines=False),
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if record:
            record_evaluation(places[0], {"bench": found})
        return found


def _path(output: str | Path) -> Path:
    try:
        return Path(output).expanduser()
    except RuntimeError:
        raise OutputError(f"{output}: nobody of that name has a home here") from None


@contextmanager
def _opened(model: str | Path, device: str, trust_remote_code: bool) -> Iterator[DiskHost]:
    with tempfile.TemporaryDirectory() as scratch:
        directory = as_checkpoint(locate(str(model), trust_remote_code), Path(scratch))
        yield DiskHost(open_checkpoint(directory, trust_remote_code), choose_device(device))


def _windows(text: str, host: Host, tokenizer: Any, seqlen: int | None, windows: int | None) -> Tokens:
    return evaluation_windows(text, tokenizer, host.model.config, seqlen, windows)


def _load(model: str, request: Request) -> tuple[PreTrainedModel, Any]:
    request.check()
    with tempfile.TemporaryDirectory() as scratch:
        trusted = request.trust_remote_code
        directory = as_checkpoint(locate(model, trusted), Path(scratch))
        if open_checkpoint(directory, trusted).packed:
            raise ModelError(f"{model}: is packed; give an output as well, or unpack it first")
        device = choose_device(request.device)
        model_in_memory: PreTrainedModel = load_model(directory, "auto", trusted).to(device)
        return model_in_memory, load_tokenizer(directory, trusted)
