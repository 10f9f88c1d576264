"""SparseSwaps: exchange a kept weight of a row for a pruned one wherever that lowers the error of the outputs.

Zimmer et al. 2025, https://arxiv.org/abs/2512.10922. With r the pruned weights of a row (0 where kept) and c = G r,
its error is r G rᵀ, and to prune p and keep q in its place changes that by exactly

    2 w_p c_p + w_p² G_pp  -  2 w_q c_q + w_q² G_qq  -  2 w_p w_q G_pq.

Names: R rows, K candidates, M columns of one N:M group, C columns of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericsError, OptionError
from .patterns import NM, Pattern, Row
from .statistics import Statistics

CHUNK = 128
GAIN = 1e-6  # the least part of a row's error that a swap must take off, above the rounding of float32


def swaps(
    W_OI: Tensor,
    new_OI: Tensor,
    mask_OI: Tensor,
    statistics: Statistics,
    pattern: Pattern,
    *,
    sweeps: int = 100,
    candidates: int = 16,
) -> tuple[Tensor, Tensor]:
    """Improve a mask by swaps inside a row, or inside a group of N:M; kept weights are the original ones.

    A sweep swaps the best pair of every row (pattern ``row``), or of one group after the other (N:M). No row ends
    with a larger error. An update may follow: ``wanda+swaps+pcg``.

    Args:
        W_OI: the original weights, any floating dtype; not changed.
        new_OI: the weights so far; they are not used.
        mask_OI: the mask to begin with, True = keep; not changed.
        statistics: needs `gram_II` [in, in].
        pattern: ``row`` or N:M.
        sweeps: the most sweeps; it ends when no swap pays.
        candidates: of each row, how many kept and how many pruned weights, the best by themselves, are tried in
            pairs; N:M tries all.

    Returns:
        The weights [out, in], zero where pruned, and the mask [out, in].

    Raises:
        OptionError: no Gram matrix, another pattern, or an option out of range.
        NumericsError: the Gram matrix is not finite.
    """
    if statistics.gram_II is None:
        raise OptionError("swaps needs the inputs' Gram matrix (Statistics.gram_II), and there is none")
    if not isinstance(pattern, (Row, NM)):
        raise OptionError(
            f"swaps: works inside a row or an N:M group, so the pattern must be row or N:M, not {pattern}"
        )
    for name, value in (("sweeps", sweeps), ("candidates", candidates)):
        if value < 1:
            raise OptionError(f"swaps: {name} must be at least 1, not {value}")
    dtype = torch.promote_types(W_OI.dtype, torch.float32)
    w_OI, G_II = W_OI.detach().to(dtype), statistics.gram_II.to(dtype)
    if not torch.isfinite(G_II).all():
        raise NumericsError("the Gram matrix of the inputs holds NaN or Inf")

    keep_OI = mask_OI.clone()
    before_O = row_errors(w_OI, keep_OI, G_II)
    if isinstance(pattern, NM):
        for _ in range(sweeps):
            if not sweep_groups(w_OI, keep_OI, G_II, pattern.m, GAIN * before_O):
                break
    else:
        swap_in_rows(w_OI, keep_OI, G_II, sweeps, candidates, GAIN * before_O)
    better_O = row_errors(w_OI, keep_OI, G_II) <= before_O
    keep_OI = torch.where(better_O[:, None], keep_OI, mask_OI)
    return torch.where(keep_OI, W_OI.detach(), 0), keep_OI


def row_errors(w_OI: Tensor, keep_OI: Tensor, G_II: Tensor) -> Tensor:
    """The error of each row's output when what is not kept is zero, [O]."""
    pruned_OI = torch.where(keep_OI, 0, w_OI)
    return (pruned_OI @ G_II * pruned_OI).sum(1)


def swap_costs(w_OI: Tensor, keep_OI: Tensor, c_OI: Tensor, diagonal_I: Tensor) -> tuple[Tensor, Tensor]:
    """What it costs alone to prune each kept weight, and to keep each pruned one; inf for the others."""
    square_OI, cross_OI = w_OI.square() * diagonal_I, 2 * w_OI * c_OI
    return (
        torch.where(keep_OI, square_OI + cross_OI, torch.inf),
        torch.where(keep_OI, torch.inf, square_OI - cross_OI),
    )


def swap_in_rows(w_OI: Tensor, keep_OI: Tensor, G_II: Tensor, sweeps: int, candidates: int, least_O: Tensor) -> None:
    """Swap in place the best pair of every row, again and again; a row that finds none rests."""
    rows = torch.arange(len(w_OI), device=w_OI.device)
    w_RI, keep_RI, least_R, diagonal_I = w_OI, keep_OI.clone(), least_O, G_II.diagonal()
    c_RI = torch.where(keep_RI, 0, w_RI) @ G_II
    k = min(candidates, w_OI.shape[1])
    for _ in range(sweeps):
        out_RI, in_RI = swap_costs(w_RI, keep_RI, c_RI, diagonal_I)
        (out_RK, p_RK), (in_RK, q_RK) = out_RI.topk(k, largest=False), in_RI.topk(k, largest=False)
        pair_RKK = w_RI.gather(1, p_RK)[:, :, None] * w_RI.gather(1, q_RK)[:, None, :]
        pair_RKK *= G_II[p_RK[:, :, None], q_RK[:, None, :]]
        change_R, best_R = (out_RK[:, :, None] + in_RK[:, None, :]).sub_(pair_RKK, alpha=2).flatten(1).min(1)
        p_R1 = p_RK.gather(1, best_R[:, None] // k)
        q_R1 = q_RK.gather(1, best_R[:, None] % k)
        alive_R = change_R < -least_R
        if not alive_R.any():
            break
        if not alive_R.all():
            rows, w_RI, keep_RI, c_RI, least_R, p_R1, q_R1 = (
                t[alive_R] for t in (rows, w_RI, keep_RI, c_RI, least_R, p_R1, q_R1)
            )
        keep_RI.scatter_(1, p_R1, False).scatter_(1, q_R1, True)
        keep_OI[rows] = keep_RI
        c_RI += w_RI.gather(1, p_R1) * G_II[p_R1[:, 0]] - w_RI.gather(1, q_R1) * G_II[q_R1[:, 0]]


def sweep_groups(w_OI: Tensor, keep_OI: Tensor, G_II: Tensor, m: int, least_O: Tensor) -> bool:
    """Swap in place the best pair of every group of every row, group after group; return whether any was.

    A swap moves c in all columns of its row: inside a chunk at once, in the chunks to come by one product.
    """
    moved = False
    c_OI = torch.where(keep_OI, 0, w_OI) @ G_II
    step = m * max(1, CHUNK // m)
    for start in range(0, w_OI.shape[1], step):
        chunk = slice(start, start + step)
        w_OC, keep_OC, c_OC, G_CC = w_OI[:, chunk], keep_OI[:, chunk], c_OI[:, chunk], G_II[chunk, chunk]
        before_OC = keep_OC.clone()
        for column in range(0, w_OC.shape[1], m):
            group = slice(column, column + m)
            change_OM = swap_in_group(w_OC[:, group], keep_OC[:, group], c_OC[:, group], G_CC[group, group], least_O)
            c_OC += change_OM @ G_CC[group]
        change_OC = w_OC * (before_OC.to(w_OC.dtype) - keep_OC.to(w_OC.dtype))
        c_OI[:, start + step :] += change_OC @ G_II[chunk, start + step :]
        moved |= bool((before_OC != keep_OC).any())
    return moved


def swap_in_group(w_OM: Tensor, keep_OM: Tensor, c_OM: Tensor, G_MM: Tensor, least_O: Tensor) -> Tensor:
    """Swap in place the best pair of a group in every row where it pays, and return the change of r, [O, M]."""
    out_OM, in_OM = swap_costs(w_OM, keep_OM, c_OM, G_MM.diagonal())
    pair_OMM = w_OM[:, :, None] * w_OM[:, None, :] * G_MM
    change_O, best_O = (out_OM[:, :, None] + in_OM[:, None, :]).sub_(pair_OMM, alpha=2).flatten(1).min(1)
    columns = torch.arange(w_OM.shape[1], device=w_OM.device)
    pays_O1 = (change_O < -least_O)[:, None]
    out_of = pays_O1 & (columns == best_O[:, None] // len(columns))
    into = pays_O1 & (columns == best_O[:, None] % len(columns))
    keep_OM.logical_and_(~out_of).logical_or_(into)
    return w_OM * (out_of.to(w_OM.dtype) - into.to(w_OM.dtype))
