"""The inputs of a block's matrices, summed as calibration tokens pass; and when a matrix is ready to be pruned.

`at_once`: all matrices of a block are observed in one forward of the dense block, and pruned after it.
`in_order`: a matrix is pruned as soon as its input is known, so that the next one sees the inputs that pruned
matrices give it (``propagate="sequential"``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ..errors import ModelError
from ..models.matrices import Matrix, watching
from ..progress import Progress
from ..pruning import GRAM, Accumulator, Statistics
from .machine import free_memory_bytes
from .stream import Stream

ENOUGH_TOKENS = 32  # for sums; a Gram matrix needs as many as it has columns
MEMORY_SHARE = 0.5  # of the free memory, for micro-batches that wait for each other, and for Gram matrices of experts

Seen = dict[int, tuple[Tensor, str]]  # by identity; the tensor is held so that its id stays its own
Ready = Generator[list[str], None, None]


class Observer:
    """Sums the inputs of one block's matrices; an input that several of them share is summed once."""

    def __init__(self, chosen: Mapping[str, Matrix], needs: Collection[str]) -> None:
        self.chosen, self.needs = chosen, needs
        self.everywhere: set[str] = set()
        self.routed_tokens: dict[str, int] = {}
        self._sums: dict[str, Accumulator] = {}
        self._leaders: dict[str, str] = {}
        self._last: tuple[Accumulator | None, Statistics] = (None, Statistics())

    def see(self, inputs: Mapping[str, Tensor], seen: Seen) -> None:
        """Add one micro-batch's inputs; `seen` holds what this micro-batch showed before."""
        for name, x in inputs.items():
            _, leader = seen.setdefault(id(x), (x, name))
            former = self._leaders.setdefault(name, leader)
            if former != leader:
                other = former if leader == name else leader
                raise ModelError(f"{name}: shares its input with {other} only at times, so it cannot be observed")
            if leader == name:
                self._sums.setdefault(name, Accumulator(self.needs)).add(x)
            else:
                self._sums[name] = self._sums[leader]

    def seen(self, name: str) -> bool:
        """Whether any token reached the matrix."""
        return name in self._sums and self._sums[name].tokens > 0

    def statistics(self, name: str) -> Statistics:
        """Return what was summed for one matrix; matrices that share an input share it too."""
        sums = self._sums[name]
        if self._last[0] is not sums:
            self._last = (sums, sums.statistics())
        return self._last[1]

    def take_underfed(self, names: Iterable[str]) -> set[str]:
        """Forget the sums of experts among `names` that too few tokens reached, and have them run on all tokens.

        Too few are fewer than columns for a Gram matrix, and fewer than 32 for other sums. Both matrices of an
        expert go together.

        Returns:
            The names of those experts' matrices.
        """
        enough: dict[tuple[int, int | None], int] = defaultdict(int)
        for matrix in self.chosen.values():
            columns = matrix.shape[1] if GRAM in self.needs else ENOUGH_TOKENS
            enough[matrix.owner] = max(enough[matrix.owner], columns)
        poor = {
            matrix.owner
            for name in names
            if (matrix := self.chosen[name]).expert is not None and name not in self.everywhere
            if self._sums[name].tokens < enough[matrix.owner]
        }
        found = {name for name, matrix in self.chosen.items() if matrix.owner in poor}
        tokens = {self.chosen[name].owner: self._sums[name].tokens for name in found & self._sums.keys()}
        for name in found:
            self.routed_tokens[name] = tokens[self.chosen[name].owner]
        self.forget(found)
        self.everywhere |= found
        return found

    def forget(self, names: Iterable[str]) -> None:
        """Drop the sums of matrices."""
        for name in names:
            self._sums.pop(name, None)
            self._leaders.pop(name, None)
        self._last = (None, Statistics())

    def parts(self, room: float) -> list[dict[str, Matrix]]:
        """Part the matrices so that the Gram matrices of a part's experts take no more than `room` bytes.

        Both matrices of an expert are in one part, however much they take; all other matrices are in the first.
        """
        parts: list[dict[str, Matrix]] = [{name: m for name, m in self.chosen.items() if m.expert is None}]
        experts: dict[tuple[int, int | None], dict[str, Matrix]] = defaultdict(dict)
        for name, matrix in self.chosen.items():
            if matrix.expert is not None:
                experts[matrix.owner][name] = matrix
        taken = 0
        for expert in experts.values():
            bytes_ = gram_bytes(expert.values()) if GRAM in self.needs else 0
            if taken and taken + bytes_ > room:
                parts.append({})
                taken = 0
            parts[-1] |= expert
            taken += bytes_
        return parts


def unseen(observer: Observer, progress: Progress) -> Ready:
    """All matrices of a block at once, for a method that needs no inputs."""
    progress.advance()
    yield list(observer.chosen)


def at_once(
    stream: Stream, index: int, block: nn.Module, observer: Observer, progress: Progress, room: float = math.inf
) -> Ready:
    """Observe all matrices in one forward of the dense block, whose output is kept.

    Experts that too few tokens reached cost the block another forward, in which they see all tokens. So do experts
    whose Gram matrices `room`, in bytes, cannot hold together with those of others. They run beside each other, and
    what they share is pruned last, so the sums are the same, bit for bit.
    """

    def again() -> None:
        with torch.no_grad():
            for number in range(len(stream.batches)):
                stream.run(index, block, number)

    def observe(part: Mapping[str, Matrix], run: Callable[[], object]) -> None:
        seen: Seen = {}
        with (
            watching(part, lambda inputs: observer.see(inputs, seen), observer.everywhere),
            _before_each_forward(block, seen.clear),
        ):
            run()

    first, *others = observer.parts(room)
    observe(first, lambda: stream.forward(index, block, progress))
    shared = [name for name in first if others and first[name].expert is None]
    for part in (first, *others):
        if part is not first:
            observe(part, again)
        experts = [name for name in part if part[name].expert is not None]
        if underfed := observer.take_underfed(experts):
            observe({name: part[name] for name in underfed}, again)
        yield [name for name in observer.chosen if name in part and name not in shared]
        if others:
            observer.forget(experts)
    if shared:
        yield shared


@contextmanager
def _before_each_forward(block: nn.Module, act: Callable[[], None]) -> Iterator[None]:
    handle = block.register_forward_pre_hook(lambda module, inputs: act())
    try:
        yield
    finally:
        handle.remove()


def in_order(stream: Stream, index: int, block: nn.Module, observer: Observer, progress: Progress) -> Ready:
    """Observe matrices in the order in which they run, each after those before it were pruned.

    All micro-batches are paused at a matrix until all have reached it, so that one forward is enough for the whole
    block. Where that takes too much memory, every group of matrices that share an input takes a forward of its own;
    the sums are the same, bit for bit.

    The output of the pruned block is kept as the next block's input.
    """
    needed = paused_bytes(stream.tokens, math.prod(stream.hidden_shape), observer.chosen.values())
    together = _paused_together if fits(needed, stream.host.device) else _one_forward_each
    return together(stream, index, block, observer, progress)


def gram_bytes(matrices: Iterable[Matrix]) -> int:
    """What the Gram matrices of inputs that nothing shares take, in float32."""
    return sum(4 * matrix.shape[1] ** 2 for matrix in matrices)


def room(device: torch.device) -> float:
    """Bytes of a device's free memory that observation may take."""
    return MEMORY_SHARE * free_memory_bytes(device)


def paused_bytes(tokens: int, width: int, chosen: Iterable[Matrix]) -> int:
    """What paused micro-batches hold at most: two hidden states of `width` and the widest matrix's input or output."""
    return tokens * (2 * width + max((max(matrix.shape) for matrix in chosen), default=0)) * 4


def fits(needed: int, device: torch.device) -> bool:
    """Whether a device's free memory allows micro-batches to wait for each other."""
    return needed <= room(device)


def _paused_together(stream: Stream, index: int, block: nn.Module, observer: Observer, progress: Progress) -> Ready:
    scheduler = getcurrent()
    seen: dict[greenlet, Seen] = defaultdict(dict)
    done: set[str] = set()

    def see(inputs: Mapping[str, Tensor]) -> None:
        new = {name: x for name, x in inputs.items() if name not in done}
        if new:
            observer.see(new, seen[getcurrent()])
            scheduler.switch(list(new))

    def pass_through(number: int) -> None:
        stream.put(index + 1, number, stream.run(index, block, number))
        seen.pop(getcurrent(), None)
        progress.advance()

    batches = [greenlet(pass_through) for _ in stream.batches]
    try:
        # Grad mode belongs to the thread, so it is entered once, around all of them.
        with torch.no_grad(), watching(observer.chosen, see, observer.everywhere):
            waiting = [batch.switch(number) for number, batch in enumerate(batches)]
            while any(names is not None for names in waiting):
                ready = _ready(index, waiting, observer)
                done.update(ready)
                yield ready
                waiting = [batch.switch() for batch in batches]
    finally:
        for batch in batches:
            if not batch.dead:
                batch.throw(GreenletExit)


def _ready(index: int, waiting: Sequence[list[str] | None], observer: Observer) -> list[str]:
    """The matrices at which all micro-batches have arrived, but for underfed experts."""
    names = waiting[0] or []
    if any(others != waiting[0] for others in waiting):
        raise ModelError(
            f"block {index}: not every token takes the same way through it, so its matrices have no order; "
            "use --propagate block"
        )
    underfed = observer.take_underfed(names)
    return [name for name in names if name not in underfed]


def _one_forward_each(stream: Stream, index: int, block: nn.Module, observer: Observer, progress: Progress) -> Ready:
    done: set[str] = set()
    while True:
        arrived: list[list[str] | None] = []
        for number in range(len(stream.batches)):
            seen: Seen = {}
            names: list[str] = []

            def see(inputs: Mapping[str, Tensor], seen: Seen = seen, names: list[str] = names) -> None:
                """Take the first input whose matrices are still to be pruned, wherever it is used."""
                new = {name: x for name, x in inputs.items() if name not in done}
                if new and (not seen or all(id(x) in seen for x in new.values())):
                    observer.see(new, seen)
                    names.extend(new)

            with torch.no_grad(), watching(observer.chosen, see, observer.everywhere):
                stream.put(index + 1, number, stream.run(index, block, number))
            arrived.append(names)
        ready = _ready(index, arrived, observer)
        if not arrived[0]:
            break
        done.update(ready)
        yield ready
    progress.advance(len(stream.batches))
