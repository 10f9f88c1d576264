"""Named allocations -> rules: what they follow from is measured of the dense model, one block in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..errors import NumericsError, OptionError
from ..models.hosts import Host, block_matrices
from ..models.matrices import Matrix
from ..progress import Progress
from ..pruning import NM, SUMSQ, Statistics, Target, allocate, depth, mean_sparsity, parse_pattern
from ..pruning.allocation import MOST, Rule, default_target
from .calibration import Tokens
from .masked import MaskedReader
from .observation import Observer, at_once
from .plan import Plan, Request, make_plan
from .reconstruct import with_enough_tokens
from .rules import allocation_name
from .run_directory import RunDirectory, differences, report_of
from .stream import Stream

KL_ROWS = 8  # the last calibration rows, on which slopes are compared
MASK_TOKENS = 16384  # of the first calibration rows, from which Wanda's masks follow while slopes are compared
FIRST_SLOPE = 0.1
LEAST_STEP = 0.01  # between slopes
MOST_SLOPES = 6

Seen = Mapping[str, Statistics]
T = TypeVar("T")


def with_allocation(
    request: Request,
    host: Host,
    model: Mapping[str, Any],
    tokens: Tokens | None,
    folder: Path,
    known: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> Request:
    """Return the request with the rules that its allocation's name stands for, how they were found and in what time.

    Args:
        request: the options; one without a name comes back as it is.
        host: the dense model.
        model: name and digest, as for `make_plan`.
        tokens: the calibration tokens, if the method or the allocation needs them.
        folder: where hidden states may lie meanwhile; removed at the end.
        known: plans of earlier runs; one that differs in nothing else has the rules already.
        progress: hears of the work.

    Raises:
        OptionError: the allocation cannot be made for this model.
        NumericsError: NaN or Inf in weights or inputs.
    """
    name = allocation_name(request.allocation)
    if name is None:
        return request
    enough = with_enough_tokens(request.reconstruction, tokens.rows if tokens else ())
    request = replace(request, reconstruct=enough or False)  # plans are made twice, and this is said once
    plan = make_plan(replace(request, allocation="uniform"), host, model, tokens)
    for former in known:
        if _same_but_allocation(former, plan.record, name):
            return replace(request, allocation=former["allocation"], allocation_found=former["allocation_found"])
    started = time.perf_counter()
    try:
        rules, found = _Finder(plan, host, tokens, folder, progress).find(name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    spent = time.perf_counter() - started
    return replace(request, allocation=rules, allocation_found=found, allocation_seconds=spent)


def known_plans(run: RunDirectory, overwrite: bool) -> list[dict[str, Any]]:
    """The plans of an earlier run that was not finished, and of the finished output unless it is to be replaced."""
    try:
        unfinished: Any = json.loads((run.path / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        unfinished = None
    finished = None if overwrite else (report_of(run.output) or {}).get("plan")
    return [plan for plan in (unfinished, finished) if isinstance(plan, dict)]


def _same_but_allocation(former: Mapping[str, Any], plan: Mapping[str, Any], name: str) -> bool:
    found = former.get("allocation_found")
    if not isinstance(found, dict) or found.get("name") != name:
        return False
    theirs = {key: former.get(key) for key in ("allocation", "allocation_found")}
    return not differences(former, {**plan, **theirs})


class _Finder:
    """Finds the rules for a plan that is uniform so far."""

    def __init__(self, plan: Plan, host: Host, tokens: Tokens | None, folder: Path, progress: Progress) -> None:
        self.plan, self.host, self.tokens, self.folder, self.progress = plan, host, tokens, folder, progress
        self.default = default_target(plan.record["sparsity"], parse_pattern(plan.record["pattern"]))
        self.blocks = sorted({m.block for m in plan.matrices})
        self.weights = [sum(m.weights for m in plan.matrices if m.block == index) for index in self.blocks]

    def find(self, name: str) -> tuple[dict[str, Rule], dict[str, Any]]:
        """Return the rules, and how they were found; one block alone can only have the target itself."""
        finders = {"linear": self._linear, "owl": self._owl, "alpha": self._alpha}
        rules, found = finders[name]() if len(self.blocks) > 1 else (self._rules([self.default.sparsity]), {})
        return rules, {"name": name, "mean": mean_sparsity(self.plan.matrices, self._targets(rules)), **found}

    def _rules(self, sparsities: Sequence[float]) -> dict[str, Rule]:
        values: Sequence[Rule] = [round(sparsity, 6) for sparsity in sparsities]
        if isinstance(self.default.pattern, NM):
            values = [str(pattern) for pattern in depth.as_levels(sparsities, self.weights, self.default.pattern)]
        return dict(zip(map(str, self.blocks), values, strict=True))

    def _targets(self, rules: Mapping[str, Rule]) -> dict[str, Target]:
        return allocate(self.plan.matrices, self.default, rules)

    def _chosen(self, index: int) -> dict[str, Matrix]:
        names = {m.name for m in self.plan.matrices}
        return {name: matrix for name, matrix in block_matrices(self.host, index).items() if name in names}

    def _alpha(self) -> tuple[dict[str, Rule], dict[str, Any]]:
        values: list[float | None] = []
        self.progress.start("allocating", len(self.plan.matrices))
        for index in self.blocks:
            with self.host.block(index):
                exponents = []
                for matrix in self._chosen(index).values():
                    exponents.append(_named(matrix.name, depth.tail_exponent, matrix.read()))
                    self.progress.advance()
            finite = [value for value in exponents if math.isfinite(value)]
            values.append(sum(finite) / len(finite) if finite else None)
        self.progress.finish()
        rules = self._rules(depth.alpha(_filled(values), self.weights, self.default.sparsity))
        return rules, {"eps": depth.EPS, "measured": dict(zip(map(str, self.blocks), values, strict=True))}

    def _owl(self) -> tuple[dict[str, Rule], dict[str, Any]]:
        def ratio(index: int, chosen: Mapping[str, Matrix], seen: Seen) -> float | None:
            pairs = [(chosen[name].read(), statistics) for name, statistics in seen.items()]
            return _named(f"block {index}", depth.outlier_ratio, pairs) if pairs else None

        assert self.tokens is not None
        values = self._in_dense_pass(self.tokens.rows, ratio)
        rules = self._rules(depth.owl(_filled(values), self.weights, self.default.sparsity))
        measured = dict(zip(map(str, self.blocks), values, strict=True))
        return rules, {"times": depth.OUTLIER, "lam": depth.LAM, "measured": measured}

    def _linear(self) -> tuple[dict[str, Rule], dict[str, Any]]:
        """Seek the slope whose predictions are nearest to the dense model's.

        Every block is masked by Wanda with the dense model's statistics, whatever method prunes later.
        """
        assert self.tokens is not None
        target, rows = self.default.sparsity, self.tokens.rows[-KL_ROWS:]
        ends = accumulate(map(len, self.tokens.rows))
        few = [row for row, end in zip(self.tokens.rows, ends, strict=True) if end - len(row) < MASK_TOKENS]
        statistics = {n: s for seen in self._in_dense_pass(few, lambda i, chosen, seen: seen) for n, s in seen.items()}
        reader = MaskedReader(self.host, rows, statistics, self.folder / "masked", self.progress)
        known: dict[tuple[Rule, ...], float] = {}

        def rules(slope: float) -> dict[str, Rule]:
            return self._rules(depth.linear(self.weights, target, slope))

        def measure(slopes: Sequence[float]) -> list[float]:
            """Measure each distinct model once: under N:M several slopes may make the same one."""
            keys = [tuple(rules(slope).values()) for slope in slopes]
            new = {key: rules(slope) for key, slope in zip(keys, slopes, strict=True) if key not in known}
            found = reader.divergences([self._targets(its) for its in new.values()]) if new else []
            known.update(zip(new, found, strict=True))
            return [known[key] for key in keys]

        if isinstance(self.default.pattern, NM):  # whose levels are far apart: a small slope would move nothing
            largest = min(target, 1 - target)
            tried = search_slopes(measure, largest, largest / 2)
        else:
            tried = search_slopes(measure, min(target, max(MOST - target, 0.0)))
        best = best_slope(tried)
        slopes = [{"slope": s, "kl": kl if math.isfinite(kl) else None} for s, kl in tried.items()]
        return rules(best), {"slope": best, "rows": len(rows), "tokens": sum(map(len, rows)), "slopes": slopes}

    def _in_dense_pass(
        self, rows: Sequence[Tensor], measure: Callable[[int, Mapping[str, Matrix], Seen], T]
    ) -> list[T]:
        """Run token ids through the dense model; return what `measure` says of each block to be pruned.

        Args:
            rows: the token ids.
            measure: called with a resident block's index, its matrices and the statistics of those that were reached.

        Raises:
            OptionError: no matrix was reached in any block.
        """
        stream = Stream(self.host, rows, self.folder / "dense")
        count, found, reached = len(self.host.skeleton.real), [], False
        self.progress.start("allocating", count * len(stream.batches))
        for index in range(count):
            with self.host.block(index) as block:
                chosen = {name: m for name, m in self._chosen(index).items() if name in stream.observable}
                observer = Observer(chosen, {SUMSQ})
                for _ in at_once(stream, index, block, observer, self.progress):
                    pass
                seen = {name: observer.statistics(name) for name in chosen if observer.seen(name)}
                reached |= bool(seen)
                if index in self.blocks:
                    found.append(measure(index, chosen, seen))
        self.progress.finish()
        stream.close()
        if not reached:
            raise OptionError(
                "no input of the matrices to be pruned is seen during calibration, and this allocation follows from "
                "them; use allocation alpha or uniform"
            )
        return found


def search_slopes(
    measure: Callable[[Sequence[float]], Sequence[float]], largest: float, first: float = FIRST_SLOPE
) -> dict[float, float]:
    """Seek the slope of least divergence in at most 6 measurements: steps from the best so far, halved where it stays.

    Args:
        measure: the divergences for several slopes, which it may measure at once.
        largest: no slope is steeper.
        first: the first step, from 0.

    Returns:
        What was measured, by slope.
    """
    step = min(first, largest)
    tried: dict[float, float] = {}
    wanted = [0.0, -step, step] if step else [0.0]
    while wanted and len(tried) + len(wanted) <= MOST_SLOPES:
        tried.update(zip(wanted, measure(wanted), strict=True))
        best, wanted = best_slope(tried), []
        while not wanted and step >= LEAST_STEP:
            around = {round(min(max(best + way, -largest), largest), 6) for way in (-step, step)}
            wanted = sorted(around - tried.keys())
            step = step if wanted else step / 2
    return tried


def best_slope(tried: Mapping[float, float]) -> float:
    """Return the slope of least divergence; of equal ones the flattest."""
    return min(tried, key=lambda slope: (tried[slope], abs(slope), slope))


def _filled(values: Sequence[float | None]) -> list[float]:
    """Put the others' mean in place of what could not be measured."""
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else 0.0
    return [mean if value is None else value for value in values]


def _named(name: str, function: Callable[..., float], *args: Any) -> float:
    try:
        return function(*args)
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from error
