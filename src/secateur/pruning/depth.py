"""Allocations by rule: a sparsity for each block, from its place or from one number that was measured of it.

``linear``  rises or falls evenly with depth: ATP, Huang et al. 2025, https://arxiv.org/abs/2502.14770
``owl``     spares blocks with many outliers: Yin et al. 2024, https://arxiv.org/abs/2310.05175
``alpha``   spares blocks whose spectra have heavy tails: AlphaPruning, Lu et al. 2024, https://arxiv.org/abs/2410.10912

Of every rule the mean, weighted by the blocks' weights, is the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import NumericsError, OptionError
from .allocation import MOST, Target, balanced
from .patterns import NM
from .scores import wanda
from .statistics import Statistics

OUTLIER = 5.0  # times the mean score: OWL's M
LAM = 0.08  # of OWL, as for LLaMA-7B at 0.7
EPS = 0.3  # of AlphaPruning
BINS = 100  # of the histogram whose peak begins the tail
ROUNDING = 1e-10  # of the largest eigenvalue: less is no eigenvalue but rounding


def linear(weights: Sequence[int], target: float, slope: float) -> list[float]:
    """Give block i of L the sparsity ``target + slope * (2 i / (L - 1) - 1)``, shifted to the mean.

    >>> [round(s, 6) for s in linear([8, 8, 8], 0.5, 0.2)]
    [0.3, 0.5, 0.7]
    """
    last = max(len(weights) - 1, 1)
    return balanced([target + slope * (2 * i / last - 1) for i in range(len(weights))], weights, target)


def owl(outlier_ratios: Sequence[float], weights: Sequence[int], target: float, lam: float = LAM) -> list[float]:
    """Let the kept share rise with a block's outlier ratio, by `lam` to either side at most, before the shift.

    >>> [round(s, 6) for s in owl([0.01, 0.02, 0.05], [8, 8, 8], 0.7)]
    [0.766667, 0.726667, 0.606667]
    """
    least, width = min(outlier_ratios), max(outlier_ratios) - min(outlier_ratios)
    if not width:
        return [target] * len(weights)
    kept = [(ratio - least) / width * 2 * lam for ratio in outlier_ratios]
    mean = sum(kept) / len(kept)
    return balanced([target - (share - mean) for share in kept], weights, target)


def alpha(alphas: Sequence[float], weights: Sequence[int], target: float, eps: float = EPS) -> list[float]:
    """Let sparsity rise with a block's tail exponent, from (1 - eps) to (1 + eps) times a common factor.

    A smaller exponent is a heavier tail, which better trained matrices have.

    >>> [round(s, 6) for s in alpha([2.0, 3.0, 4.0], [8, 8, 8], 0.5)]
    [0.35, 0.5, 0.65]
    """
    least, width = min(alphas), max(alphas) - min(alphas)
    if not width:
        return [target] * len(weights)
    ratios = [1 - eps + (value - least) / width * 2 * eps for value in alphas]
    factor = target * sum(weights) / sum(ratio * count for ratio, count in zip(ratios, weights, strict=True))
    return balanced([factor * ratio for ratio in ratios], weights, target)


def outlier_ratio(matrices: Sequence[tuple[Tensor, Statistics]], times: float = OUTLIER) -> float:
    """Return the share of a block's Wanda scores that exceed `times` their mean, over all its matrices together.

    Norms are taken per token, so that an expert's scores do not grow with the tokens that are routed to it.

    >>> outlier_ratio([(torch.tensor([[1.0] * 9 + [11.0]]), Statistics.of(torch.ones(1, 10)))])
    0.1

    Raises:
        NumericsError: the scores hold NaN or Inf.
    """
    count = sum(W_OI.numel() for W_OI, _ in matrices)

    def scores(W_OI: Tensor, statistics: Statistics) -> Tensor:
        return wanda(W_OI, statistics).div_(math.sqrt(max(statistics.tokens, 1)))

    mean = sum(float(scores(*pair).sum(dtype=torch.float64)) for pair in matrices) / count
    if not math.isfinite(mean):
        raise NumericsError("the weights or the inputs hold NaN or Inf; check the model and the calibration text")
    return sum(int((scores(*pair) > times * mean).sum()) for pair in matrices) / count


def tail_exponent(W_OI: Tensor) -> float:
    """Return PL_Alpha_Hill, the exponent of the tail of the spectrum of W^T W: 1 + k / sum(log(l_i / l_k)), i = 1..k.

    The tail begins at the peak of the histogram of log10 of the eigenvalues. It is infinite where all are equal.

    >>> round(tail_exponent(torch.diag(torch.tensor([1.0, 1.0, 1.0, 10.0]))), 6)
    1.868589

    Raises:
        NumericsError: the weights hold NaN or Inf.
    """
    W_OI = W_OI.double()
    if not torch.isfinite(W_OI).all():
        raise NumericsError("the weights hold NaN or Inf; check the model")
    gram = W_OI @ W_OI.T if W_OI.shape[0] <= W_OI.shape[1] else W_OI.T @ W_OI  # the smaller; same eigenvalues
    eigenvalues = torch.linalg.eigvalsh(gram).cpu()
    logs = eigenvalues[eigenvalues > ROUNDING * eigenvalues[-1]].log()
    if not len(logs):
        return math.inf
    low, high = float(logs[0]), float(logs[-1])
    peak = int(torch.histc(logs, BINS, low, high).argmax()) if high > low else 0
    tail = logs[logs >= low + (high - low) * peak / BINS]
    total = float((tail - tail[0]).sum())
    return 1 + len(tail) / total if total > 0 else math.inf


def check_target(name: str, target: Target) -> None:
    """Raise OptionError where blocks cannot differ about the target; `name` is the allocation's."""
    if isinstance(target.pattern, NM):
        levels_beside(target.pattern)
    elif target.sparsity > MOST:
        raise OptionError(
            f"allocation {name}: gives no block more than {MOST:g}, so their mean cannot be {target.sparsity:g}; use a "
            "smaller sparsity, or allocation uniform"
        )


def levels_beside(pattern: NM) -> tuple[NM, NM]:
    """Return the patterns a quarter of M below and above.

    >>> str(levels_beside(NM(8, 16))[0]), str(levels_beside(NM(8, 16))[1])
    ('4:16', '12:16')

    Raises:
        OptionError: there are none.
    """
    step, rest = divmod(pattern.m, 4)
    if rest or not step < pattern.n < pattern.m - step:
        raise OptionError(
            f"pattern {pattern}: blocks would differ by a quarter of M, and N - M/4 or N + M/4 is no pattern; "
            "use 2:4, 4:8 or 8:16, a pattern such as row, or the same pattern for all (allocation uniform)"
        )
    return NM(pattern.n - step, pattern.m), NM(pattern.n + step, pattern.m)


def as_levels(sparsities: Sequence[float], weights: Sequence[int], pattern: NM) -> list[NM]:
    """Turn sparsities into three levels of an N:M pattern, whose mean is the pattern's own.

    Blocks of equal weights are paired, the sparsest with the densest, and of a pair one goes a level up as the other
    goes down. Pairs that lie furthest apart go first, until as much sparsity has moved as was to move. A block without
    a partner stays in the middle.

    >>> [str(p) for p in as_levels([0.8, 0.5, 0.5, 0.2], [8, 8, 8, 8], NM(2, 4))]
    ['1:4', '2:4', '2:4', '3:4']
    """
    sparser, denser = levels_beside(pattern)
    middle, step = pattern.fixed_sparsity, sparser.fixed_sparsity - pattern.fixed_sparsity
    pairs = []
    for count in sorted(set(weights)):
        order = sorted((i for i, own in enumerate(weights) if own == count), key=lambda i: (sparsities[i], i))
        pairs += [(order[-1 - k], order[k]) for k in range(len(order) // 2)]
    pairs.sort(key=lambda pair: (sparsities[pair[1]] - sparsities[pair[0]], pair))
    left = sum(count * abs(s - middle) for s, count in zip(sparsities, weights, strict=True))
    found = [pattern] * len(weights)
    for high, low in pairs:
        moved = 2 * step * weights[high]
        if left >= moved / 2 and sparsities[high] > sparsities[low]:
            found[high], found[low] = sparser, denser
            left -= moved
    return found
