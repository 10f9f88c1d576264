"""Statistics of a matrix's input: sums over calibration tokens, divided by nobody until the end.

Names: T tokens, I input columns. Because they are sums, merging batches, runs or machines is addition.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SUM, SUMSQ, GRAM = "sum", "sumsq", "gram"


@dataclass(frozen=True)
class Statistics:
    """Sums over the tokens that reached one matrix.

    Attributes:
        tokens: how many tokens were summed.
        sum_I: sum of the inputs, [I], float64; or None.
        sumsq_I: sum of the squared inputs, [I], float64; or None. Its root is the L2 norm of Wanda.
        gram_II: sum of x xᵀ, [I, I], float32, symmetric; or None. Its diagonal is `sumsq_I`.
    """

    tokens: int = 0
    sum_I: Tensor | None = None
    sumsq_I: Tensor | None = None
    gram_II: Tensor | None = None

    def __add__(self, other: Statistics) -> Statistics:
        if not self.tokens or not other.tokens:
            return self if self.tokens else other

        def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else a + b

        return Statistics(
            self.tokens + other.tokens,
            both(self.sum_I, other.sum_I),
            both(self.sumsq_I, other.sumsq_I),
            both(self.gram_II, other.gram_II),
        )

    @property
    def mean_I(self) -> Tensor:
        """Mean of the inputs, [I], float64; there must be a sum."""
        assert self.sum_I is not None
        return self.sum_I / max(self.tokens, 1)

    def centred(self) -> Statistics:
        """Return the same sums over the inputs less their mean; there must be a sum.

        >>> Statistics.of(torch.tensor([[1.0], [3.0]])).centred().gram_II
        tensor([[2.]])
        """
        mean_I, gram = self.mean_I, None
        if self.gram_II is not None:
            gram = (self.gram_II.double() - self.tokens * torch.outer(mean_I, mean_I)).to(self.gram_II.dtype)
            gram.diagonal().clamp_(min=0)
        sumsq = None if self.sumsq_I is None else (self.sumsq_I - self.tokens * mean_I.square()).clamp_(min=0)
        return Statistics(self.tokens, torch.zeros_like(mean_I), sumsq, gram)

    @staticmethod
    def of(x_TI: Tensor, needs: Collection[str] = (SUM, SUMSQ, GRAM)) -> Statistics:
        """Sum one batch of inputs [..., I].

        >>> Statistics.of(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sumsq_I
        tensor([10., 20.], dtype=torch.float64)
        """
        sums = Accumulator(needs)
        sums.add(x_TI)
        return sums.statistics()


class Accumulator:
    """Adds up the inputs of one matrix, batch after batch.

    A Gram matrix is symmetric, so only its upper triangle is computed, in panels of columns: with k
    panels (k + 1) / 2k of the full product's operations.
    """

    PANEL = 192

    def __init__(self, needs: Collection[str]) -> None:
        self.needs = frozenset(needs)
        self.tokens = 0
        self._sum: Tensor | None = None
        self._sumsq: Tensor | None = None
        self._upper: Tensor | None = None

    def add(self, x_TI: Tensor) -> None:
        """Add inputs [..., I] of any floating dtype."""
        x_TI = x_TI.detach().reshape(-1, x_TI.shape[-1])
        self.tokens += x_TI.shape[0]
        if self.needs:
            self._add_float(x_TI.float())

    def _add_float(self, x_TI: Tensor) -> None:
        columns = x_TI.shape[1]
        if SUM in self.needs:
            part = x_TI.sum(0).double()
            self._sum = part if self._sum is None else self._sum + part
        if GRAM in self.needs:
            if self._upper is None:
                self._upper = torch.zeros(columns, columns, dtype=x_TI.dtype, device=x_TI.device)
            panels = max(1, round(columns / self.PANEL))
            edges = [columns * p // panels for p in range(panels + 1)]
            for a, b in pairwise(edges):
                self._upper[a:b, a:].addmm_(x_TI[:, a:b].T, x_TI[:, a:])
        elif SUMSQ in self.needs:
            part = torch.linalg.vector_norm(x_TI, dim=0).double().square()
            self._sumsq = part if self._sumsq is None else self._sumsq + part

    def take(self, sums: Statistics) -> None:
        """Go on from sums of squares that were kept (no Gram matrix)."""
        self.tokens, self._sum, self._sumsq = sums.tokens, sums.sum_I, sums.sumsq_I

    def statistics(self) -> Statistics:
        """Return what has been summed so far."""
        gram = None
        if self._upper is not None:
            gram = torch.triu(self._upper)
            gram = gram + torch.triu(gram, 1).T
        sumsq = gram.diagonal().double() if gram is not None and SUMSQ in self.needs else self._sumsq
        return Statistics(self.tokens, self._sum, sumsq, gram)
