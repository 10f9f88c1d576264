"""Measuring one model, or two against each other: evaluate, inspect, generate, bench."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import OptionError
from ..evaluation.fidelity import Reading, check_same_tokens
from ..evaluation.generation import continue_text
from ..evaluation.inspection import inspect_matrices
from ..evaluation.perplexity import perplexity
from ..evaluation.questions import Questions, answer, read_windows
from ..evaluation.speed import Measurement, measure_speed
from ..evaluation.tasks import TaskOptions
from ..models.gguf import as_checkpoint
from ..models.in_memory import eager, is_path, model_in_memory, model_name, refuse_prompts, refuse_quantised
from ..models.live_host import LiveHost
from ..models.source import load_tokenizer, locate
from ..pipeline.calibration import evaluation_windows
from ..pipeline.machine import choose_device
from ..progress import Progress
from ..reporting.terminal.progress import terminal_progress
from .places import DEFAULT_TEXT, note_evaluation, opened
from .undisturbed import undisturbed


@undisturbed
def evaluate(
    model: str | Path | PreTrainedModel | nn.Module,
    *,
    text: str | None = None,
    seqlen: int | None = None,
    windows: int | None = None,
    against: str | Path | None = None,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    generations: int = 0,
    device: str = "auto",
    record: bool = True,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model: perplexity, one block in memory at a time; zero-shot tasks; how far it is from another model.

    Args:
        model: directory, hub id, ``.gguf`` file, ``smollm2``, or a live model (perplexity only), also wrapped
            (torch.compile, DDP) or with adapters of peft.
        text: a SOURCE for perplexity; of one with splits, its test split. None is ``wikitext2``, or no text at all if
            only tasks are asked for.
        seqlen: tokens of a window; None is min(2048, context).
        windows: how many windows; None is all.
        against: the dense model, asked the same: adds KL divergence, top-1 agreement and the distance by block.
        tasks: of lm-eval, such as ``arc_easy``.
        task_data: directory of ``TASK.validation.jsonl`` files in place of the hub's data sets.
        batch_size: questions at once.
        limit: questions of each task; None is all.
        num_fewshot: solved examples before each question; None is the task's own number.
        generations: how many texts the model goes on with.
        device: where to compute.
        record: append the result to ``evaluations.jsonl`` if the model is a directory that Secateur wrote.
        trust_remote_code: let Python code that comes with the model run.
        tokenizer: in place of the model's own.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Returns:
        text, seqlen, windows, tokens, available_tokens, loss and perplexity; as asked for: fidelity, against, tasks,
        generations (docs/json.md).

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    progress = progress or terminal_progress(lines=False)
    in_memory = None if is_path(model) else model_in_memory(model)
    asked = task_options(tasks, task_data, batch_size, limit, num_fewshot)
    only_tasks = asked is not None and text is None and against is None and not generations
    if only_tasks and (seqlen is not None or windows is not None):
        raise OptionError("seqlen and windows are of a text; name one, such as --text wikitext2")
    questions = Questions(None if only_tasks else text or DEFAULT_TEXT, seqlen, windows, asked, generations)
    questions.check()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if in_memory is not None:
            refuse_prompts(model)
            if against is not None or asked or generations:
                raise OptionError("a live model: only its perplexity can be measured; save it and give its directory")
            return _evaluate_live(in_memory, questions, folder, trust_remote_code, tokenizer, progress)
        host = stack.enter_context(opened(model, device, trust_remote_code))
        tokens = read_windows(host, questions, tokenizer)
        dense: tuple[dict[str, Any], Reading | None] = ({}, None)
        if against is not None:
            other = stack.enter_context(opened(against, device, trust_remote_code))
            theirs = read_windows(other, questions, tokenizer)
            if tokens and theirs:
                check_same_tokens(theirs, tokens)
            dense = answer(other, questions, theirs, folder / "dense", progress, keep=True)
        found, _ = answer(host, questions, tokens, folder / "model", progress, dense=dense[1])
        if against is not None:
            found["against"] = {"model": str(against), **dense[0]}
        if record:
            note_evaluation(host.checkpoint.directory, found)
        return found


def task_options(
    tasks: Sequence[str], data: str | Path | None, batch_size: int, limit: int | None, shots: int | None
) -> TaskOptions | None:
    """Put together what is asked of tasks; None without any.

    Raises:
        OptionError: options of tasks without a task.
    """
    if not tasks:
        if data is not None or limit is not None or shots is not None:
            raise OptionError("task_data, limit and num_fewshot are for tasks; name some, such as --tasks arc_easy")
        return None
    return TaskOptions(tuple(tasks), None if data is None else Path(data), batch_size, limit, shots)


def _evaluate_live(
    model: PreTrainedModel,
    questions: Questions,
    folder: Path,
    trust_remote_code: bool,
    tokenizer: Any,
    progress: Progress,
) -> dict[str, Any]:
    refuse_quantised(model)
    words = tokenizer or load_tokenizer(model.name_or_path, trust_remote_code)
    assert questions.text is not None
    tokens = evaluation_windows(questions.text, words, model.config, questions.seqlen, questions.windows)
    with eager(model), (host := LiveHost(model)).borrowed():
        return perplexity(Reading(host, tokens, folder), progress)


@undisturbed
def inspect(model: str | Path, *, trust_remote_code: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Look at a checkpoint's matrices: shape, sparsity, pattern, format, bytes.

    Args:
        model: directory, hub id, ``.gguf`` file or ``smollm2``.
        trust_remote_code: let Python code that comes with the model run.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    with opened(model, "cpu", trust_remote_code) as host:
        return inspect_matrices(host, progress or terminal_progress(lines=False))


@undisturbed
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
        directory = as_checkpoint(locate(model_name(model), trust_remote_code), Path(scratch))
        return continue_text(directory, prompt, tokens, choose_device(device), trust_remote_code=trust_remote_code)


@undisturbed
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
    names = [model_name(name) for name in (model, against) if name is not None]
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
            note_evaluation(places[0], {"bench": found})
        return found
