"""Several changed models at once: how far each one's predictions are from the model's own, in one pass over its blocks.

What a trial changes begins at some block; up to there its hidden states are another's, from which it branches off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from ..models.anatomy import BlockCall
from ..models.disk_host import DiskHost
from ..pipeline.stream import micro_batches
from ..progress import Progress
from ..pruning.divergence import divergence

TRIAL_TOKENS = 4096  # of the calibration rows: enough to tell candidates apart
HEAD_TOKENS = 512  # whose predictions are in memory at once

Change = Callable[[int, nn.Module], AbstractContextManager[bool]]


@dataclass(frozen=True)
class Trial:
    """A changed model.

    Attributes:
        begins: the first block that differs from the first trial's (the first one's own: from the model's).
        change: given a resident block and its number, changes it for a while, and tells whether it runs at all.
    """

    begins: int
    change: Change


class Trials:
    """A model that tries out changes of itself on a few rows."""

    def __init__(self, host: DiskHost, rows: Sequence[Tensor]) -> None:
        """Take the first rows of at least `TRIAL_TOKENS` tokens together."""
        self.host, chosen = host, list[Tensor]()
        for row in rows:
            if sum(map(len, chosen)) < TRIAL_TOKENS:
                chosen.append(row)
        self.batches = list(micro_batches(chosen))
        self.first: list[Tensor] = []
        self.calls: list[list[BlockCall]] = []
        for ids in self.batches:
            hidden, calls = host.skeleton.record(ids.to(host.device))
            self.first.append(hidden)
            self.calls.append(calls)
        self._own: list[Tensor] | None = None

    def run(self, index: int, block: nn.Module, state: Sequence[Tensor]) -> list[Tensor]:
        """Run a resident block on every micro-batch's hidden state."""
        with torch.no_grad():
            return [calls[index].run(block, hidden) for calls, hidden in zip(self.calls, state, strict=True)]

    def distances(
        self, trials: Sequence[Trial], progress: Progress, visit: Callable[[int, nn.Module], None] | None = None
    ) -> list[float]:
        """Measure how far each trial's predictions are from the model's own.

        Args:
            trials: the first is one that all others branch off from; each other one begins at a block of its own.
            progress: hears of blocks.
            visit: is shown every block, resident, before any trial runs it.

        Returns:
            KL(model || trial) of each, nats per token.
        """
        count = len(self.host.skeleton.real)
        states: dict[int, list[Tensor]] = {0: self.first}
        own = self.first if self._own is None else None
        progress.start("trying out", count)
        for index in range(count):
            with self.host.block(index) as block:
                if visit:
                    visit(index, block)
                if own is not None:
                    own = self.run(index, block, own)
                states |= {number: states[0] for number, trial in enumerate(trials) if number and trial.begins == index}
                for number, state in states.items():
                    with trials[number].change(index, block) as runs:
                        states[number] = self.run(index, block, state) if runs else state
            progress.advance()
        progress.finish()
        self._own = own if own is not None else self._own
        return self._distances([states[number] for number in range(len(trials))])

    def _distances(self, states: Sequence[Sequence[Tensor]]) -> list[float]:
        """KL(model || trial) of each trial's last hidden states."""
        assert self._own is not None
        totals, tokens = [0.0] * len(states), 0
        for ids, own, *others in zip(self.batches, self._own, *states, strict=True):
            for row in zip(ids.to(self.host.device), own, *others, strict=True):
                for ids_T, own_TD, *rest in zip(*(part.split(HEAD_TOKENS) for part in row), strict=True):
                    own_TV, tokens = self._predicted(ids_T, own_TD), tokens + len(ids_T)
                    for number, hidden_TD in enumerate(rest):
                        totals[number] += float(divergence(own_TV, self._predicted(ids_T, hidden_TD)).sum())
        return [total / tokens for total in totals]

    def _predicted(self, ids_T: Tensor, hidden_TD: Tensor) -> Tensor:
        return log_softmax(self.host.skeleton.logits(ids_T[None], hidden_TD[None])[0].float(), dim=-1)
