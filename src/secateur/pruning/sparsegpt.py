"""SparseGPT: prune columns from left to right, and let the columns to their right make up for each.

Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774, algorithm 1.

Names: W_OI weights [out, in]; H_II the damped Gram matrix of the inputs; U_II the upper Cholesky factor of
its inverse, H⁻¹ = Uᵀ U, so that U_jj² is the j-th diagonal entry of the inverse of H restricted to columns
j and later. Inside, the weights are held transposed, columns first, so that a column is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import NumericsError, OptionError
from .patterns import NM, Pattern
from .statistics import Statistics

LEAF = 8


def sparsegpt(
    W_OI: Tensor,
    statistics: Statistics,
    sparsity: float,
    pattern: Pattern,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune `W_OI` by SparseGPT and update what is kept.

    Within each chunk of `block_size` columns (rounded to a multiple of the pattern's selection width) the
    saliency is W² / U_jj² of the weights as updated so far; under N:M it is taken anew for every M
    columns. Weights of columns that no token reached are set to zero.

    The authors' code does the same column by column; here a chunk is halved again and again, so that
    nearly all of the update is a few matrix products. Their order of operations differs, their result
    does not. Two deviations: counts are exact where theirs prune all ties of the threshold, and a
    factorisation that fails is repeated with ten times the damping, then in float64.

    Args:
        W_OI: weights [out, in], any floating dtype; not changed.
        statistics: needs `gram_II` [in, in].
        sparsity: fraction to prune, in [0, 1); N:M ignores it.
        pattern: where zeros may lie.
        damping: what is added to the diagonal of the Gram matrix, as a fraction of its mean.
        block_size: columns in a chunk.
        mask: keep exactly these weights (True = keep) and only update them.

    Returns:
        The new weights [out, in] in float32 or better, and the mask [out, in].

    Raises:
        OptionError: no Gram matrix, or an option out of range.
        NumericsError: no factorisation succeeds.
    """
    if statistics.gram_II is None:
        raise OptionError("sparsegpt needs the inputs' Gram matrix (Statistics.gram_II), and there is none")
    if not 0 < damping < math.inf:
        raise OptionError(f"sparsegpt: damping must be positive and finite, not {damping}")
    if block_size < 1:
        raise OptionError(f"sparsegpt: block_size must be at least 1, not {block_size}")
    dead_I = statistics.gram_II.diagonal() == 0
    U_II = inverse_factor(statistics.gram_II, damping)
    W_IO = W_OI.detach().T.to(U_II.dtype).clone(memory_format=torch.contiguous_format)
    W_IO[dead_I] = 0
    keep_IO = (
        torch.ones_like(W_IO, dtype=torch.bool) if mask is None else mask.T.clone(memory_format=torch.contiguous_format)
    )

    width = pattern.selection_width or 1
    step = max(width, block_size // width * width)
    groups = pattern if mask is None and isinstance(pattern, NM) else None
    for start in range(0, len(W_IO), step):
        chunk = slice(start, start + step)
        U_CC = U_II[chunk, chunk]
        if mask is None and groups is None:
            keep_IO[chunk] = pattern.mask(_saliency(W_IO[chunk], U_CC).T, sparsity, start).T
        error_CO = _sweep(W_IO[chunk], U_CC, keep_IO[chunk], groups)
        W_IO[start + step :].addmm_(U_II[chunk, start + step :].T, error_CO, alpha=-1)
    W_IO[~keep_IO] = 0
    return W_IO.T.contiguous(), keep_IO.T.contiguous()


def _saliency(W_CO: Tensor, U_CC: Tensor) -> Tensor:
    """|W / U_jj|, whose square is what pruning a weight costs once the columns to its right have made up for it."""
    return (W_CO / U_CC.diagonal()[:, None]).abs()


def _sweep(W_CO: Tensor, U_CC: Tensor, keep_CO: Tensor, groups: NM | None) -> Tensor:
    """Prune the columns C in order, in place, and return their errors (w - kept) / U_jj, [C, O].

    Halves recursively, so that all but the updates inside a leaf are matrix products. With `groups`, each
    leaf is a whole number of N:M groups and chooses their masks when it comes to them.
    """
    columns = len(W_CO)
    unit = groups.m * max(1, LEAF // groups.m) if groups else LEAF
    if columns > unit:
        middle = -(-columns // (2 * unit)) * unit
        left = _sweep(W_CO[:middle], U_CC[:middle, :middle], keep_CO[:middle], groups)
        W_CO[middle:].addmm_(U_CC[:middle, middle:].T, left, alpha=-1)
        right = _sweep(W_CO[middle:], U_CC[middle:, middle:], keep_CO[middle:], groups)
        return torch.cat((left, right))
    error_CO = torch.empty_like(W_CO)
    for j in range(columns):
        if groups and j % groups.m == 0:
            group = slice(j, j + groups.m)
            keep_CO[group] = groups.mask(_saliency(W_CO[group], U_CC[group, group]).T, groups.fixed_sparsity).T
        torch.mul(W_CO[j], ~keep_CO[j], out=error_CO[j]).div_(U_CC[j, j])
        W_CO[j + 1 :].addr_(U_CC[j, j + 1 :], error_CO[j], alpha=-1)
    return error_CO


def inverse_factor(gram_II: Tensor, damping: float, *, unseen: float = 1.0) -> Tensor:
    """Return upper triangular U with (G + d I)⁻¹ = Uᵀ U, where d = damping * mean(diag G).

    The mean is that of the columns that had input; the others take it as their diagonal (the authors' code
    gives them 1, which depends on the inputs' scale). If the Cholesky factorisation fails, the damping is
    multiplied by ten, and after that float64 is used.

    Raises:
        NumericsError: the Gram matrix is not finite, or no attempt succeeds.
    """
    for H_II in damped(gram_II, damping, unseen=unseen):
        # With J the reversal of rows and columns and J H J = L Lᵀ, U = (J L J)⁻¹: one factorisation and
        # one triangular inverse instead of the authors' two factorisations and a full inverse.
        L_II, info = torch.linalg.cholesky_ex(H_II.flip(0, 1))
        if info.item() == 0:
            U_II = _inverse_lower(L_II).flip(0, 1).contiguous()
            if torch.isfinite(U_II).all():
                return U_II
    raise NumericsError(
        "the inputs' Gram matrix cannot be factorised even with ten times the damping in float64; "
        "raise the damping (sparsegpt:damping=0.1) or use more calibration text"
    )


def damped(
    gram_II: Tensor, damping: float, *, unseen: float = 1.0, dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """Yield G + d I, d = damping * mean(diag G); for those that fail to factorise it, with 10 d, and then in float64.

    The mean is that of the columns that had input; the others get `unseen` times it as their diagonal in G.

    Raises:
        NumericsError: the Gram matrix is not finite.
    """
    if not torch.isfinite(gram_II).all():
        raise NumericsError("the Gram matrix of the inputs holds NaN or Inf")
    for kind, factor in ((dtype, 1), (dtype, 10), (torch.float64, 10)):
        H_II = gram_II.to(kind, copy=True)
        diagonal_I = H_II.diagonal()
        alive_I = diagonal_I > 0
        mean = diagonal_I[alive_I].mean() if alive_I.any() else torch.ones((), dtype=kind)
        diagonal_I[~alive_I] = unseen * mean
        diagonal_I += factor * damping * mean
        yield H_II


def _inverse_lower(L_II: Tensor) -> Tensor:
    """Invert a lower triangular matrix by halves, in matrix products: several times faster than a solve."""
    size = len(L_II)
    if size <= 128:
        identity = torch.eye(size, dtype=L_II.dtype, device=L_II.device)
        small: Tensor = torch.linalg.solve_triangular(L_II, identity, upper=False)
        return small
    half = size // 2
    top, bottom = _inverse_lower(L_II[:half, :half]), _inverse_lower(L_II[half:, half:])
    inverse_II = torch.zeros_like(L_II)
    inverse_II[:half, :half] = top
    inverse_II[half:, half:] = bottom
    inverse_II[half:, :half] = bottom @ (L_II[half:, :half] @ top).neg_()
    return inverse_II
