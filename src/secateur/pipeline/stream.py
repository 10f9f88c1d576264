"""THE loop: calibration tokens flow through the blocks, and each block is pruned as they pass.

Hidden states lie in two files, that of even and that of odd blocks: a block reads one and writes the other,
so a run that dies in the middle of a block still has the block's input.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ModelError, NumericsError, OutputError, SecateurError
from ..models.anatomy import BlockCall, Matrix, check_replay
from ..models.hosts import Host, block_matrices
from ..progress import Progress
from ..pruning import Accumulator, Method, Statistics, Target

MICRO_BATCH_TOKENS = 4096
CHECK_TOKENS = 64


class Stream:
    """Rows of tokens on their way through a model: micro-batches, their calls, and their hidden states."""

    def __init__(self, host: Host, rows: Sequence[Tensor], folder: Path, first: int = 0) -> None:
        """Run the skeleton on all rows.

        Args:
            host: the model.
            rows: token ids, each [T]; consecutive rows of one length share micro-batches.
            folder: where hidden states are kept.
            first: the block to go on with; its input must be in the folder unless it is 0.

        Raises:
            ModelError: the model's blocks cannot be run one at a time.
        """
        self.host = host
        self.batches = list(micro_batches(rows))
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [folder / "even.bin", folder / "odd.bin"]
        check_replay(host.skeleton, host.block, self.batches[0][:1, :CHECK_TOKENS].to(host.device))
        self.calls: list[list[BlockCall]] = []
        self._offsets = [0]
        for number, ids in enumerate(self.batches):
            hidden, calls = host.skeleton.record(ids.to(host.device))
            if self.calls:
                calls = [call.shared_with(known) for call, known in zip(calls, self.calls[-1], strict=True)]
            self.calls.append(calls)
            self._shape, self._dtype = hidden.shape[2:], hidden.dtype
            self._offsets.append(self._offsets[-1] + hidden.numel() * hidden.element_size())
            if first == 0:
                self.put(0, number, hidden)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(ids.numel() for ids in self.batches)

    def get(self, index: int, number: int) -> Tensor:
        """Read the input of block `index` for one micro-batch, [B, T, D]."""
        size = self._offsets[number + 1] - self._offsets[number]
        buffer = bytearray(size)
        with self._files[index % 2].open("rb") as file:
            file.seek(self._offsets[number])
            file.readinto(buffer)
        shape = (*self.batches[number].shape, *self._shape)
        return torch.frombuffer(buffer, dtype=self._dtype).view(shape).to(self.host.device)

    def put(self, index: int, number: int, hidden_BTD: Tensor) -> None:
        """Write the input of block `index` for one micro-batch."""
        data = hidden_BTD.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        try:
            with self._files[index % 2].open("r+b" if self._files[index % 2].exists() else "w+b") as file:
                file.seek(self._offsets[number])
                file.write(data)
        except OSError as error:
            raise OutputError(
                f"{self._files[index % 2]}: hidden states cannot be written ({error.strerror})"
            ) from error

    def forward(self, index: int, block: nn.Module, progress: Progress, compare: bool = False) -> float | None:
        """Run one block on all tokens: its input becomes the next block's.

        Args:
            index: of the block.
            block: resident.
            progress: hears of every micro-batch.
            compare: what lies in the next block's place is the dense output; measure the distance from it.

        Returns:
            The relative output error |dense - new| / |dense| over all tokens (Frobenius norms), or None.
        """
        distance = norm = 0.0
        with torch.no_grad():
            for number, calls in enumerate(self.calls):
                out = calls[index].run(block, self.get(index, number))
                if compare:
                    dense = self.get(index + 1, number)
                    norm += float(torch.linalg.vector_norm(dense)) ** 2
                    distance += float(torch.linalg.vector_norm(dense.sub_(out))) ** 2
                self.put(index + 1, number, out)
                progress.advance()
        return (distance / norm) ** 0.5 if compare and norm else None

    def close(self) -> None:
        """Remove the hidden states."""
        for file in self._files:
            file.unlink(missing_ok=True)


def micro_batches(rows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Stack consecutive rows of one length into batches [B, T] of at most `MICRO_BATCH_TOKENS` tokens."""
    start = 0
    while start < len(rows):
        length = len(rows[start])
        most = max(1, MICRO_BATCH_TOKENS // length)
        end = start + 1
        while end < len(rows) and end - start < most and len(rows[end]) == length:
            end += 1
        yield torch.stack(list(rows[start:end]))
        start = end


@contextmanager
def observe(block: nn.Module, chosen: Mapping[str, Matrix], needs: Collection[str]) -> Iterator[dict[str, Accumulator]]:
    """Sum the inputs of a block's matrices while it runs; an input that several share is summed once."""
    sums: dict[str, Accumulator] = {}
    leaders: dict[str, str] = {}
    seen: dict[int, tuple[Tensor, str]] = {}  # by identity; the tensor is held so that its id stays its own

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            _, leader = seen.setdefault(id(inputs[0]), (inputs[0], name))
            if leaders.setdefault(name, leader) != leader:
                raise ModelError(f"{name}: shares its input with {leader} only at times, so it cannot be observed")
            if leader == name:
                sums.setdefault(name, Accumulator(needs)).add(inputs[0])
            else:
                sums[name] = sums[leader]

        return hook

    hooks = [matrix.module.register_forward_pre_hook(watch(name)) for name, matrix in chosen.items()]
    hooks.append(block.register_forward_pre_hook(lambda module, inputs: seen.clear()))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


class Run(Protocol):
    """Where the loop's results go, and what of them is there already."""

    @property
    def done(self) -> int:
        """How many blocks are finished."""

    def keep(self, index: int, weights: Mapping[str, Tensor]) -> None:
        """Keep a block's new weights: names of matrices -> weights [out, in] in the dtype they are written in."""

    def finish(self, index: int, record: dict[str, Any]) -> None:
        """Note that a block is finished."""


@dataclass(frozen=True)
class Job:
    """What the loop does to each matrix."""

    method: Method
    targets: Mapping[str, Target]
    propagate: str = "block"


def prune_blocks(host: Host, job: Job, stream: Stream | None, run: Run, progress: Progress) -> None:
    """Prune every block that the run has not finished yet.

    Args:
        host: the model.
        job: method, targets by matrix, and what later blocks see: ``"block"``, the pruned blocks before them, or
            ``"dense"``, the unpruned model.
        stream: the calibration tokens, at the first unfinished block; None for a method that needs none.
        run: takes the results.
        progress: hears of every micro-batch and matrix.

    Raises:
        NumericsError: NaN or Inf in weights or inputs, named by matrix.
        ModelError: a matrix's input was never seen.
    """
    count = len(host.skeleton.real)
    steps = (2 if job.propagate == "block" else 1) * len(stream.batches) if stream else 1
    progress.start("pruning", count * steps, done=run.done * steps)
    for index in range(run.done, count):
        started = time.perf_counter()
        chosen = {n: m for n, m in block_matrices(host, index).items() if n in job.targets and job.targets[n].sparsity}
        progress.advance(0, f"block {index + 1} of {count}")
        with host.block(index) as block:
            sums: Mapping[str, Accumulator] = {}
            if stream:
                with observe(block, chosen, job.method.needs) as sums:
                    stream.forward(index, block, progress)
            records, weights = prune_matrices(host, chosen, job, sums)
            del sums
            run.keep(index, weights)
            for name, matrix in chosen.items():
                matrix.write(weights[name])
            del weights
            error = None
            if stream and job.propagate == "block":
                error = stream.forward(index, block, progress, compare=True)
            if stream is None:
                progress.advance()
        seconds = time.perf_counter() - started
        run.finish(index, {"block": index, "seconds": seconds, "output_error": error, "matrices": records})
    progress.finish()


def prune_matrices(
    host: Host, chosen: Mapping[str, Matrix], job: Job, sums: Mapping[str, Accumulator]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Prune the matrices of a resident block; return their records and their weights as they will be written."""
    records: list[dict[str, Any]] = []
    weights: dict[str, Tensor] = {}
    shared: dict[int, Statistics] = {}
    for name, matrix in chosen.items():
        statistics = Statistics()
        if job.method.needs:
            if name not in sums:
                raise ModelError(f"{name}: no token reached it during calibration; exclude it with --exclude")
            if id(sums[name]) not in shared:
                shared = {id(sums[name]): sums[name].statistics()}
            statistics = shared[id(sums[name])]
        W_OI = matrix.read()
        new_OI, mask_OI = _prune_matrix(name, W_OI, statistics, job)
        written = new_OI.to(host.written_dtype(matrix))
        if not _finite(written):
            raise NumericsError(f"{name}: a new weight does not fit {written.dtype}; use --dtype float32 or bfloat16")
        weights[name] = written
        target = job.targets[name]
        records.append(
            {
                "name": name,
                "shape": list(matrix.shape),
                "pattern": str(target.pattern),
                "target": target.sparsity,
                "pruned": mask_OI.numel() - int(mask_OI.count_nonzero()),
                "zeros": written.numel() - int(written.count_nonzero()),
                "output_error": _output_error(W_OI.float(), written.float(), statistics),
            }
        )
    return records, weights


def _prune_matrix(name: str, W_OI: Tensor, statistics: Statistics, job: Job) -> tuple[Tensor, Tensor]:
    if not _finite(W_OI):
        raise NumericsError(f"{name}: the weights hold NaN or Inf; check the model")
    for sums in (statistics.sum_I, statistics.sumsq_I, statistics.gram_II):
        if sums is not None and not _finite(sums):
            raise NumericsError(f"{name}: the inputs hold NaN or Inf; check the model and the calibration text")
    target = job.targets[name]
    try:
        return job.method(W_OI, statistics, target.sparsity, target.pattern)
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
