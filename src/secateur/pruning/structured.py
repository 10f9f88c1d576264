"""Structured pruning: whole groups of a matrix's columns go, and what reads them shrinks.

A neuron of an MLP is one column of the matrix that reads it (``down_proj``); a group of attention heads is as many
neighbouring columns of ``o_proj``. Every criterion is a method as in `methods`: pure, of one matrix and the sums over
its inputs. Where the caller can fold the inputs' mean into a bias, it hands over centred sums (`Statistics.centred`),
and every formula here holds as it stands.

Names: O output rows, I input columns, N groups, K kept columns, R removed columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import NumericsError, OptionError, nearest
from .methods import Method, one_shot
from .patterns import Pattern, lowest
from .scores import magnitude, wanda
from .sparsegpt import damped, inverse_factor
from .statistics import GRAM, SUM, SUMSQ, Statistics

DAMPING = 0.01
ROUNDS = 16  # in which `obs` removes columns; with 384 the error is the same to three digits (SmolLM2)


@dataclass(frozen=True)
class Columns:
    """Groups of `width` neighbouring columns go as a whole: round(s * N) of the N groups.

    A group's score is the sum of its scores.
    """

    width: int

    fixed_sparsity = None

    @property
    def selection_width(self) -> int:
        return self.width

    def mask(self, score_OI: Tensor, sparsity: float, start: int = 0) -> Tensor:
        gone_N = lowest(self.sums(score_OI.double().sum(0))[None], self.removed(score_OI.shape[1], sparsity))[0]
        return self.columns(~gone_N).expand(score_OI.shape)

    def sums(self, values_I: Tensor) -> Tensor:
        """Add up values of columns within each group, [N]."""
        return values_I.reshape(-1, self.width).sum(1)

    def columns(self, of_N: Tensor) -> Tensor:
        """Give each column what its group has, [I]."""
        return of_N.repeat_interleave(self.width)

    def removed(self, columns: int, sparsity: float) -> int:
        """How many groups go."""
        return round(sparsity * (columns // self.width))

    def __str__(self) -> str:
        return f"columns:{self.width}"


def flap(W_OI: Tensor, statistics: Statistics) -> Tensor:
    """Score Var(x_j) W_ij², the output's fluctuation: An et al. 2024, eq. 5, https://arxiv.org/abs/2312.11983.

    The authors add heads up after standardising each layer and rank them together with neurons; here a ranking stays
    within one matrix, so that all blocks keep one width.
    """
    assert statistics.sum_I is not None and statistics.sumsq_I is not None
    mean_I = statistics.sum_I / statistics.tokens
    variance_I = (statistics.sumsq_I / statistics.tokens - mean_I.square()).clamp_(min=0).float()
    return W_OI.float().square() * variance_I


def random(W_OI: Tensor, statistics: Statistics, *, seed: int = 0) -> Tensor:
    """Score by chance, the same for every row: what any criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(W_OI.shape[1], generator=generator, dtype=torch.float32).to(W_OI.device).expand(W_OI.shape)


def obs(
    W_OI: Tensor, statistics: Statistics, sparsity: float, pattern: Pattern, *, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Remove the groups whose removal costs least once all other columns have made up for it, a few at a time.

    Removing columns S costs tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ) with H = G + damping * mean(diag G) * I; the others then change by
    - W_S (H⁻¹_SS)⁻¹ H⁻¹_S,: and H⁻¹ loses its part in S. Hassibi & Stork 1992 for one weight; for groups Kurtic et al.
    2023 (ZipLM, eq. 2 to 4), https://arxiv.org/abs/2302.04089, who remove one group at a time where this removes 1/16
    of them.

    Args:
        W_OI: weights.
        statistics: with a Gram matrix.
        sparsity: share of the groups that goes.
        pattern: `Columns`.
        damping: share of the mean diagonal that is added to the diagonal.

    Returns:
        The weights after the last round, zero where removed, and the mask.
    """
    assert isinstance(pattern, Columns) and statistics.gram_II is not None
    width = pattern.width
    U_II = inverse_factor(statistics.gram_II, damping, unseen=0)
    inverse_II = U_II.T @ U_II
    W_OI = W_OI.float().clone()
    left = pattern.removed(W_OI.shape[1], sparsity)
    gone_N = torch.zeros(W_OI.shape[1] // width, dtype=torch.bool, device=W_OI.device)
    step = max(1, -(-left // ROUNDS))
    while left > 0:
        cost_N = _cost(W_OI, inverse_II, width).masked_fill_(gone_N, torch.inf)
        chosen_N = lowest(cost_N[None], min(step, left))[0]
        S = pattern.columns(chosen_N).nonzero()[:, 0]
        share_SI = _solve(inverse_II[S][:, S], inverse_II[S])
        W_OI -= W_OI[:, S] @ share_SI
        inverse_II -= inverse_II[:, S] @ share_SI
        gone_N |= chosen_N
        W_OI[:, S] = 0
        inverse_II[S] = inverse_II[:, S] = 0
        inverse_II.diagonal()[S] = 1  # so that it can be divided by
        left -= len(S) // width
    mask_OI = pattern.columns(~gone_N).expand(W_OI.shape)
    return torch.where(mask_OI, W_OI, 0), mask_OI


def _cost(W_OI: Tensor, inverse_II: Tensor, width: int) -> Tensor:
    """tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ) for each group S of `width` columns, [N]."""
    if width == 1:
        return W_OI.square().sum(0) / inverse_II.diagonal()
    count = W_OI.shape[1] // width
    inner_NSS = inverse_II.reshape(count, width, count, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    W_NSO = W_OI.T.reshape(count, width, -1)
    return (W_NSO * _solve(inner_NSS, W_NSO)).sum((1, 2))


def _solve(A_SS: Tensor, B_SC: Tensor) -> Tensor:
    """A⁻¹ B for symmetric positive definite A, or a batch of them.

    Raises:
        NumericsError: rounding has taken away that A is positive definite.
    """
    L_SS, info = torch.linalg.cholesky_ex(A_SS)
    if info.any():
        raise NumericsError("the inverse of the inputs' Gram matrix has lost its digits; use more calibration text")
    return torch.cholesky_solve(B_SC, L_SS)


def compensate(W_OI: Tensor, gram_II: Tensor, kept_I: Tensor, damping: float = DAMPING) -> Tensor:
    """Solve the kept columns anew by least squares, so that they make up for the removed ones.

    W'_K = W H_:,K (H_KK)⁻¹ with H = G + damping * mean(diag G) * I, the minimum of tr((W - W') H (W - W')ᵀ): with no
    column removed it is W itself.

    Args:
        W_OI: weights before the cut.
        gram_II: sum of x xᵀ of their inputs.
        kept_I: True for kept columns.
        damping: share of the mean diagonal that is added to the diagonal.

    Returns:
        The new weights, [O, I], zero in removed columns.

    Raises:
        NumericsError: no attempt to factorise succeeds.
    """
    K, R = kept_I.nonzero()[:, 0], (~kept_I).nonzero()[:, 0]
    new_OI = torch.zeros_like(W_OI, dtype=torch.float32)
    for H_II in damped(gram_II, damping, unseen=0):
        L_KK, info = torch.linalg.cholesky_ex(H_II[K][:, K])
        if info.item() == 0:
            share_KR = torch.cholesky_solve(H_II[K][:, R], L_KK)
            W = W_OI.to(H_II.dtype)
            new_OI[:, K] = (W[:, K] + W[:, R] @ share_KR.T).float()
            if torch.isfinite(new_OI).all():
                return new_OI
    raise NumericsError("the inputs' Gram matrix cannot be factorised, so nothing can make up for a cut; use more text")


CRITERIA: Mapping[str, Method] = {
    "magnitude": Method(one_shot(magnitude), paper="https://arxiv.org/abs/1608.08710"),
    "wanda-sp": Method(one_shot(wanda), frozenset({SUMSQ}), paper="https://arxiv.org/abs/2312.11983"),
    "flap": Method(one_shot(flap), frozenset({SUM, SUMSQ}), paper="https://arxiv.org/abs/2312.11983"),
    "obs": Method(obs, frozenset({GRAM}), paper="https://arxiv.org/abs/2302.04089"),
    "random": Method(one_shot(random)),
}


def structured(criterion: str, *, compensated: bool, seed: int = 0) -> Method:
    """Return the method that removes groups of columns by a criterion.

    Args:
        criterion: a name in `CRITERIA`.
        compensated: the kept columns are solved anew (`compensate`); otherwise they stay as they are.
        seed: of ``random``.

    Raises:
        OptionError: the criterion is unknown.
    """
    if criterion not in CRITERIA:
        raise OptionError(f"unknown criterion {criterion!r}: {nearest(criterion, CRITERIA)}")
    chosen = CRITERIA[criterion]
    choose = partial(chosen.prune, seed=seed) if criterion == "random" else chosen.prune
    needs = chosen.needs | ({SUM, GRAM} if compensated else frozenset())
    return Method(_cut(choose, compensated), needs, paper=chosen.paper)


def _cut(choose: Callable[..., tuple[Tensor, Tensor]], compensated: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def prune(W_OI: Tensor, statistics: Statistics, sparsity: float, pattern: Pattern) -> tuple[Tensor, Tensor]:
        _, mask_OI = choose(W_OI, statistics, sparsity, pattern)
        if compensated:
            assert statistics.gram_II is not None
            return compensate(W_OI, statistics.gram_II, mask_OI[0]), mask_OI
        return torch.where(mask_OI, W_OI, 0), mask_OI

    return prune
