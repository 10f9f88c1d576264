"""THE loop: block after block, inputs are observed and matrices pruned."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ModelError, NumericsError, SecateurError
from ..models.hosts import Host, block_matrices
from ..models.matrices import Matrix
from ..progress import Progress
from ..pruning import Method, Statistics, Target
from .observation import Observer, Ready, at_once, in_order, room, unseen
from .reconstruct import Reconstruction, Writer, reconstruct_block, steps_of
from .stream import Stream

log = logging.getLogger("secateur")

LEFT_OUT_SHARE = 0.05  # of the selected weights: more that cannot be pruned are an error
NO_INPUT = "no input is seen during calibration"


class Run(Writer, Protocol):
    """Where the loop's results go, and what of them is there already."""

    @property
    def done(self) -> int:
        """How many blocks are finished."""

    def guarded(self, block: nn.Module) -> AbstractContextManager[None]:
        """Prune a resident block whole or, after an error, not at all."""

    def keep(self, index: int, pruned: Sequence[Matrix]) -> None:
        """Keep a block's new weights, which are in the resident block."""

    def finish(self, index: int, record: dict[str, Any]) -> None:
        """Note that a block is finished."""


@dataclass(frozen=True)
class Job:
    """What the loop does to each matrix, and what later matrices see.

    Attributes:
        method: prunes one matrix.
        targets: by matrix.
        propagate: ``"block"``, pruned blocks before them; ``"dense"``, the unpruned model; ``"sequential"``, every
            pruned matrix before them.
        fold_mean: where a matrix has a bias, it takes over what the pruned weights gave on average; the method must
            ask for the inputs' sum, and is handed sums over the inputs less their mean.
        reconstruct: how each block is trained once its matrices are pruned; None: not at all.
    """

    method: Method
    targets: Mapping[str, Target]
    propagate: str = "block"
    fold_mean: bool = False
    reconstruct: Reconstruction | None = None

    @property
    def batch_tokens(self) -> int | None:
        """Tokens of a micro-batch; None is the usual number."""
        return self.reconstruct.batch_tokens if self.reconstruct else None

    def chosen(self, host: Host, index: int) -> dict[str, Matrix]:
        """Return the matrices of one block that are to be pruned."""
        found = block_matrices(host, index)
        return {n: m for n, m in found.items() if n in self.targets and self.targets[n].sparsity}


def prune_blocks(
    host: Host, job: Job, stream: Stream | None, run: Run, progress: Progress, dense: Stream | None = None
) -> None:
    """Prune every block that the run has not finished yet.

    Args:
        host: the model.
        job: what to do.
        stream: the calibration tokens, at the first unfinished block; None for a method that needs none.
        run: takes the results.
        progress: hears of every micro-batch and matrix.
        dense: the same tokens on their way through the dense model; needed to reconstruct blocks.

    Raises:
        NumericsError: NaN or Inf in weights or inputs, named by matrix.
        ModelError: the inputs of more than 5 % of the selected weights cannot be seen.
    """
    count = len(host.skeleton.real)
    weights = {n: m.weights for index in range(count) for n, m in job.chosen(host, index).items()}
    unobserved = {name for name in weights if stream and name not in stream.observable}
    check_left_out(unobserved, weights, NO_INPUT)
    steps = (2 if job.propagate == "block" else 1) * len(stream.batches) if stream else 1
    if job.reconstruct and dense:
        steps += len(dense.batches) + steps_of(job.reconstruct, len(dense.batches))
    progress.start("pruning", count * steps, done=run.done * steps)
    for index in range(run.done, count):
        started = time.perf_counter()
        progress.advance(0, f"block {index + 1} of {count}")
        with host.block(index) as block, run.guarded(block):
            if dense:
                dense.forward(index, block, progress)
            chosen = job.chosen(host, index)
            observed = {name: matrix for name, matrix in chosen.items() if name not in unobserved}
            records = _prune_matrices(stream, index, block, observed, run, job, progress)
            pruned = [chosen[entry["name"]] for entry in records]
            left = chosen.keys() - {matrix.name for matrix in pruned}
            unobserved |= left
            check_left_out(unobserved, weights, NO_INPUT)
            error = rebuilt = None
            if stream and dense and job.reconstruct and pruned:
                rebuilt = reconstruct_block(block, index, pruned, stream, dense, run, job.reconstruct, progress)
                for entry, matrix in zip(records, pruned, strict=True):
                    entry["zeros"] = matrix.weights - int(matrix.read().count_nonzero())
            run.keep(index, pruned)
            if stream and job.propagate == "block":
                error = stream.forward(index, block, progress, compare=True)
        record: dict[str, Any]
        record = {"block": index, "seconds": time.perf_counter() - started, "output_error": error, "matrices": records}
        if rebuilt:
            record["reconstruction"] = rebuilt
        if left:
            record["unobserved"] = sorted(left)
        run.finish(index, record)
    progress.finish()


def _prune_matrices(
    stream: Stream | None,
    index: int,
    block: nn.Module,
    observed: Mapping[str, Matrix],
    run: Run,
    job: Job,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Prune a block's matrices whenever their inputs are known; return their records in the order of `observed`."""
    observer = Observer(observed, job.method.needs)
    with closing(_ready(stream, index, block, observer, job, progress)) as groups:
        records = {
            name: prune_matrix(run.as_written, observed[name], job, observer)
            for names in groups
            for name in names
            if stream is None or observer.seen(name)
        }
    return [records[name] for name in observed if name in records]


def _ready(
    stream: Stream | None, index: int, block: nn.Module, observer: Observer, job: Job, progress: Progress
) -> Ready:
    """Yield groups of matrices of a block whenever their inputs are known."""
    if stream is None:
        return unseen(observer, progress)
    if job.propagate == "sequential":
        return in_order(stream, index, block, observer, progress)
    return at_once(stream, index, block, observer, progress, room(stream.host.device))


def check_left_out(names: Iterable[str], weights: Mapping[str, int], why: str) -> None:
    """Refuse to leave `names` dense if they hold too large a share of the selected weights.

    Raises:
        ModelError: they do; it names them, and says why they cannot be pruned.
    """
    names = sorted(names)
    share = sum(weights[name] for name in names) / (sum(weights.values()) or 1)
    if share > LEFT_OUT_SHARE:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError(
            f"{names[0]}{others}: {why}, and {share:.0%} of the weights to be pruned lie there; leave them dense with "
            "--exclude"
        )


def prune_matrix(
    as_written: Callable[[Matrix, Tensor], Tensor], matrix: Matrix, job: Job, observer: Observer
) -> dict[str, Any]:
    """Prune one matrix of a resident block, as it will be written (`Run.as_written`), and return its record."""
    statistics = observer.statistics(matrix.name) if job.method.needs else Statistics()
    target = job.targets[matrix.name]
    W_OI = matrix.read()
    mean_I = statistics.mean_I.float() if job.fold_mean and matrix.bias is not None else None
    statistics = statistics if mean_I is None else statistics.centred()
    new_OI, mask_OI = _prune(matrix.name, W_OI, statistics, job.method, target)
    written = as_written(matrix, new_OI)
    if not _finite(written):
        raise NumericsError(
            f"{matrix.name}: a new weight does not fit {written.dtype}; use --dtype float32 or bfloat16"
        )
    record = {
        "name": matrix.name,
        "shape": list(matrix.shape),
        "pattern": str(target.pattern),
        "target": target.sparsity,
        "pruned": mask_OI.numel() - int(mask_OI.count_nonzero()),
        "zeros": written.numel() - int(written.count_nonzero()),
        "tokens": statistics.tokens if job.method.needs else None,
        "output_error": _output_error(W_OI.float(), written.float(), statistics),
    }
    if matrix.name in observer.routed_tokens:
        record["routed_tokens"] = observer.routed_tokens[matrix.name]
    if mean_I is not None:
        matrix.add_to_bias((W_OI.float() - written.float()) @ mean_I)
    matrix.write(written)
    return record


def _prune(name: str, W_OI: Tensor, statistics: Statistics, method: Method, target: Target) -> tuple[Tensor, Tensor]:
    if not _finite(W_OI):
        raise NumericsError(f"{name}: the weights hold NaN or Inf; check the model")
    for sums in (statistics.sum_I, statistics.sumsq_I, statistics.gram_II):
        if sums is not None and not _finite(sums):
            raise NumericsError(f"{name}: the inputs hold NaN or Inf; check the model and the calibration text")
    try:
        return method(W_OI, statistics, target.sparsity, target.pattern)
    except SecateurError as error:
        raise type(error)(f"{name}: {error}") from error


def _finite(values: Tensor) -> bool:
    """Whether no value is NaN or Inf, in one pass."""
    return math.isfinite(float(torch.linalg.vector_norm(values, float("inf"))))


def _output_error(W_OI: Tensor, new_OI: Tensor, statistics: Statistics) -> float | None:
    """|X Wᵀ - X W'ᵀ| / |X Wᵀ| (Frobenius) from the Gram matrix; None without one."""
    if statistics.gram_II is None:
        return None
    D_OI = W_OI - new_OI
    norm = float(((W_OI @ statistics.gram_II) * W_OI).sum())
    distance = float(((D_OI @ statistics.gram_II) * D_OI).sum())
    return (max(distance, 0.0) / norm) ** 0.5 if norm > 0 else None
