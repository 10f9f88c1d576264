"""Methods: ``W_OI, statistics, sparsity, pattern -> W'_OI, mask_OI``, pure; and the table of them all.

To add a score, write one function and one line in `METHODS` (docs/adding-a-method.md); the contract tests
find it there. Stages of `updates` may follow a method: ``wanda+swaps+pcg``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericsError, OptionError, nearest
from . import scores
from .alps import alps
from .patterns import Pattern
from .sparsegpt import sparsegpt
from .statistics import GRAM, SUMSQ, Statistics
from .updates import STAGES

Prune = Callable[..., tuple[Tensor, Tensor]]
Score = Callable[..., Tensor]
PLUS = re.compile(r"\+(?!\d)")  # between a method and its stages, and not that of 1e+3


@dataclass(frozen=True)
class Method:
    """A pruning method and what the pipeline must know of it.

    Attributes:
        prune: the pure function ``(W_OI, statistics, sparsity, pattern, **options) -> (W'_OI, mask_OI)``.
        needs: the sums that it takes from calibration (`SUM`, `SUMSQ`, `GRAM`); empty: no calibration.
        pattern: the pattern that its paper uses, which is the default.
        paper: where it is published.
        options: values that override the function's keyword-only defaults.
    """

    prune: Prune
    needs: frozenset[str] = frozenset()
    pattern: str = "matrix"
    paper: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> Score | None:
        """The score that `one_shot` made the method of, with the options; None for a method that is more."""
        score = getattr(self.prune, "score", None)
        return None if score is None else partial(score, **self.options)

    def __call__(
        self, W_OI: Tensor, statistics: Statistics, sparsity: float, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        # However the weights lie (GPT-2's lie transposed), the order of operations is the same, to the last bit.
        return self.prune(W_OI.contiguous(), statistics, sparsity, pattern, **self.options)


def one_shot(score: Score) -> Prune:
    """Make a method of a score: the pattern keeps the largest scores, and kept weights stay as they are.

    >>> from secateur.pruning import Row, Statistics, magnitude
    >>> one_shot(magnitude)(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), Statistics(), 0.5, Row())[0]
    tensor([[ 0., -3.,  2.,  0.]])
    """

    def prune(
        W_OI: Tensor, statistics: Statistics, sparsity: float, pattern: Pattern, **options: Any
    ) -> tuple[Tensor, Tensor]:
        score_OI = score(W_OI, statistics, **options)
        if not torch.isfinite(score_OI.sum()):
            raise NumericsError("the scores hold NaN or Inf; check the weights, the inputs and the method's options")
        mask_OI = pattern.mask(score_OI, sparsity)
        return torch.where(mask_OI, W_OI, 0), mask_OI

    prune.__wrapped__ = prune.score = score  # type: ignore[attr-defined]  # its options are the score's
    prune.__doc__ = score.__doc__
    return prune


METHODS: dict[str, Method] = {
    "magnitude": Method(one_shot(scores.magnitude), paper="https://arxiv.org/abs/1506.02626"),
    "wanda": Method(
        one_shot(scores.wanda), frozenset({SUMSQ}), "row", paper="https://openreview.net/forum?id=PxoFut3dWW"
    ),
    "ria": Method(one_shot(scores.ria), frozenset({SUMSQ}), paper="https://openreview.net/forum?id=Tr0lPx9woF"),
    "sparsegpt": Method(sparsegpt, frozenset({GRAM}), paper="https://arxiv.org/abs/2301.00774"),
    "alps": Method(alps, frozenset({GRAM}), paper="https://arxiv.org/abs/2406.07831"),
}


@dataclass(frozen=True)
class Composition:
    """A method and the stages that follow it, as one `prune`.

    Attributes:
        method: what chooses the first mask.
        stages: names in `STAGES`, with options that override their defaults.
    """

    method: Method
    stages: tuple[tuple[str, Mapping[str, Any]], ...]

    def __call__(
        self, W_OI: Tensor, statistics: Statistics, sparsity: float, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        new_OI, mask_OI = self.method(W_OI, statistics, sparsity, pattern)
        for name, options in self.stages:
            new_OI, mask_OI = STAGES[name](W_OI, new_OI, mask_OI, statistics, pattern, **options)
        return new_OI, mask_OI


def method_options(method: Method) -> dict[str, int | float | str]:
    """Return the options that can be given after the method's name, with their defaults."""
    return _options(method.prune)


def _options(function: Callable[..., Any]) -> dict[str, int | float | str]:
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and isinstance(p.default, (int, float, str))
    }


def parse_method(text: str) -> Method:
    """Read ``NAME[:OPTION=VALUE]...``, and the stages that follow it: ``+STAGE[:OPTION=VALUE]...``.

    >>> dict(parse_method("sparsegpt:damping=0.02:block_size=64").options)
    {'damping': 0.02, 'block_size': 64}
    >>> parse_method("wanda+swaps+pcg:iterations=20").prune.stages
    (('swaps', {}), ('pcg', {'iterations': 20}))

    Raises:
        OptionError: the method, a stage or one of their options is unknown, or a value does not fit.
    """
    first, *stages = PLUS.split(str(text))
    name, *pairs = first.split(":")
    if name not in METHODS:
        raise OptionError(f"unknown method {name!r}: {nearest(name, METHODS)}")
    method = replace(METHODS[name], options=_read(f"method {name!r}", pairs, method_options(METHODS[name])))
    return _followed(method, stages) if stages else method


def parts_of(method: str) -> list[tuple[str, str]]:
    """Return the name of a method and of the stages that follow it, each with its options as text.

    >>> parts_of("wanda+swaps+pcg:iterations=20")
    [('wanda', ''), ('swaps', ''), ('pcg', 'iterations=20')]
    """
    parts = (part.partition(":") for part in PLUS.split(method))
    return [(name, options) for name, _, options in parts]


def updated(method: str | Method, update: str | None) -> str | Method:
    """Return a method with more stages, as text if it is text: ``pcg``, ``swaps+pcg:iterations=20``.

    >>> updated("wanda", "pcg")
    'wanda+pcg'

    Raises:
        OptionError: the method is no text, and a stage or one of its options is unknown.
    """
    if update is None:
        return method
    return _followed(method, PLUS.split(update)) if isinstance(method, Method) else f"{method}+{update}"


def _followed(method: Method, stages: Sequence[str]) -> Method:
    """A method, and then these stages."""
    parts: list[tuple[str, dict[str, Any]]] = []
    for stage in stages:
        name, *pairs = stage.split(":")
        if name not in STAGES:
            raise OptionError(f"unknown update {name!r}: {nearest(name, STAGES)}")
        if name == "swaps" and parts:
            raise OptionError(f"update swaps: keeps the original weights, so it comes before {parts[-1][0]}: swaps+pcg")
        parts.append((name, _read(f"update {name!r}", pairs, _options(STAGES[name]))))
    return replace(method, prune=Composition(method, tuple(parts)), needs=method.needs | {GRAM}, options={})


def _read(who: str, pairs: Sequence[str], known: Mapping[str, int | float | str]) -> dict[str, Any]:
    """Read ``OPTION=VALUE`` of a method or a stage."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in known or not equals:
            hint = nearest(key, known) if known else f"{who.split(' ')[1][1:-1]} has no options"
            raise OptionError(f"{who}: cannot read option {pair!r} (OPTION=VALUE); {hint}")
        kind = type(known[key])
        try:
            options[key] = kind(value)
        except ValueError:
            raise OptionError(f"{who}: {key} takes {kind.__name__}, not {value!r}") from None
    return options
