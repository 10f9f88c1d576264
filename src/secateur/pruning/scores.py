"""Scores: one number per weight, larger = keep. Each is a pure function of a matrix and its statistics.

Names: W_OI weights [out, in], S_OI scores of the same shape, float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OptionError
from .statistics import Statistics


def input_norms(statistics: Statistics) -> Tensor:
    """Return the L2 norm of each input column over all tokens, [I], float32.

    Raises:
        OptionError: the statistics hold no sums of squares.
    """
    sumsq_I = statistics.sumsq_I
    if sumsq_I is None and statistics.gram_II is not None:
        sumsq_I = statistics.gram_II.diagonal()
    if sumsq_I is None:
        raise OptionError("this score needs the inputs' sums of squares (Statistics.sumsq_I), and there are none")
    return sumsq_I.double().sqrt().float()


def magnitude(W_OI: Tensor, statistics: Statistics) -> Tensor:
    """Score |W|, the oldest of all: Han et al. 2015, https://arxiv.org/abs/1506.02626. Uses no statistics.

    >>> W = torch.tensor([[0.5, 0.3]])
    >>> magnitude(W, Statistics()) == W
    tensor([[True, True]])
    """
    return W_OI.float().abs()


def wanda(W_OI: Tensor, statistics: Statistics) -> Tensor:
    """Score |W_ij| * ||x_j||_2: Sun et al. 2024, eq. 1, https://openreview.net/forum?id=PxoFut3dWW.

    The norm runs over all calibration tokens. The authors' code divides the sum of squares by the number
    of sequences; a constant changes no ranking inside a matrix, so it is left out here.

    A large weight on a quiet input goes before a small weight on a loud one:

    >>> from secateur.pruning import Row
    >>> W = torch.tensor([[0.5, 0.3]])
    >>> statistics = Statistics(tokens=1, sumsq_I=torch.tensor([0.1, 0.8]).square())
    >>> Row().mask(magnitude(W, statistics), 0.5)
    tensor([[ True, False]])
    >>> Row().mask(wanda(W, statistics), 0.5)
    tensor([[False,  True]])
    """
    return W_OI.float().abs() * input_norms(statistics)


def ria(W_OI: Tensor, statistics: Statistics, *, exponent: float = 0.5) -> Tensor:
    """Score (|W_ij| / sum_row + |W_ij| / sum_column) * ||x_j||^a: Zhang et al. 2024, eqs. 3 and 4.

    "Relative importance and activations", https://openreview.net/forum?id=Tr0lPx9woF. `exponent` is the paper's a.
    A row or column of zeros scores zero.
    """
    A_OI = W_OI.float().abs()
    tiny = torch.finfo(torch.float32).tiny
    relative = A_OI / A_OI.sum(1, keepdim=True).clamp_min(tiny) + A_OI / A_OI.sum(0, keepdim=True).clamp_min(tiny)
    return relative * input_norms(statistics).pow(exponent)
