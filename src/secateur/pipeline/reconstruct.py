"""Block reconstruction: with the masks fixed, a block's kept weights learn to give the dense model's hidden states.

The block sees what the pruned blocks before it give, and is trained to return what its dense original returned in
the dense model, so that it also makes up for those before it. Local reconstruction of a whole block: EBFT (Guo et al.
2024, https://arxiv.org/abs/2402.12419), whose target is the dense block on the pruned stream; with the dense model's
own stream as target: 3BASiL's transformer matching. `reconstruct_block` tells what is different here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import ModelError, OptionError
from ..models.matrices import Matrix
from ..progress import Progress
from .observation import fits
from .stream import Stream, micro_batches

log = logging.getLogger("secateur")

HELD_OUT = 8  # every eighth micro-batch is held out
FEWEST = 8  # micro-batches: with fewer nothing is held out
LAST_RATE = 0.1  # of the learning rate, at the end of its cosine


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How blocks are reconstructed.

    Attributes:
        epochs: passes over the calibration tokens, at most.
        learning_rate: of Adam at the beginning; it falls to a tenth by half a cosine.
        patience: a block is done after so many epochs without a smaller error on held-out sequences.
        batch_tokens: tokens of a step; fewer take less memory.
        seed: of the order of the steps; None is that of the run.
    """

    epochs: int = 8
    learning_rate: float = 2e-3
    patience: int = 2
    batch_tokens: int = 2048
    seed: int | None = None

    def check(self) -> None:
        """Raise OptionError for a value out of range."""
        for name in ("epochs", "patience", "batch_tokens"):
            if not isinstance(getattr(self, name), int):
                raise OptionError(f"reconstruct: {name} is a whole number, not {getattr(self, name)!r}")
        if min(self.epochs, self.patience, self.batch_tokens) < 1:
            raise OptionError("reconstruct: epochs, patience and batch_tokens are at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise OptionError(f"reconstruct: learning_rate must be positive and finite, not {self.learning_rate}")


class Writer(Protocol):
    """Says how new values will be read from the result."""

    def as_written(self, matrix: Matrix, W_OI: Tensor) -> Tensor:
        """Return a matrix's new weights cast, and rounded if values are."""

    def cast(self, name: str, parameter: Tensor) -> Tensor:
        """Return another parameter of the resident block, by its whole name, cast."""


def with_enough_tokens(how: Reconstruction | None, rows: Sequence[Tensor]) -> Reconstruction | None:
    """Do without reconstruction where there are too few tokens, and say so."""
    if how is None or not len(rows):
        return None
    if len(list(micro_batches(rows, how.batch_tokens))) >= FEWEST:
        return how
    length = max(len(row) for row in rows)
    log.warning(
        "reconstruct: %d sequences of %d tokens are too few, it needs %d; weights stay as the method leaves them",
        len(rows), length, FEWEST * max(1, how.batch_tokens // length),
    )  # fmt: skip
    return None


def steps_of(how: Reconstruction, batches: int) -> int:
    """How many steps a block takes at most, of so many micro-batches."""
    return how.epochs * (batches - batches // HELD_OUT)


def reconstruct_block(
    block: nn.Module,
    index: int,
    pruned: Sequence[Matrix],
    stream: Stream,
    dense: Stream,
    writer: Writer,
    how: Reconstruction,
    progress: Progress,
) -> dict[str, float | int]:
    """Train a resident block's kept weights, and all its norms and biases; what is best on held-out sequences stays.

    The loss is the mean over tokens of |dense - pruned|² / |dense|²: what follows a block normalises each token's
    hidden state, and a few tokens with very large ones would otherwise be all that counts. (EBFT and 3BASiL take the
    plain sum of squares.)

    Args:
        block: resident, in float32, its matrices pruned and as they will be written.
        index: of the block.
        pruned: its pruned matrices; the weights that are zero stay zero.
        stream: what the pruned blocks before it give, at this block.
        dense: the dense model's hidden states, at the next block.
        writer: casts what was trained.
        how: the settings.
        progress: hears of every step.

    Returns:
        ``error_before`` and ``error_after``, |dense - pruned| / |dense| (root mean square over held-out tokens, with
        weights as they will be written; after is never above before), and ``epochs``.

    Raises:
        ModelError: the device has not enough memory.
    """
    with _memory_told(index):
        weights = _Weights(block, pruned, f"{stream.host.skeleton.path}.{index}")
        distance = _Distance(block, index, stream, dense)
        first, before = weights.copy(), distance.held_out()
        best, epochs = _best(weights, distance, before, how, index, progress)
        after = before
        if best is not None:
            weights.put(best, writer)
            after = distance.held_out()
        if best is None or not after < before:
            weights.put(first, writer)
            after = before
            log.warning("block %d: reconstruction did not bring it nearer; its weights stay as they were", index)
    return {"error_before": before, "error_after": after, "epochs": epochs}


@contextmanager
def _memory_told(index: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise ModelError(
            f"block {index}: too little memory to reconstruct it; a smaller --seqlen takes less, --device cpu has "
            "more, and in Python Reconstruction(batch_tokens=...) takes smaller steps"
        ) from None


class _Distance:
    """How far a block's outputs are from the dense model's, on the micro-batches seen and on those held out."""

    def __init__(self, block: nn.Module, index: int, stream: Stream, dense: Stream) -> None:
        self.block, self.calls = block, [calls[index] for calls in stream.calls]
        self.given, self.wanted = _held_if_it_fits(stream, index), _held_if_it_fits(dense, index + 1)
        self.tokens = [ids.numel() for ids in stream.batches]
        self.held = range(len(stream.batches))[HELD_OUT - 1 :: HELD_OUT]
        self.seen = [number for number in range(len(stream.batches)) if number not in self.held]

    def loss(self, number: int) -> Tensor:
        """Mean over one micro-batch's tokens of |dense - new|² / |dense|²."""
        new_BTD = self.calls[number].run(self.block, self.given(number)).float()
        dense_BTD = self.wanted(number).to(new_BTD.device).float()
        size_BT = dense_BTD.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        return ((new_BTD - dense_BTD).square().sum(-1) / size_BT).mean()

    def held_out(self) -> float:
        """Root of the mean loss over held-out tokens."""
        with torch.no_grad():
            squares = sum(self.tokens[number] * float(self.loss(number)) for number in self.held)
        return math.sqrt(squares / sum(self.tokens[number] for number in self.held))


def _held_if_it_fits(stream: Stream, index: int) -> Callable[[int], Tensor]:
    """Give the input of block `index` for a micro-batch, from the device's memory where all of them fit."""
    needed = 4 * stream.tokens * math.prod(stream.hidden_shape)
    if not fits(2 * needed, stream.host.device):
        return lambda number: stream.get(index, number)
    held = [stream.get(index, number) for number in range(len(stream.batches))]
    return held.__getitem__


def _best(
    weights: _Weights, distance: _Distance, before: float, how: Reconstruction, index: int, progress: Progress
) -> tuple[list[Tensor] | None, int]:
    """Train; return the weights that are best on what is held out, None if none are better, and the epochs."""
    best, least, epoch, stale = None, before, 0, 0
    with weights.training() as parameters:
        for error in _epochs(parameters, distance, how, index, progress):
            epoch, stale = epoch + 1, stale + 1
            if error < least:
                best, least, stale = weights.copy(), error, 0
            if stale == how.patience or not math.isfinite(error):
                break
    progress.advance((how.epochs - epoch) * len(distance.seen))
    return best, epoch


def _epochs(
    parameters: Sequence[nn.Parameter], distance: _Distance, how: Reconstruction, index: int, progress: Progress
) -> Iterator[float]:
    """Train, and yield the error on held-out sequences after every epoch."""
    optimizer = torch.optim.Adam(parameters, lr=how.learning_rate, betas=(0.9, 0.95), fused=True)
    seen, steps = distance.seen, how.epochs * len(distance.seen)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    order = torch.Generator().manual_seed(((how.seed or 0) * 1_000_003 + index) % 2**63)
    for _ in range(how.epochs):
        for place in torch.randperm(len(seen), generator=order).tolist():
            with torch.enable_grad(), _tf32():
                distance.loss(seen[place]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.advance()
        yield distance.held_out()


@contextmanager
def _tf32() -> Iterator[None]:
    """Have a GPU multiply matrices faster and more coarsely, which is enough for a gradient."""
    former, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = former


class _Weights:
    """What is trained of a block: pruned matrices under their masks, and vectors (norms, biases)."""

    def __init__(self, block: nn.Module, pruned: Sequence[Matrix], path: str) -> None:
        self.block, self.pruned = block, pruned
        self.keep: dict[nn.Parameter, Tensor] = {}
        for matrix in pruned:
            held = self.keep.setdefault(matrix.weight, torch.zeros_like(matrix.weight, dtype=torch.bool))
            matrix.part(held).copy_(matrix.read() != 0)
        self.vectors = {
            f"{path}.{name}": parameter
            for name, parameter in block.named_parameters()
            if parameter.ndim == 1 and parameter.is_floating_point() and parameter not in self.keep
        }

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.keep, *self.vectors.values()]

    def copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def put(self, values: Sequence[Tensor], writer: Writer) -> None:
        """Give the block new values, as they will be written."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.detach().copy_(value)
        for matrix in self.pruned:
            matrix.write(writer.as_written(matrix, matrix.read()))
        for name, vector in self.vectors.items():
            vector.detach().copy_(writer.cast(name, vector).detach())
            vector.changed = True  # type: ignore[attr-defined]

    @contextmanager
    def training(self) -> Iterator[list[nn.Parameter]]:
        """Have gradients for what is trained alone, none of them for a masked weight."""
        former = {parameter: parameter.requires_grad for parameter in self.block.parameters()}
        self.block.requires_grad_(False)
        handles = []
        for parameter in self.parameters:
            parameter.requires_grad_(True)
            if parameter in self.keep:
                handles.append(parameter.register_post_accumulate_grad_hook(self._masked))
        try:
            yield self.parameters
        finally:
            for handle in handles:
                handle.remove()
            for parameter, required in former.items():
                parameter.requires_grad_(required)
                parameter.grad = None

    def _masked(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        parameter.grad.mul_(self.keep[parameter])
