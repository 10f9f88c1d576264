"""ALPS: ADMM between the best weights and the best mask, and then the best weights on the mask.

Meng et al. 2024, https://arxiv.org/abs/2406.07831, algorithms 1 and 2.

Names, in columns scaled to a Gram matrix with a diagonal of ones: T_OI the dense weights; B_OI the weights that
answer to the inputs; D_OI those that keep to the mask; V_OI the multipliers that draw the two together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import OptionError
from .patterns import Pattern
from .statistics import Statistics
from .updates import ALIKE, conjugate_gradients, normalised

EVERY = 3  # iterations between two looks at the mask
LATE, SETTLED = 30, 3e-4  # after that iteration, so small a part of the mask may still move
SOLVE = 10  # iterations of the solve on the mask
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # where more than that part of the mask moved, rho grows so


def alps(
    W_OI: Tensor,
    statistics: Statistics,
    sparsity: float,
    pattern: Pattern,
    *,
    damping: float = 0.01,
    iterations: int = 300,
    rho: float = 0.1,
    alike: float = ALIKE,
) -> tuple[Tensor, Tensor]:
    """Prune `W_OI` by ALPS and update what is kept.

    As in the authors' code: damping is a fraction of the mean diagonal (the paper: of its sum), and while the mask
    has hardly moved, rho falls to a fifth and all begins anew. Deviations: it does so too where nothing moved at all
    (the code goes on from there), any pattern is a projection, and the last mask and the start of the last solve are
    those of D, as the paper has them (the code: of B), and correlations that so few tokens cannot tell from noise
    count for less, as in `pcg`.

    Args:
        W_OI: weights [out, in], any floating dtype; not changed.
        statistics: needs `gram_II` [in, in].
        sparsity: fraction to prune, in [0, 1); N:M ignores it.
        pattern: where zeros may lie.
        damping: what is added to the diagonal of the Gram matrix, as a fraction of its mean.
        iterations: the most of ADMM; it ends when the mask rests.
        rho: the penalty to begin with.
        alike: tokens of a text that count as one observation; 0 trusts the Gram matrix.

    Returns:
        The new weights [out, in] in float32 or better, and the mask [out, in].

    Raises:
        OptionError: no Gram matrix, or an option out of range.
        NumericsError: the Gram matrix is not finite.
    """
    if iterations < 1:
        raise OptionError(f"alps: iterations must be at least 1, not {iterations}")
    if not 0 < rho < math.inf:
        raise OptionError(f"alps: rho must be positive and finite, not {rho}")
    H_II, norm_I = normalised("alps", W_OI, statistics, damping, alike)
    T_OI = W_OI.detach().to(H_II.dtype) * norm_I
    D_OI, mask_OI = _admm(T_OI, H_II, sparsity, pattern, iterations, rho)
    solved_OI = conjugate_gradients(T_OI, D_OI, mask_OI, H_II, SOLVE) / norm_I
    return torch.where(mask_OI, solved_OI, 0), mask_OI


def _admm(
    T_OI: Tensor, H_II: Tensor, sparsity: float, pattern: Pattern, iterations: int, rho: float
) -> tuple[Tensor, Tensor]:
    """Return weights and the mask that they keep to."""
    first_OI = seen_OI = mask_OI = pattern.mask(T_OI.abs(), sparsity)
    kept = int(mask_OI.count_nonzero())
    D_OI, V_OI = T_OI * mask_OI, torch.zeros_like(T_OI)
    if kept in (0, mask_OI.numel()):
        return D_OI, mask_OI
    eigenvalues_I, Q_II = (t.to(H_II.dtype) for t in torch.linalg.eigh(H_II.double()))
    pull_OI, raised, M_II = T_OI @ H_II, False, _inverse(eigenvalues_I, Q_II, rho)
    for i in range(1, iterations + 1):
        B_OI = (pull_OI - V_OI).add_(D_OI, alpha=rho) @ M_II
        D_OI = torch.add(B_OI, V_OI, alpha=1 / rho)
        mask_OI = pattern.mask(D_OI.abs(), sparsity)
        D_OI *= mask_OI
        V_OI.add_(B_OI, alpha=rho).sub_(D_OI, alpha=rho)
        if i % EVERY:
            continue
        moved = int((mask_OI ^ seen_OI).count_nonzero()) / kept
        seen_OI = mask_OI
        if (raised and not moved) or (i > LATE and moved < SETTLED) or i == iterations:
            break
        if raised or moved > GROWTH[1][0]:
            raised = True
            rho *= next(factor for share, factor in GROWTH if moved > share)
        else:
            rho /= 5
            D_OI, V_OI, seen_OI = T_OI * first_OI, torch.zeros_like(T_OI), first_OI
        M_II = _inverse(eigenvalues_I, Q_II, rho)
    return D_OI, mask_OI


def _inverse(eigenvalues_I: Tensor, Q_II: Tensor, rho: float) -> Tensor:
    """Return (H + rho I)⁻¹ from the eigenvalues and eigenvectors of H."""
    return (Q_II / (eigenvalues_I + rho)) @ Q_II.T
