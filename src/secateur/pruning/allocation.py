"""Allocations: which sparsity or pattern each matrix gets.

Rules map a block (``0``, ``layer.0``, ``layers.0``) or a regular expression, which must match a matrix's
whole name, to a sparsity (0 leaves it dense) or to an N:M pattern. The first rule that matches wins; what
no rule matches takes the default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import OptionError, nearest
from .patterns import NM, Pattern, parse_pattern

MOST = 0.95  # sparsity that any part is given by its sensitivity
NO_KL = 1e-6  # nats: less is rounding

Rule = float | str
Rules = Mapping[str, Rule] | Sequence[float]


class MatrixInfo(NamedTuple):
    """What an allocation may know of a matrix: its whole name, its block's index, its weights."""

    name: str
    block: int
    weights: int


@dataclass(frozen=True)
class Target:
    """What one matrix is pruned to. Sparsity 0 leaves it dense."""

    sparsity: float
    pattern: Pattern


def check_sparsity(sparsity: float, where: str) -> float:
    """Return `sparsity` as a float in [0, 1).

    Raises:
        OptionError: it is no such number.
    """
    try:
        value = float(sparsity)
    except (TypeError, ValueError):
        raise OptionError(f"{where} {sparsity!r}: must be a number") from None
    except OverflowError:
        raise OptionError(f"{where}: is the fraction removed, at least 0 and below 1") from None
    if math.isnan(value) or not 0 <= value < 1:
        hint = f"; for {value:g} percent write {value / 100:g}" if 1 < value < 100 else ""
        raise OptionError(f"{where} {value:g}: is the fraction removed, at least 0 and below 1{hint}")
    return value


def default_target(sparsity: float | None, pattern: Pattern) -> Target:
    """Return the target of matrices that no rule names: 0.5, or what an N:M pattern implies.

    Raises:
        OptionError: both are given and contradict each other.
    """
    fixed = pattern.fixed_sparsity
    if sparsity is None:
        return Target(0.5 if fixed is None else fixed, pattern)
    value = check_sparsity(sparsity, "sparsity")
    if fixed is not None and abs(value - fixed) > 1e-6:
        raise OptionError(
            f"pattern {pattern} is a sparsity of {fixed:g}, but sparsity {value:g} was given; leave one out"
        )
    return Target(value if fixed is None else fixed, pattern)


def allocate(matrices: Sequence[MatrixInfo], default: Target, rules: Rules | None = None) -> dict[str, Target]:
    """Give every matrix its target.

    >>> names = [MatrixInfo("layers.0.mlp.up", 0, 8), MatrixInfo("layers.1.mlp.up", 1, 8)]
    >>> from secateur.pruning import Row
    >>> {n: t.sparsity for n, t in allocate(names, Target(0.5, Row()), {"layers.1": 0.7}).items()}
    {'layers.0.mlp.up': 0.5, 'layers.1.mlp.up': 0.7}

    Args:
        matrices: the matrices to be pruned.
        default: the target where no rule matches.
        rules: a mapping of keys to sparsities or N:M patterns, or one sparsity for each block.

    Raises:
        OptionError: a key matches nothing, a value is out of range, or a number meets an N:M pattern.
    """
    blocks = sorted({m.block for m in matrices})
    if rules is None:
        return {m.name: default for m in matrices}
    if not isinstance(rules, Mapping):
        if not isinstance(rules, Iterable):
            raise OptionError(f"allocation: {rules!r} is neither a table of keys nor a list of numbers")
        rules = list(rules)
        if len(rules) != len(blocks):
            raise OptionError(f"allocation: {len(rules)} numbers for {len(blocks)} blocks; give one for each")
        rules = {str(block): value for block, value in zip(blocks, rules, strict=True)}
    parsed = [(_matcher(str(key)), _target(str(key), value, default)) for key, value in rules.items()]
    for key, (matches, _) in zip(rules, parsed, strict=True):
        if not any(matches(m) for m in matrices):
            known = [f"layers.{b}" for b in blocks] + [m.name for m in matrices]
            raise OptionError(
                f"allocation: {str(key)!r} matches no block and no whole matrix name; {nearest(str(key), known)}"
            )
    return {m.name: next((target for matches, target in parsed if matches(m)), default) for m in matrices}


def mean_sparsity(matrices: Sequence[MatrixInfo], targets: Mapping[str, Target]) -> float:
    """Return the mean of the targets' sparsities, weighted by the matrices' weights."""
    total = sum(m.weights for m in matrices)
    return sum(m.weights * targets[m.name].sparsity for m in matrices) / total if total else 0.0


def allocate_by_sensitivity(
    divergences: Sequence[float], weights: Sequence[int], target: float, spread: float
) -> list[float]:
    """Give sensitive parts of a model less sparsity and the others more, so that the weighted mean is the target.

    The rule: a part's sensitivity is x = log(KL / weights), of parts that were pruned alone to one sparsity. With x
    brought to [-1, 1] between the least and the most sensitive part, the part's sparsity is
    ``target - spread * x + shift``, clipped to [0, 0.95]; the shift is the one that makes the mean right. If every
    part's KL grew exponentially with its sparsity, all at one rate, and KLs added up, then no other sparsities of that
    mean would have a smaller KL, for the spread that belongs to the rate.

    >>> allocate_by_sensitivity([0.01, 0.04, 0.16], [8, 8, 8], 0.5, 0.1)
    [0.6, 0.5, 0.4]

    Args:
        divergences: of each part, KL(dense || pruned there alone) in nats per prediction.
        weights: of each part, how many it has.
        target: mean sparsity, in [0, 0.95].
        spread: how far the most and the least sensitive part are from the target, before the shift.

    Returns:
        The sparsity of each part, to six decimals.

    Raises:
        OptionError: target or spread is out of range.
    """
    if not 0 <= spread < 1:
        raise OptionError(f"spread {spread:g}: is a difference of sparsities, at least 0 and below 1")
    x = [math.log(max(kl, NO_KL) / count) for kl, count in zip(divergences, weights, strict=True)]
    middle, half = (max(x) + min(x)) / 2, (max(x) - min(x)) / 2
    wished = [target - (spread * (value - middle) / half if half else 0.0) for value in x]
    return [round(value, 6) for value in balanced(wished, weights, target)]


def balanced(wished: Sequence[float], weights: Sequence[int], target: float) -> list[float]:
    """Shift sparsities, clipped to [0, 0.95], by what makes their weighted mean the target.

    >>> [round(s, 6) for s in balanced([0.9, 0.1], [8, 8], 0.7)]
    [0.95, 0.45]

    Raises:
        OptionError: no such sparsities have that mean.
    """
    if not 0 <= target <= MOST:
        raise OptionError(f"target {target:g}: is a mean sparsity of at least 0 and at most {MOST:g}")

    def shifted(shift: float) -> list[float]:
        return [min(max(value + shift, 0.0), MOST) for value in wished]

    low, high = -2.0, 2.0  # beyond these every part is clipped
    for _ in range(60):
        shift = (low + high) / 2
        mean = sum(s * count for s, count in zip(shifted(shift), weights, strict=True)) / sum(weights)
        low, high = (shift, high) if mean < target else (low, shift)
    return shifted(high)


def _matcher(key: str) -> Callable[[MatrixInfo], bool]:
    if block := re.fullmatch(r"(?:layers?\.)?(\d{1,9})", key):
        index = int(block[1])
        return lambda matrix: matrix.block == index
    try:
        pattern = re.compile(key)
    except (re.error, OverflowError, RecursionError) as error:
        raise OptionError(f"allocation: {key!r} is neither a block nor a regular expression ({error})") from None
    return lambda matrix: pattern.fullmatch(matrix.name) is not None


def _target(key: str, value: Rule, default: Target) -> Target:
    if isinstance(value, str) and ":" in value:
        pattern = parse_pattern(value)
        if not isinstance(pattern, NM):
            raise OptionError(f"allocation: {key!r} takes a sparsity or an N:M pattern, not {value!r}")
        return Target(pattern.fixed_sparsity, pattern)
    sparsity = check_sparsity(value, f"allocation of {key!r}: sparsity")  # type: ignore[arg-type]
    if sparsity and default.pattern.fixed_sparsity is not None:
        raise OptionError(
            f"allocation: {key!r} asks for sparsity {sparsity:g}, but under pattern {default.pattern} a matrix takes "
            f"another N:M pattern (such as 4:16) or 0"
        )
    return Target(sparsity, default.pattern)
