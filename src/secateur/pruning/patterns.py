"""Patterns: which weights go, given a score for each. Larger score = keep; mask True = keep.

Names: O output rows, I input columns, G columns of one group.

A pattern is called with the scores of a matrix, or of a chunk of its columns that starts at column
`start`: counts are cumulative over chunks, ``round(s * end) - round(s * start)``, so that chunks add up
to exactly the count of the whole matrix. Ties are broken like a stable ascending sort: of equal scores
the one with the lower column (then row-major index) is pruned first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import OptionError, nearest

FEW = 16  # scores of a row, up to which comparing all pairs is the faster way


class Pattern(Protocol):
    """Where zeros may lie. ``str(pattern)`` is its spelling on the command line."""

    @property
    def selection_width(self) -> int | None:
        """Columns over which one choice is made; None means all of them, in chunks of any width."""

    @property
    def fixed_sparsity(self) -> float | None:
        """The sparsity that the pattern itself implies (1 - N/M), or None."""

    def mask(self, score_OI: Tensor, sparsity: float, start: int = 0) -> Tensor:
        """Return the boolean mask [O, I] (True = keep) for finite scores [O, I]."""


def lowest(score_RG: Tensor, count: int) -> Tensor:
    """Mark, in every row, the `count` lowest scores; of ties, the lower index.

    Equal to a stable ascending sort, in the time of a selection; in that of comparing all pairs where they are few.

    >>> lowest(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), 1)
    tensor([[False,  True, False, False]])
    """
    if count <= 0:
        return torch.zeros_like(score_RG, dtype=torch.bool)
    if count >= score_RG.shape[1]:
        return torch.ones_like(score_RG, dtype=torch.bool)
    if score_RG.shape[1] <= FEW:
        return _ranks(score_RG) < count
    threshold_R1 = score_RG.kthvalue(count, dim=1, keepdim=True).values
    marked = score_RG < threshold_R1
    tied = score_RG == threshold_R1
    wanted_R1 = count - marked.count_nonzero(1)[:, None]
    if (tied.count_nonzero(1)[:, None] > wanted_R1).any():
        tied &= tied.cumsum(1) <= wanted_R1
    return marked | tied


def _ranks(score_RG: Tensor) -> Tensor:
    """Count, for every score, those of its row that go before it."""
    score_GR = score_RG.T.contiguous()
    rank_GR = torch.zeros_like(score_GR, dtype=torch.int8)
    for i in range(1, len(score_GR)):
        larger_GR = score_GR[:i] > score_GR[i]
        rank_GR[:i] += larger_GR
        rank_GR[i] += (~larger_GR).sum(0, dtype=torch.int8)
    return rank_GR.T.contiguous()


def _span(per_column: float, start: int, columns: int) -> int:
    """How many units go in `columns` columns that start at `start`, `per_column` of them in each."""
    return round(per_column * (start + columns)) - round(per_column * start)


@dataclass(frozen=True)
class Row:
    """Equal, exact sparsity in each output row: round(s * I) weights of each row are pruned."""

    selection_width = None
    fixed_sparsity = None

    def mask(self, score_OI: Tensor, sparsity: float, start: int = 0) -> Tensor:
        return ~lowest(score_OI, _span(sparsity, start, score_OI.shape[1]))

    def __str__(self) -> str:
        return "row"


@dataclass(frozen=True)
class Matrix:
    """One choice over the whole matrix: round(s * O * I) weights are pruned."""

    selection_width = None
    fixed_sparsity = None

    def mask(self, score_OI: Tensor, sparsity: float, start: int = 0) -> Tensor:
        rows, columns = score_OI.shape
        count = _span(sparsity * rows, start, columns)
        return ~lowest(score_OI.reshape(1, -1), count).reshape(rows, columns)

    def __str__(self) -> str:
        return "matrix"


@dataclass(frozen=True)
class NM:
    """Keep `n` of every `m` consecutive weights of a row; a trailing group of r < m keeps ceil(r * n / m)."""

    n: int
    m: int

    @property
    def selection_width(self) -> int:
        return self.m

    @property
    def fixed_sparsity(self) -> float:
        return 1 - self.n / self.m

    def mask(self, score_OI: Tensor, sparsity: float, start: int = 0) -> Tensor:
        rows, columns = score_OI.shape
        whole = columns - columns % self.m
        groups = score_OI[:, :whole].reshape(-1, self.m)
        parts = [~lowest(groups, self.m - self.n).reshape(rows, whole)]
        rest = columns - whole
        if rest:
            kept = -(-rest * self.n // self.m)
            parts.append(~lowest(score_OI[:, whole:], rest - kept))
        return torch.cat(parts, dim=1)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block:
    """Whole tiles of `height` x `width` go: round(s * tiles) of the matrix.

    A tile's score is the sum of its squared scores; a ragged tile at the edge counts by its mean, that is
    as if it were whole. Tiles are taken from the top left corner.
    """

    height: int
    width: int

    fixed_sparsity = None

    @property
    def selection_width(self) -> int:
        return self.width

    def mask(self, score_OI: Tensor, sparsity: float, start: int = 0) -> Tensor:
        rows, columns = score_OI.shape
        height, width = min(self.height, max(rows, 1)), min(self.width, max(columns, 1))  # no more padding than needed
        down, across = -(-rows // height), -(-columns // width)
        pad = (0, across * width - columns, 0, down * height - rows)

        def tile_sums(values_OI: Tensor) -> Tensor:
            padded = torch.nn.functional.pad(values_OI, pad)
            return padded.reshape(down, height, across, width).sum((1, 3))

        tiles = tile_sums(score_OI.double().square()) / tile_sums(torch.ones_like(score_OI, dtype=torch.double))
        count = _span(sparsity * down, start // self.width, across)
        keep = ~lowest(tiles.reshape(1, -1), count).reshape(down, across)
        keep = keep.repeat_interleave(height, 0).repeat_interleave(width, 1)
        return keep[:rows, :columns]

    def __str__(self) -> str:
        return f"block:{self.height}x{self.width}"


def parse_pattern(text: str) -> Pattern:
    """Read a pattern's spelling: ``row``, ``matrix``, ``N:M``, ``block:RxC``.

    >>> str(parse_pattern("2:4")), parse_pattern("2:4").fixed_sparsity
    ('2:4', 0.5)

    Raises:
        OptionError: the spelling is unknown, or the numbers make no pattern.
    """
    text = str(text).strip().lower()
    if text == "row":
        return Row()
    if text == "matrix":
        return Matrix()
    if found := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text):
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m:
            raise OptionError(f"pattern {text!r}: N:M keeps N of every M weights, so 0 < N < M; for example 2:4")
        return NM(n, m)
    if found := re.fullmatch(r"block:(\d{1,9})x(\d{1,9})", text):
        height, width = int(found[1]), int(found[2])
        if height < 1 or width < 1:
            raise OptionError(f"pattern {text!r}: a block has at least 1 row and 1 column; for example block:16x16")
        return Block(height, width)
    raise OptionError(
        f"unknown pattern {text!r}: {nearest(text, ['row', 'matrix', 'N:M (2:4)', 'block:RxC (block:16x16)'])}"
    )


def detect_pattern(W_OI: Tensor) -> str:
    """Name the tightest pattern that a matrix's zeros show.

    Returns:
        ``dense`` (no zeros to speak of), an N:M, a block, ``row`` (as many zeros in each row), or ``unstructured``.

    >>> detect_pattern(torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 3.0, 4.0, 0.0]]))
    '2:4'
    """
    kept_OI = W_OI != 0
    rows, columns = kept_OI.shape
    sparsity = 1 - float(kept_OI.double().mean())
    if sparsity < 0.01:
        return "dense"
    for height, width in ((32, 32), (16, 16), (8, 8), (4, 4), (1, 8), (1, 4)):
        if rows % height == 0 and columns % width == 0:
            filled = kept_OI.reshape(rows // height, height, columns // width, width).sum((1, 3))
            if ((filled == 0) | (filled >= height * width * 0.99)).all():
                return f"block:{height}x{width}"
    for m in (4, 8, 16, 32):
        if columns >= m:
            most = int(kept_OI[:, : columns - columns % m].reshape(-1, m).sum(1).max())
            if most < m and abs(sparsity - (1 - most / m)) < 0.005:
                return f"{most}:{m}"
    zeros = columns - kept_OI.sum(1)
    return "row" if int(zeros.max() - zeros.min()) <= max(1, columns // 500) else "unstructured"
