"""The cells of a comparison: every combination of method, sparsity, pattern, calibration, samples and seed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ..errors import OptionError, nearest
from ..pipeline.plan import Request
from ..pruning import METHODS, parse_method, parse_pattern
from ..pruning.allocation import default_target
from ..shrinking.request import SHRINK, ShrinkRequest, parse_shrink

OWN = "own"  # the pattern that a method's paper uses
STRUCTURED = "structured"  # the pattern of shrunken models, in which whole parts are gone
DEFAULT_SPARSITY = 0.5
OF_SHRINKING = ("seqlen", "dtype", "device", "trust_remote_code")  # of the options of every run


@dataclass(frozen=True)
class Cell:
    """One way to prune a model, or to shrink it; what a method has no use for is None.

    Attributes:
        method: with its options.
        pattern: of the zeros; ``structured`` for a shrunken model.
        sparsity: fraction removed: of the weights, or of the blocks' parameters.
        calibration: a SOURCE.
        samples: of it; None is the default's number.
        seed: of the crops, and of random choices.
    """

    method: str
    pattern: str
    sparsity: float
    calibration: str | None
    samples: int | None
    seed: int | None

    def __str__(self) -> str:
        words = [self.method, self.pattern, f"{self.sparsity:.0%}"]
        words += [self.calibration or "", f"{self.samples} samples" if self.samples else ""]
        words += [f"seed {self.seed}" if self.seed else ""]
        return ", ".join(filter(None, words))

    @property
    def shrinks(self) -> bool:
        """Whether parts are removed, and no weights zeroed."""
        return self.pattern == STRUCTURED

    def shrink_request(self, common: Mapping[str, Any], calibration: Any = None) -> ShrinkRequest:
        """Return the request of a cell that shrinks.

        Its `propagate` is not the comparison's, which is for pruning: it is ``sequential`` or what the method says.

        Args:
            common: options of every run, of which it takes those that it has.
            calibration: what its text was read as.
        """
        shared = {name: common[name] for name in OF_SHRINKING if name in common}
        options = {"samples": self.samples, "seed": self.seed or 0, **shared, **parse_shrink(self.method)}
        return ShrinkRequest(target=self.sparsity, calibration=calibration, **options)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values of each axis; N:M patterns have their own sparsity, shrunken models no pattern to choose."""

    methods: Sequence[str]
    sparsities: Sequence[float]
    patterns: Sequence[str]
    calibrations: Sequence[str]
    samples: Sequence[int | None]
    seeds: Sequence[int]

    def cells(self, **common: Any) -> list[Cell]:
        """Return the cells in order, each once.

        Args:
            common: options of every run (`Request`), to be checked with each cell's own.

        Raises:
            OptionError: an axis is empty, or a value on it makes no run.
        """
        for name, values in vars(self).items():
            if not values or "" in values:
                raise OptionError(f"{name}: give at least one value, and no empty one")
        cells = list(dict.fromkeys(self._combinations()))
        if unused := sorted(set(self.sparsities) - {DEFAULT_SPARSITY} - {cell.sparsity for cell in cells}):
            raise OptionError(
                f"sparsities {unused[0]:g}: each of the patterns {', '.join(self.patterns)} has its own; leave it out"
            )
        for cell in cells:
            _check(cell, common)
        return cells

    def _combinations(self) -> Iterator[Cell]:
        axes = product(self.calibrations, self.samples, self.seeds, self.methods, self.patterns)
        for calibration, samples, seed, method, pattern in axes:
            name = re.split("[:+]", str(method))[0]
            if name == SHRINK:
                for removed in self.sparsities:
                    yield _shrunken(Cell(method, STRUCTURED, removed, calibration, samples, seed))
                continue
            if name not in METHODS:
                raise OptionError(f"unknown method {name!r}: {nearest(name, [*METHODS, SHRINK])}")
            own = parse_method(method)
            name = own.pattern if pattern == OWN else pattern
            parsed = parse_pattern(name)
            for sparsity in self.sparsities if parsed.fixed_sparsity is None else [None]:
                target = default_target(sparsity, parsed)
                if own.needs:
                    yield Cell(method, name, target.sparsity, calibration, samples, seed)
                else:
                    yield Cell(method, name, target.sparsity, None, None, None)


def _shrunken(cell: Cell) -> Cell:
    """A cell without what its request has no use for."""
    request = cell.shrink_request({})
    if request.needs_tokens:
        return cell
    return replace(cell, calibration=None, samples=None, seed=cell.seed if request.by_chance else None)


def _check(cell: Cell, common: Mapping[str, Any]) -> None:
    if cell.samples is not None and cell.samples < 1:
        raise OptionError(f"samples {cell.samples}: at least 1 is needed")
    if not cell.shrinks:
        Request(
            method=cell.method,
            pattern=cell.pattern,
            sparsity=cell.sparsity,
            samples=cell.samples,
            seed=cell.seed or 0,
            **common,
        ).check()
        return
    for name in ("include", "exclude"):
        if common.get(name):
            raise OptionError(f"{name} and method {SHRINK!r}: it chooses no single matrices; compare it without {name}")
    cell.shrink_request(common).check()
