"""How far a model's predictions move when it is masked by Wanda: a cheap foretaste of what pruning does to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.nn.functional import log_softmax

from ..models.hosts import Host, block_matrices
from ..models.matrices import Matrix
from ..progress import Progress
from ..pruning import Matrix as WholeMatrix
from ..pruning import Row, Statistics, Target, wanda
from ..pruning.divergence import divergence
from .stream import Stream

LOGITS_AT_ONCE = 1 << 24


class MaskedReader:
    """Reads the same rows with the dense model and with masked ones, all of them block by block at once."""

    def __init__(
        self, host: Host, rows: Sequence[Tensor], statistics: Mapping[str, Statistics], folder: Path, progress: Progress
    ) -> None:
        """Take a dense model.

        Args:
            host: the model; it is left as it was.
            rows: token ids.
            statistics: by matrix, with sums of squares; what has none stays dense.
            folder: where hidden states may lie.
            progress: hears of the work.
        """
        self.host, self.statistics, self.folder, self.progress = host, statistics, folder, progress
        self.start = Stream(host, rows, folder / "start")
        self.dense: Stream | None = None

    def divergences(self, allocations: Sequence[Mapping[str, Target]]) -> list[float]:
        """Return, for each allocation, the mean KL(dense || masked) over all tokens, in nats; infinite if undefined."""
        streams = [self.start.beside(self.folder / str(place)) for place in range(len(allocations))]
        readings = list(zip(streams, allocations, strict=True))
        if self.dense is None:
            self.dense = self.start.beside(self.folder / "dense")
            readings.insert(0, (self.dense, {}))
        count, batches = len(self.host.skeleton.real), len(self.start.batches)
        self.progress.start("allocating", (count * len(readings) + len(streams)) * batches)
        for index in range(count):
            with self.host.block(index) as block:
                chosen = block_matrices(self.host, index)
                for stream, targets in readings:
                    with self._masked(chosen, targets):
                        stream.forward(index, block, self.progress)
        found = [self._divergence(stream, self.dense) for stream in streams]
        self.progress.finish()
        return found

    @contextmanager
    def _masked(self, chosen: Mapping[str, Matrix], targets: Mapping[str, Target]) -> Iterator[None]:
        """Mask the matrices of a resident block for a while."""
        former: dict[str, Tensor] = {}
        try:
            for name, matrix in chosen.items():
                target = targets.get(name)
                if target is not None and target.sparsity and name in self.statistics:
                    W_OI = matrix.read()
                    former[name] = W_OI.clone()
                    W_OI.mul_(wanda_mask(W_OI, self.statistics[name], target))
            yield
        finally:
            for name, W_OI in former.items():
                chosen[name].read().copy_(W_OI)

    def _divergence(self, stream: Stream, dense: Stream) -> float:
        skeleton, last = self.host.skeleton, len(self.host.skeleton.real)
        at_once = max(1, LOGITS_AT_ONCE // self.host.model.config.get_text_config().vocab_size)
        total = 0.0
        for number, ids_BT in enumerate(stream.batches):
            rows = zip(ids_BT.to(self.host.device), dense.get(last, number), stream.get(last, number), strict=True)
            for row in rows:
                for ids_T, dense_TD, own_TD in zip(*(part.split(at_once) for part in row), strict=True):
                    logs = [
                        log_softmax(skeleton.logits(ids_T[None], hidden_TD[None])[0].float(), dim=-1)
                        for hidden_TD in (dense_TD, own_TD)
                    ]
                    total += float(divergence(*logs).sum())
            self.progress.advance()
        mean = total / stream.tokens
        return mean if math.isfinite(mean) else math.inf


def wanda_mask(W_OI: Tensor, statistics: Statistics, target: Target) -> Tensor:
    """Return Wanda's mask; by rows, as Wanda chooses, where a method would choose over the whole matrix."""
    pattern = Row() if isinstance(target.pattern, WholeMatrix) else target.pattern
    return pattern.mask(wanda(W_OI, statistics), target.sparsity)
