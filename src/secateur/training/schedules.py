"""Schedules: how far along its way sparsity is, as a fraction in [0, 1] of the time in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import OptionError, nearest
from ..pruning import NM, Target

Schedule = Callable[[float], float]


def cubic(time: float) -> float:
    """Fast at first, while there is much to spare: 1 - (1 - t)^3. Zhu and Gupta 2017, eq. 1, arxiv.org/abs/1710.01878.

    >>> cubic(0.5)
    0.875
    """
    return 1 - (1 - time) ** 3


def linear(time: float) -> float:
    """As fast all the way."""
    return time


def one_cycle(time: float, *, alpha: float = 14.0, beta: float = 5.0) -> float:
    """Slow, fast, slow: (1 + e^(beta - alpha)) / (1 + e^(beta - alpha t)).

    Hubens et al. 2021, https://arxiv.org/abs/2107.02086. As published, it begins at 0.0067 and not at 0.
    """
    return (1 + math.exp(beta - alpha)) / (1 + math.exp(beta - alpha * time))


SCHEDULES: dict[str, Schedule] = {"cubic": cubic, "linear": linear, "one-cycle": one_cycle}


def parse_schedule(name: str) -> Schedule:
    """Return a schedule by its name.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in SCHEDULES:
        raise OptionError(f"unknown schedule {name!r}: {nearest(name, SCHEDULES)}")
    return SCHEDULES[name]


def on_the_way(final: Target, initial: float, progress: float) -> Target:
    """Return the target of a matrix `progress` (0 to 1) of the way from a sparsity to its final target.

    Under N:M more than N of M weights are kept on the way: as many as the sparsity asks for, rounded up.

    >>> from secateur.pruning import Row, parse_pattern
    >>> on_the_way(Target(0.5, Row()), 0.25, 0.5).sparsity
    0.375
    >>> [str(on_the_way(Target(0.5, parse_pattern("2:4")), 0.0, p).pattern) for p in (0.4, 0.6, 1.0)]
    ['4:4', '3:4', '2:4']
    """
    if progress >= 1:
        return final
    begin = min(initial, final.sparsity)
    sparsity = begin + (final.sparsity - begin) * progress
    if isinstance(final.pattern, NM):
        n, m = final.pattern.n, final.pattern.m
        kept = max(n, math.ceil(m * (1 - sparsity) - 1e-9))
        return Target(1 - kept / m, NM(kept, m))
    return Target(sparsity, final.pattern)


def round_sparsity(final: float, initial: float, done: float) -> float:
    """Return the sparsity after a fraction of all rounds of iterative pruning.

    Each round removes the same fraction of what is left, as in Frankle and Carbin 2019 (arxiv.org/abs/1803.03635):
    1 - s_r = (1 - s_0) ((1 - s) / (1 - s_0))^(r / R).

    >>> [round(round_sparsity(0.75, 0.0, r / 2), 3) for r in (1, 2)]
    [0.5, 0.75]
    """
    left: float = ((1 - final) / (1 - initial)) ** done
    return 1 - (1 - initial) * left
