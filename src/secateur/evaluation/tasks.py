"""Zero-shot and few-shot tasks, asked through lm-eval: its questions, its metrics, its standard errors.

lm-eval fetches its data sets from the hub; offline their rows come from files (task_files.py).
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any

import numpy
import torch

from ..errors import DataError, NumericsError, OptionError, SecateurError, nearest
from ..models.source import first_line, load_model, load_tokenizer, open_checkpoint
from ..pipeline.machine import alone
from ..progress import Progress, Silent
from .quiet import quiet
from .task_files import give_rows

INSTALL = "pip install 'secateur[eval]'"
SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "shots": 1234}  # lm-eval's own
RESAMPLES = 1000  # for the standard error of a metric that is no mean; lm-eval's 100000 take minutes


@dataclass(frozen=True)
class TaskOptions:
    """What a model is asked.

    Attributes:
        names: tasks, groups or tags as lm-eval names them.
        data: a directory with files ``TASK.SPLIT.jsonl``; None is the hub.
        batch_size: how many questions are answered at once.
        limit: only the first so many questions of each task.
        shots: solved examples before each question; None is the task's own number.
    """

    names: tuple[str, ...]
    data: Path | None = None
    batch_size: int = 8
    limit: int | None = None
    shots: int | None = None

    def check(self) -> None:
        """Refuse, before any model is opened, what cannot be asked.

        Raises:
            OptionError: lm-eval is not installed or does not know a task, or a number makes no sense.
            DataError: the directory lacks a task's file, or a file lacks what the task reads.
        """
        self.check_options()
        if self.data is not None:
            with _seeded():
                _read(self, Silent())

    def check_options(self) -> None:
        """The part of `check` that reads no data."""
        numbers: dict[str, tuple[Any, int]] = {
            "batch size": (self.batch_size, 1),
            "limit": (self.limit, 1),
            "num-fewshot": (self.shots, 0),
        }
        for what, (value, least) in numbers.items():
            if value is not None and (type(value) is not int or value < least):
                raise OptionError(f"{what} {value}: give a whole number of at least {least}")
        if importlib.util.find_spec("lm_eval") is None:
            raise OptionError(f"tasks: lm-eval, which asks them, is not installed; {INSTALL}")
        if not self.names or "" in self.names:
            raise OptionError("tasks: name at least one, such as arc_easy,piqa, and no empty one")
        known = _known_tasks().task_index
        for name in self.names:
            if name not in known:
                raise OptionError(f"task {name!r}: lm-eval has no such task; {nearest(name, known)}")


def measure_tasks(
    directory: Path, options: TaskOptions, device: torch.device, progress: Progress, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Ask a model, dense or packed, the questions of tasks.

    A question that is longer than the model's context loses its beginning, as lm-eval does it.

    Returns:
        library, dtype, batch_size, limit, mean (of acc over the tasks; None if one has none), and the results: for
        each task its version, shots, number of questions, origin of its data, and metrics with standard errors.

    Raises:
        OptionError: what is asked for cannot be asked.
        DataError: a task's data cannot be had or used, or the model has no tokenizer.
        ModelError: the model cannot be opened.
        NumericsError: the model's answers are not finite.
    """
    options.check_options()
    open_checkpoint(directory, trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code)
    if tokenizer is None:
        raise DataError(f"{directory}: has no tokenizer, so it cannot read a question")
    with _seeded():
        tasks = _read(options, progress)
        model = load_model(directory, torch.float32 if device.type == "cpu" else "auto", trust_remote_code)
        model.to(device).eval()
        found = _ask(model, tokenizer, tasks, options, progress)
    results = [_result(name, task, found) for name, task in tasks.items()]
    accuracies = [result["metrics"].get("acc", {}).get("value") for result in results]
    return {
        "library": f"lm-eval {import_module('lm_eval').__version__}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": options.batch_size,
        "limit": options.limit,
        "results": results,
        "mean": None if None in accuracies else sum(accuracies) / len(accuracies),
    }


def _result(name: str, task: Any, found: Any) -> dict[str, Any]:
    return {
        "task": name,
        "version": found["versions"][name],
        "shots": found["n-shot"][name],
        "questions": found["n-samples"][name]["effective"],
        "data": task.DATASET_PATH,
        "metrics": _metrics(found["results"][name]),
    }


def _metrics(found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """``{"acc,none": 0.4, "acc_stderr,none": 0.1}`` -> ``{"acc": {"value": 0.4, "stderr": 0.1}}``."""
    metrics = {}
    for key, value in found.items():
        metric, comma, filter = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = found.get(f"{metric}_stderr,{filter}")
            metrics[metric if filter == "none" else key] = {"value": _number(value), "stderr": _number(stderr)}
    return metrics


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


@cache
def _known_tasks() -> Any:
    """lm-eval's index of its tasks, which takes seconds to make."""
    with quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def _read(options: TaskOptions, progress: Progress) -> dict[str, Any]:
    """Return lm-eval's tasks, groups and tags resolved, with their data."""
    known = _known_tasks()
    tasks: dict[str, Any] = {}
    progress.start("reading tasks", len(options.names))
    for name in options.names:
        try:
            with quiet(), _data_of(options):
                tasks |= known.load([name])["tasks"]
        except SecateurError:
            raise
        except ImportError as error:
            raise OptionError(f"task {name}: needs a Python package ({first_line(error)}); install it") from None
        except Exception as error:  # whatever the hub, the network or a task's own code raises
            what = f"{type(error).__name__}: {first_line(error)[:160]}"
            if options.data is not None:
                raise DataError(f"task {name}: lm-eval cannot set it up ({what})") from None
            raise DataError(
                f"task {name}: its data cannot be had from the hub ({what}); give files of it with --task-data"
            ) from None
        progress.advance(note=name)
    progress.finish()
    for name, task in tasks.items():
        for flag, why in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "asks about images")):
            if getattr(task, flag, False):
                raise OptionError(f"task {name}: {why}, which is not supported; leave it out")
        task.set_config("num_fewshot", _shots(options, task.config))
        task.set_fewshot_seed(SEEDS["shots"])
    return tasks


def _shots(options: TaskOptions, config: Any) -> int:
    """How many shots a task gets: one that fixes them at 0 keeps to it, as lm-eval has it."""
    own = config.num_fewshot
    return int(own or 0) if options.shots is None or own == 0 else options.shots


@contextmanager
def _data_of(options: TaskOptions) -> Iterator[None]:
    """While tasks are made, let files take the place of what they would download."""
    if options.data is None:
        yield
        return
    folder = options.data
    if not folder.is_dir():
        raise DataError(f"{folder}: no such directory")
    tasks: Any = import_module("lm_eval.api.task").ConfigurableTask
    download = tasks.download
    tasks.download = lambda task, *args, **ignored: give_rows(task, folder, _shots(options, task.config), options.limit)
    try:
        yield
    finally:
        tasks.download = download


def _ask(model: Any, tokenizer: Any, tasks: dict[str, Any], options: TaskOptions, progress: Progress) -> Any:
    """Return what lm-eval finds."""
    with quiet():
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
        lm.set_cache_hook(_Answers(progress))
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, kind, _announced(getattr(lm, kind), ", ".join(options.names), progress))
        try:
            return evaluate(lm, {"tasks": tasks}, limit=options.limit, bootstrap_iters=RESAMPLES, log_samples=False)
        except AssertionError as error:  # how lm-eval says that something does not fit
            what = first_line(error)[:200] or "an answer is longer than the model's context"
            raise OptionError(f"tasks {', '.join(options.names)}: cannot be asked of this model ({what})") from None


class _Answers:
    """Stands where lm-eval would store answers, and hears of each as soon as it is there."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def add_partial(self, kind: str, request: tuple[Any, ...], answer: Any) -> None:
        likelihood = answer[0] if kind == "loglikelihood" else answer
        if isinstance(likelihood, float) and not math.isfinite(likelihood):
            raise NumericsError("the model's predictions hold NaN or Inf; its weights are damaged")
        self.progress.advance(_length(request))


def _announced(answer: Callable[..., Any], names: str, progress: Progress) -> Callable[..., Any]:
    """Let progress know how much is asked before it is."""

    def announced(requests: list[Any]) -> Any:
        progress.start(f"asking {names}", sum(_length(request.args) for request in requests))
        answers = answer(requests)
        progress.finish()
        return answers

    return announced


def _length(request: tuple[Any, ...]) -> int:
    """Characters to be read: what an answer takes grows with them."""
    return sum(len(part) for part in request if isinstance(part, str))


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed every generator that a task may draw from, and leave them all as they were."""
    with alone(), torch.random.fork_rng():
        python, arrays = random.getstate(), numpy.random.get_state()
        random.seed(SEEDS["python"])
        numpy.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)
