"""Stages that follow a method: better values for the weights that a mask keeps, or a better mask. Pure.

``W_OI, W'_OI, mask_OI, statistics, pattern, **options -> W'_OI, mask_OI``: from the original weights, and what the
method and the stages before made of them. Each lowers the error of the outputs, tr((W' - W) G (W' - W)ᵀ), as far as
its G can be trusted.

Names: W_OI weights [out, in]; H_II the damped Gram matrix of the inputs; R rows of a matrix that still move.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import OptionError
from .patterns import Pattern
from .sparsegpt import damped, sparsegpt
from .statistics import Statistics
from .swaps import swaps

Stage = Callable[..., tuple[Tensor, Tensor]]
ALIKE = 8.0  # tokens; with 1, a solve on two rows of C4 is worse than none (SmolLM2; docs/log.md, 2026-11-23)
TOLERANCE = 8  # roundings: a row whose residual is so small a part of its right-hand side is solved


def pcg(
    W_OI: Tensor,
    new_OI: Tensor,
    mask_OI: Tensor,
    statistics: Statistics,
    pattern: Pattern,
    *,
    iterations: int = 20,
    damping: float = 0.01,
    alike: float = ALIKE,
) -> tuple[Tensor, Tensor]:
    """Solve for the kept weights by conjugate gradients on the mask: Meng et al. 2024, algorithm 2.

    https://arxiv.org/abs/2406.07831. All rows at once, with step sizes of their own as in the authors' code (the
    paper prints one for all). It starts at W'. Deviation: correlations that so few tokens cannot tell from noise count
    for less (`shrink`), so that with hardly any the weights stay as they are. By the matrix so shrunk no row ends worse
    than it began.

    Args:
        W_OI: the original weights, any floating dtype; not changed.
        new_OI: the weights so far.
        mask_OI: True = keep; stays as it is.
        statistics: needs `gram_II` [in, in].
        pattern: of the mask; any.
        iterations: the most steps; each is a product with the Gram matrix.
        damping: what is added to the diagonal of the Gram matrix, as a fraction of its mean.
        alike: tokens of a text that count as one observation (they resemble each other); 0 trusts the Gram matrix.

    Returns:
        The new weights [out, in] in float32 or better, and the mask [out, in].

    Raises:
        OptionError: no Gram matrix, or an option out of range.
        NumericsError: the Gram matrix is not finite.
    """
    if iterations < 1:
        raise OptionError(f"pcg: iterations must be at least 1, not {iterations}")
    H_II, norm_I = normalised("pcg", W_OI, statistics, damping, alike)
    target_OI = W_OI.detach().to(H_II.dtype) * norm_I
    start_OI = new_OI.to(H_II.dtype) * norm_I * mask_OI
    solved_OI = conjugate_gradients(target_OI, start_OI, mask_OI, H_II, iterations) / norm_I
    return torch.where(mask_OI, solved_OI, 0), mask_OI


def obs(
    W_OI: Tensor,
    new_OI: Tensor,
    mask_OI: Tensor,
    statistics: Statistics,
    pattern: Pattern,
    *,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Update the kept weights by SparseGPT's sweep over the original ones: https://arxiv.org/abs/2301.00774.

    Whatever stood before has a say by its mask alone. Arguments are those of `sparsegpt`.
    """
    return sparsegpt(W_OI, statistics, 0.0, pattern, damping=damping, block_size=block_size, mask=mask_OI)


STAGES: dict[str, Stage] = {"pcg": pcg, "obs": obs, "swaps": swaps}


def normalised(name: str, W_OI: Tensor, statistics: Statistics, damping: float, alike: float) -> tuple[Tensor, Tensor]:
    """Return the damped Gram matrix with a diagonal of ones, H / (n nᵀ), and n = sqrt(diag H), for `name`'s errors.

    In the columns so scaled, Jacobi's preconditioner is the identity. float32, or float64 for weights in float64.
    """
    if not 0 <= alike < math.inf:
        raise OptionError(f"{name}: alike must not be negative or infinite, not {alike}")
    if statistics.gram_II is None:
        raise OptionError(f"{name} needs the inputs' Gram matrix (Statistics.gram_II), and there is none")
    if not 0 < damping < math.inf:
        raise OptionError(f"{name}: damping must be positive and finite, not {damping}")
    H_II = next(damped(statistics.gram_II, damping, dtype=torch.promote_types(W_OI.dtype, torch.float32)))
    norm_I = H_II.diagonal().sqrt()
    H_II.div_(norm_I).div_(norm_I[:, None])
    if alike and statistics.tokens:
        shrink(H_II, statistics.gram_II.diagonal() / norm_I.square(), statistics.tokens / alike)
    return H_II, norm_I


def shrink(H_II: Tensor, observed_I: Tensor, samples: float) -> None:
    """Draw correlations towards zero by the share of their squares that chance gives so few samples, in place.

    The estimate of Schäfer and Strimmer 2005, https://doi.org/10.2202/1544-6115.1175, of the share that makes the
    expected squared error least; deviation: the variance of each correlation is that of normal inputs.

    Args:
        H_II: with a diagonal of ones.
        observed_I: the part of the diagonal that is of the inputs and not damping, which has no chance in it.
        samples: independent observations that it was made of.
    """
    squares = float(torch.linalg.matrix_norm(H_II)) ** 2 - len(H_II)
    by_chance = (float(observed_I.sum()) ** 2 - float(observed_I.square().sum()) + squares) / samples
    share = by_chance / squares if by_chance < squares else 1.0
    H_II.mul_(1 - share).diagonal().add_(share)


def conjugate_gradients(target_OI: Tensor, start_OI: Tensor, mask_OI: Tensor, H_II: Tensor, iterations: int) -> Tensor:
    """Minimise (x - target) H (x - target)ᵀ of each row x over the weights in the mask, from `start_OI`.

    Args:
        target_OI: the dense weights.
        start_OI: zero outside the mask.
        mask_OI: True = free.
        H_II: positive definite, with a diagonal of ones.
        iterations: the most steps.
    """
    pull_OI = target_OI @ H_II
    enough_O1 = (TOLERANCE * torch.finfo(H_II.dtype).eps) ** 2 * pull_OI.square().sum(1, keepdim=True)
    full_OI = pull_OI - start_OI @ H_II
    before_O = ((target_OI - start_OI) * full_OI).sum(1)
    x_OI, residual_OI = start_OI.clone(), full_OI * mask_OI
    direction_OI, square_O1 = residual_OI, residual_OI.square().sum(1, keepdim=True)
    for _ in range(iterations):
        moving_O1 = square_O1 > enough_O1
        if not moving_O1.any():
            break
        image_OI = (direction_OI @ H_II) * mask_OI
        curvature_O1 = (direction_OI * image_OI).sum(1, keepdim=True)
        step_O1 = torch.where(moving_O1 & (curvature_O1 > 0), square_O1 / curvature_O1, 0)
        x_OI.addcmul_(step_O1, direction_OI)
        residual_OI = residual_OI - step_O1 * image_OI
        last_O1, square_O1 = square_O1, residual_OI.square().sum(1, keepdim=True)
        direction_OI = residual_OI + torch.where(moving_O1, square_O1 / last_O1, 0) * direction_OI
    error_OI = x_OI - target_OI
    better_O = (error_OI * (error_OI @ H_II)).sum(1) <= before_O  # steps lower it but for rounding
    return torch.where(better_O[:, None], x_OI, start_OI)
