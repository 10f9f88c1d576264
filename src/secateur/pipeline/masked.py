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
        self.progress.start("allocating", (count * len(readings) + 1) * batches)
        for index in range(count):
            with self.host.block(index) as block:
                chosen = block_matrices(self.host, index)
                for stream, targets in readings:
                    with self._masked(chosen, targets):
                        stream.forward(index, block, self.progress)
        found = self._divergences(streams, self.dense)
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

    def _divergences(self, streams: Sequence[Stream], dense: Stream) -> list[float]:
        last = len(self.host.skeleton.real)
        at_once = max(1, LOGITS_AT_ONCE // self.host.model.config.get_text_config().vocab_size)
        totals = [0.0] * len(streams)
        for number, ids_BT in enumerate(dense.batches):
            hidden = [stream.get(last, number) for stream in (dense, *streams)]
            for row in zip(ids_BT.to(self.host.device), *hidden, strict=True):
                for ids_T, dense_TD, *others in zip(*(part.split(at_once) for part in row), strict=True):
                    theirs = self._log_probabilities(ids_T, dense_TD)
                    for place, own_TD in enumerate(others):
                        totals[place] += float(divergence(theirs, self._log_probabilities(ids_T, own_TD)).sum())
            self.progress.advance()
        means = [total / dense.tokens for total in totals]
        return [mean if math.isfinite(mean) else math.inf for mean in means]

    def _log_probabilities(self, ids_T: Tensor, hidden_TD: Tensor) -> Tensor:
        return log_softmax(self.host.skeleton.logits(ids_T[None], hidden_TD[None])[0].float(), dim=-1)


def wanda_mask(W_OI: Tensor, statistics: Statistics, target: Target) -> Tensor:
    """Return Wanda's mask; by rows, as Wanda chooses, where a method would choose over the whole matrix."""
    pattern = Row() if isinstance(target.pattern, WholeMatrix) else target.pattern
    return pattern.mask(wanda(W_OI, statistics), target.sparsity)
