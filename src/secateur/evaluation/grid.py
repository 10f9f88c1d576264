"""The cells of a comparison: every combination of method, sparsity, pattern, calibration, samples and seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..errors import OptionError
from ..pipeline.plan import Request
from ..pruning import parse_method, parse_pattern
from ..pruning.allocation import default_target

OWN = "own"  # the pattern that a method's paper uses
DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True)
class Cell:
    """One way to prune a model; what a method has no use for is None.

    Attributes:
        method: with its options.
        pattern: of the zeros.
        sparsity: fraction removed.
        calibration: a SOURCE.
        samples: of it; None is the default's number.
        seed: of the crops.
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


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values of each axis; N:M patterns have their own sparsity, and cross with no other."""

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
            seed = cell.seed or 0
            Request(
                method=cell.method,
                pattern=cell.pattern,
                sparsity=cell.sparsity,
                samples=cell.samples,
                seed=seed,
                **common,
            ).check()
            if cell.samples is not None and cell.samples < 1:
                raise OptionError(f"samples {cell.samples}: at least 1 is needed")
        return cells

    def _combinations(self) -> Iterator[Cell]:
        axes = product(self.calibrations, self.samples, self.seeds, self.methods, self.patterns)
        for calibration, samples, seed, method, pattern in axes:
            own = parse_method(method)
            name = own.pattern if pattern == OWN else pattern
            parsed = parse_pattern(name)
            for sparsity in self.sparsities if parsed.fixed_sparsity is None else [None]:
                target = default_target(sparsity, parsed)
                if own.needs:
                    yield Cell(method, name, target.sparsity, calibration, samples, seed)
                else:
                    yield Cell(method, name, target.sparsity, None, None, None)
