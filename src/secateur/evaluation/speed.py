"""How fast a model is and how much it takes: bytes on disk, resident memory, tokens per second."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, OptionError
from ..models.source import open_checkpoint, read_config
from ..pipeline.calibration import context_length
from ..pipeline.machine import free_memory_bytes, processor, software
from ..progress import Progress
from ..runtime.arrangement import PREFERENCES


@dataclass(frozen=True)
class Measurement:
    """What is measured, and how.

    Attributes:
        batches: how many sequences at once, in turn.
        prompt: tokens of each sequence before the first new one.
        tokens: new tokens of each sequence.
        rounds: how often everything is run; one more goes before, to warm up.
        threads: to compute with.
        prefer: of packed models, ``speed``, ``memory`` or None (runtime/arrangement.py).
        activations: of packed models, ``int8`` or None.
    """

    batches: Sequence[int]
    prompt: int
    tokens: int
    rounds: int
    threads: int
    prefer: str | None = None
    activations: str | None = None

    def check(self) -> None:
        """Raise OptionError for numbers with which nothing can be measured."""
        for name, value in (("prompt", self.prompt), ("rounds", self.rounds), ("threads", self.threads)):
            if value < 1:
                raise OptionError(f"{name} {value}: must be at least 1")
        if self.tokens < 2:
            raise OptionError(f"tokens {self.tokens}: must be at least 2, one to end the prefill and one to decode")
        if self.prefer not in (None, *PREFERENCES):
            raise OptionError(f"prefer {self.prefer!r}: use {' or '.join(PREFERENCES)}")
        if self.activations not in (None, "int8"):
            raise OptionError(f"activations {self.activations!r}: use int8, or leave it out")
        if not self.batches or min(self.batches) < 1:
            raise OptionError("batch: give whole numbers of at least 1, such as 1,8")


def measure_speed(
    models: Sequence[tuple[str, Path]], measurement: Measurement, progress: Progress, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Time models in turn, each in a process of its own, on the same prompt and threads.

    A dense model is run in float32 and in bfloat16 by plain transformers, and counts as the faster at decoding; a
    packed one is run in the dtype that it is stored in.

    Returns:
        The conditions (processor, threads, prompt, …), and for each model its numbers (docs/json.md).

    Raises:
        ModelError: a model cannot be opened, or cannot be run at all.
        OptionError: numbers with which nothing can be measured.
    """
    measurement.check()
    with ExitStack() as stack:
        found = [_runs_of(name, directory, measurement, trust_remote_code) for name, directory in models]
        for runs in found:
            for run in runs:
                run.start(stack)
            if all(run.error for run in runs):
                raise ModelError(f"{runs[0].name}: cannot be timed ({runs[0].error})")
        alive = [run for runs in found for run in runs if run.error is None]
        rounds = measurement.rounds + 1
        progress.start("timing", rounds * len(alive) * len(measurement.batches))
        for number in range(rounds):
            for batch in measurement.batches:
                for run in alive:
                    run.time(batch, measurement, keep=number > 0)
                    progress.advance(note=f"{run.name}, batch {batch}")
        progress.finish()
    return {
        "processor": processor(),
        "threads": measurement.threads,
        "prompt": measurement.prompt,
        "tokens": measurement.tokens,
        "rounds": measurement.rounds,
        "software": software(),
        "models": [_summary(runs, measurement) for runs in found],
    }


# With our own path: `python -m` would look for modules in the working directory first, which may be a model's.
WORKER = "import sys; sys.path[:] = sys.argv[2:]; from secateur.evaluation.speed_worker import main; main()"


class _Run:
    """A model in one dtype, and the process that holds it."""

    def __init__(self, name: str, bytes: int, needs: float, options: dict[str, Any]) -> None:
        self.name, self.bytes, self.needs, self.options = name, bytes, needs, options
        self.error: str | None = None
        self.loaded: dict[str, Any] = {}
        self.seconds: dict[int, dict[str, list[float]]] = {}

    def start(self, stack: ExitStack) -> None:
        """Load the model, if there is memory for it."""
        free = free_memory_bytes(torch.device("cpu"))
        if self.needs > free:
            self.error = f"takes about {self.needs / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            return
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(self.options), *sys.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
        )  # fmt: skip
        stack.callback(self._stop)
        self.loaded = self._answer()

    def time(self, batch: int, measurement: Measurement, keep: bool) -> None:
        """Let it generate once, unless it failed before."""
        if self.error is not None:
            return
        assert self._process.stdin is not None
        request = {"batch": batch, "prompt": measurement.prompt, "tokens": measurement.tokens}
        with suppress(OSError):  # a process that has died has no answer either
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        if keep and not self.error:
            seconds = self.seconds.setdefault(batch, {"prefill": [], "decode": []})
            seconds["prefill"].append(answer["prefill"])
            seconds["decode"].append(statistics.median(answer["decode"]))

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line) if line else {"error": "its process was killed; out of memory?"}
        except ValueError:
            answer = {"error": f"its process answered {line.strip()[:80]!r}"}
        self.error = answer.get("error")
        return answer

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what could not be sent to a dead process
                pipe.close()  # type: ignore[union-attr]


def _runs_of(name: str, directory: Path, measurement: Measurement, trust_remote_code: bool) -> list[_Run]:
    checkpoint = open_checkpoint(directory, trust_remote_code)
    context = context_length(read_config(directory, trust_remote_code))
    length = measurement.prompt + measurement.tokens
    if context is not None and length > context:
        raise OptionError(
            f"prompt {measurement.prompt}: {length} with the new tokens, but {name}'s context has {context}"
        )
    packed = bool(checkpoint.packed)
    weights = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    options = {
        "directory": str(directory), "packed": packed, "threads": measurement.threads, "prefer": measurement.prefer,
        "activations": measurement.activations, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    if packed:
        return [_Run(name, checkpoint.bytes, 2 * checkpoint.bytes, {**options, "dtype": "auto"})]
    return [
        _Run(name, checkpoint.bytes, weights * size, {**options, "dtype": dtype})
        for dtype, size in (("float32", 4), ("bfloat16", 2))
    ]


def _summary(runs: Sequence[_Run], measurement: Measurement) -> dict[str, Any]:
    """One model's numbers: those of the run that decodes the smallest batch fastest."""
    timed = [run for run in runs if run.seconds]
    if not timed:
        raise ModelError(f"{runs[0].name}: cannot be timed ({runs[0].error})")
    best = min(  # one that died half-way only if all did
        timed, key=lambda run: (run.error is not None, statistics.median(run.seconds[min(run.seconds)]["decode"]))
    )
    speeds = {run.options["dtype"]: _speeds(run, measurement) for run in timed}
    return {
        "name": best.name,
        "dtype": best.loaded["dtype"],
        "bytes": best.bytes,
        "resident_bytes": best.loaded["resident_bytes"],
        "arrangement": best.loaded["arrangement"],
        "speeds": speeds[best.options["dtype"]],
        "other_dtypes": {dtype: found for dtype, found in speeds.items() if dtype != best.options["dtype"]},
        "not_measured": {run.options["dtype"]: run.error for run in runs if run.error},
    }


def _speeds(run: _Run, measurement: Measurement) -> list[dict[str, Any]]:
    """Tokens per second for each batch size: of the median run, and of the slowest and the fastest."""
    found = []
    for batch, seconds in run.seconds.items():
        row: dict[str, Any] = {"batch": batch}
        for what, tokens in (("prefill", batch * measurement.prompt), ("decode", batch)):
            taken = seconds[what]
            row[what] = {
                "median": tokens / statistics.median(taken),
                "slowest": tokens / max(taken),
                "fastest": tokens / min(taken),
            }
        found.append(row)
    return found
