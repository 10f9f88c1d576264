"""Gradual pruning: sparsity rises while the model trains, so that it can make up for each little loss.

Zhu and Gupta 2017, "To prune, or not to prune", https://arxiv.org/abs/1710.01878. As there, what is pruned stays
pruned. Unlike there, any score serves, and any pattern: a mask is the pattern's choice among the weights that are left.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ModelError, NumericsError, OptionError
from ..models.in_memory import eager, model_in_memory, refuse_adapters
from ..models.live_host import LiveHost
from ..models.matrices import Matrix, watching
from ..pipeline.plan import Request, make_plan
from ..pruning import SUMSQ, Method, Statistics, Target, parse_pattern
from ..pruning.allocation import Rules, check_sparsity, default_target
from ..pruning.methods import Score
from ..pruning.statistics import Accumulator
from .masks import Masks, model_matrices
from .schedules import on_the_way, parse_schedule

log = logging.getLogger("secateur")

SUMS = "secateur_inputs.safetensors"  # beside a trainer's checkpoint: what scores have seen since the last new mask


class Gradual:
    """The rising masks of one model in training."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        steps: int,
        final: float | None = None,
        initial: float = 0.0,
        schedule: str = "cubic",
        every: int = 1,
        method: str | Method = "magnitude",
        pattern: str | None = None,
        allocation: str | Rules = "uniform",
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
    ) -> None:
        """Resolve what `secateur.gradual` documents for one model.

        Raises:
            SecateurError: an option cannot be carried out.
        """
        request = Request(
            method=method, sparsity=final, pattern=pattern, allocation=allocation,
            include=include, exclude=exclude,
        )  # fmt: skip
        request.check()
        self.method, self.score = request.parsed_method, scored(request.parsed_method, steps)
        check_course(request, steps, initial, every)
        refuse_adapters(model)
        self.model, self.masks = model_in_memory(model), Masks.of_matrices(model)
        with eager(self.model):
            facts = {"name": self.model.name_or_path, "digest": None}
            plan = make_plan(request, LiveHost(self.model), facts, None)
        self.targets: dict[str, Target] = {n: t for n, t in plan.job.targets.items() if t.sparsity}
        self.matrices: dict[str, Matrix] = {n: m for n, m in model_matrices(model).items() if n in self.targets}
        self.initial, self.schedule, self.every = initial, parse_schedule(schedule), every
        self.last = (steps - 1) // every * every  # the step before which the final masks are set
        self._sums = {name: Accumulator(self.method.needs) for name in self.matrices}
        self._seen: dict[str, Statistics] = {}
        self._real_BT: Tensor | None = None  # which positions of the batch are no padding

    def watched(self) -> ExitStack:
        """Watch the inputs that scores need while this context is open."""
        stack = ExitStack()
        if self.method.needs:
            stack.enter_context(watching(self.matrices, self._see))
            hook = self.model.register_forward_pre_hook(self._mind_padding, with_kwargs=True)
            stack.callback(hook.remove)
        return stack

    def _mind_padding(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._real_BT = kwargs.get("attention_mask")

    def _see(self, inputs: Mapping[str, Tensor]) -> None:
        if not torch.is_grad_enabled():  # those of an evaluation
            return
        for name, x in inputs.items():
            padded = self._real_BT is not None and self._real_BT.shape == x.shape[:-1]
            self._sums[name].add(x[self._real_BT.bool()] if padded and self._real_BT is not None else x)

    def before(self, step: int) -> bool:
        """Set the masks that hold from `step` (counted from 0) on, if new ones are due; return whether they were."""
        if step > self.last or step % self.every:
            return False
        progress = self.schedule(step / self.last) if 0 < step < self.last else float(step == self.last)
        found = {name: self._statistics(name) for name in self.targets}
        if step and not any(found.values()):
            raise ModelError(
                f"no matrix saw an input in {step} steps; code that torch compiled before shows none: call "
                "torch._dynamo.reset() first, or take method magnitude"
            )
        if step == self.last and (unseen := [name for name, statistics in found.items() if statistics is None]):
            others = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
            log.warning("%s%s: saw no input in training; pruned by magnitude", unseen[0], others)
            found |= {name: Statistics(1, None, self._ones(name)) for name in unseen}
        for name, statistics in found.items():
            target = on_the_way(self.targets[name], self.initial, progress)
            if target.sparsity and statistics:
                self._prune(name, target, statistics)
        return True

    def _statistics(self, name: str) -> Statistics | None:
        """What a matrix's inputs were since its last mask, or before, if none came since; None if none ever came."""
        found = self._sums[name].statistics()
        if found.tokens or not self.method.needs:
            self._seen[name] = found
            self._sums[name] = Accumulator(self.method.needs)
        return self._seen.get(name)

    def _ones(self, name: str) -> Tensor:
        matrix = self.matrices[name]
        return torch.ones(matrix.shape[1], dtype=torch.float64, device=matrix.weight.device)

    @torch.no_grad()
    def _prune(self, name: str, target: Target, statistics: Statistics) -> None:
        matrix = self.matrices[name]
        kept_OI, score_OI = self.masks.keep(matrix), self.score(matrix.read(), statistics)
        if not torch.isfinite(score_OI.sum()):
            raise NumericsError(
                f"{name}: the scores hold NaN or Inf; did the training diverge? Lower the learning rate"
            )
        # What is pruned already goes first, before any weight that is left, however little that matters.
        tiny = torch.finfo(torch.float32).tiny
        ranked_OI = torch.where(kept_OI, score_OI.clamp_min(tiny), 0)
        self.masks.set(matrix, target.pattern.mask(ranked_OI, target.sparsity) & kept_OI)

    def save(self, folder: Path) -> None:
        """Keep, beside a trainer's checkpoint, what scores have seen."""
        tensors: dict[str, Tensor] = {}
        for when, kept in (("now", {n: s.statistics() for n, s in self._sums.items()}), ("before", self._seen)):
            for name, sums in kept.items():
                if sums.sumsq_I is not None:
                    tensors[f"{when}:{name}"] = sums.sumsq_I
                    tensors[f"{when}:{name}:tokens"] = torch.tensor(sums.tokens)
        if tensors:
            save_file(tensors, folder / SUMS)

    def load(self, folder: Path) -> None:
        """Take up what `save` kept, if anything."""
        if (folder / SUMS).is_file():
            kept = load_file(folder / SUMS, device=str(next(self.model.parameters()).device))
            for name, sums in self._sums.items():
                if f"now:{name}" in kept:
                    sums.take(Statistics(int(kept[f"now:{name}:tokens"]), None, kept[f"now:{name}"]))
                if f"before:{name}" in kept:
                    self._seen[name] = Statistics(int(kept[f"before:{name}:tokens"]), None, kept[f"before:{name}"])


def scored(method: Method, steps: int) -> Score:
    """Return the score of a method that can prune gradually in so many steps.

    Raises:
        OptionError: it changes the weights that it keeps, or its score needs more than running sums, or any inputs
            where there are none before the last mask.
    """
    if steps == 1 and method.needs:
        raise OptionError("steps 1: this score needs the inputs of a step before the last mask; use magnitude")
    if method.score is None or method.needs - {SUMSQ}:
        raise OptionError(
            "gradual pruning takes a score, and training does the rest: use magnitude, wanda or ria, or prune in "
            "rounds with any method"
        )
    return method.score


def check_course(request: Request, steps: int, initial: float, every: int = 1) -> None:
    """Raise OptionError for a course that cannot be followed."""
    method = request.parsed_method
    final = default_target(request.sparsity, parse_pattern(request.pattern or method.pattern)).sparsity
    if steps < 1:
        raise OptionError(f"steps {steps}: at least 1 is needed")
    if every < 1 or (every >= steps and every > 1):
        raise OptionError(f"every {every}: new masks come every so many of {steps} steps, at least twice; give fewer")
    if check_sparsity(initial, "initial") > final:
        raise OptionError(f"initial {initial:g}: is more than the {final:g} that is wanted in the end")


def gradual(
    model: PreTrainedModel,
    final: float | None = None,
    *,
    initial: float = 0.0,
    steps: int,
    schedule: str = "cubic",
    every: int = 1,
    method: str | Method = "magnitude",
    pattern: str | None = None,
    allocation: str | Rules = "uniform",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
) -> Iterator[int]:
    """Prune a model while your own loop trains it: ``for step in secateur.gradual(...): train_step(model)``.

    Before each step the masks are those of ``initial + (final - initial) f(step / (steps - 1))``, with f the schedule;
    after it, masked weights are zero again. Once the loop is over, exactly `final` is pruned. A score of inputs has
    seen none before the first step, so its first masks come with the second.

    Args:
        model: in memory, pruned in place; zeros that it has are kept. It may be wrapped (torch.compile, DDP).
        final: fraction of weights removed at the end; None is 0.5, or what an N:M pattern implies.
        initial: fraction removed at the first step.
        steps: how many steps the loop takes.
        schedule: ``cubic`` (Zhu and Gupta), ``linear`` or ``one-cycle``.
        every: new masks come every so many steps; the last before the last multiple of it.
        method: ``magnitude``, or a score of inputs (``wanda``, ``ria``), which are watched while the model trains.
        pattern: ``row``, ``matrix``, ``N:M``, ``block:RxC``; None is the method's own. Under N:M, M - 1 of M weights
            are kept first, then M - 2, down to N.
        allocation: as in `secateur.prune`.
        include: expressions; only matrices in whose name one is found.
        exclude: expressions; no matrix in whose name one is found.

    Yields:
        The number of the step, from 0.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    course = Gradual(
        model, steps=steps, final=final, initial=initial, schedule=schedule, every=every, method=method,
        pattern=pattern, allocation=allocation, include=include, exclude=exclude,
    )  # fmt: skip

    def loop() -> Iterator[int]:
        with course.watched(), course.masks.held():
            for step in range(steps):
                course.before(step)
                yield step

    return loop()
