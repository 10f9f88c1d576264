"""What pruning each block alone, or each kind of matrix alone, does to a model's predictions.

The model is pruned once, with the statistics of the unpruned model. Then the dense model reads the text once for each
unit, a block or a kind of matrix, with that unit's tensors exchanged for pruned ones. Before the first exchanged block
all is as in the dense model, so a reading begins there: n blocks cost n / 2 readings of the model, a kind costs one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.checkpoint import Checkpoint
from ..models.disk_host import DiskHost
from ..models.hosts import block_matrices
from ..models.matrices import Matrix
from ..pipeline.calibration import Tokens
from ..pipeline.stream import Stream
from ..progress import Progress
from .fidelity import Reading
from .perplexity import perplexity

UNITS = ("block", "kind")


@dataclass(frozen=True)
class Unit:
    """What is pruned alone.

    Attributes:
        by: ``block`` or ``kind``.
        key: the block's index, or the kind's name such as ``mlp.up_proj``.
        names: of its tensors on disk.
        first: the first block with one of them.
        matrices: how many it has.
        weights: of them.
        zeros: in them, pruned.
    """

    by: str
    key: int | str
    names: frozenset[str]
    first: int
    matrices: int
    weights: int
    zeros: int


def find_units(host: DiskHost, pruned: Sequence[Mapping[str, Any]], by: str) -> list[Unit]:
    """Sort pruned matrices, as a run's report lists them, by block or by kind."""
    path = host.skeleton.path
    groups: dict[int | str, list[Mapping[str, Any]]] = {}
    for row in pruned:
        kind = re.sub(r"\[\d+\]$", "", row["name"].removeprefix(f"{path}.{row['block']}."))  # experts are of one kind
        groups.setdefault(row["block"] if by == "block" else kind, []).append(row)
    parameters = {
        name: matrix.parameter
        for index in range(len(host.skeleton.real))
        for name, matrix in block_matrices(host, index).items()
    }
    return [
        Unit(
            by=by,
            key=key,
            names=frozenset(name for row in rows for name in host.names_of[parameters[row["name"]]]),
            first=min(row["block"] for row in rows),
            matrices=len(rows),
            weights=sum(row["shape"][0] * row["shape"][1] for row in rows),
            zeros=sum(row["zeros"] for row in rows),
        )
        for key, rows in groups.items()
    ]


class PartlyPruned:
    """A dense model with the tensors called `names` exchanged for those of a pruned one."""

    def __init__(self, dense: DiskHost, pruned: Checkpoint) -> None:
        self.dense, self.pruned = dense, pruned
        self.model, self.skeleton, self.device = dense.model, dense.skeleton, dense.device
        self.names: frozenset[str] = frozenset()

    def block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Yield block `index`, resident."""
        own = self.dense.names.get(index, [])
        return self.dense.block(index, {name: self.pruned.read(name) for name in own if name in self.names})

    def written_dtype(self, matrix: Matrix) -> torch.dtype:
        """The dtype in which a matrix is written."""
        return self.dense.written_dtype(matrix)


def measure_units(
    host: DiskHost, pruned: Checkpoint, units: Sequence[Unit], tokens: Tokens, folder: Path, progress: Progress
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Measure how far the dense model's predictions move when one unit alone is pruned.

    Args:
        host: the dense model.
        pruned: the same model, pruned.
        units: what is pruned alone.
        tokens: windows of text.
        folder: where hidden states may lie.
        progress: hears of the work.

    Returns:
        What `perplexity` says of the dense model; and for ``block`` and ``kind`` a row for each unit (docs/json.md).
    """
    dense = Reading(host, tokens, folder / "dense")
    found = perplexity(dense, progress)
    partly = PartlyPruned(host, pruned)
    reading = Reading(partly, tokens, folder / "partly")
    before = Stream(host, tokens.rows, folder / "before")  # the dense model's hidden states, as far as units need them
    count, batches, reached = len(host.skeleton.real), range(len(before.batches)), 0
    steps = max(unit.first for unit in units) + sum(count - unit.first + 1 for unit in units)
    progress.start("sensitivity", steps * len(batches))
    rows: dict[int, dict[str, Any]] = {}
    for place in sorted(range(len(units)), key=lambda place: units[place].first):
        unit = units[place]
        progress.advance(0, f"{unit.by} {unit.key}")
        for index in range(reached, unit.first):
            with host.block(index) as block:
                before.forward(index, block, progress)
        reached = unit.first
        for number in batches:
            reading.stream.put(reached, number, before.get(reached, number))
        partly.names = unit.names
        rows[place] = _row(unit, found, perplexity(reading, _Part(progress), dense=dense, first=reached))
    progress.finish()
    return found, {by: [rows[place] for place, unit in enumerate(units) if unit.by == by] for by in UNITS}


def _row(unit: Unit, dense: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    fidelity = found["fidelity"]
    return {
        unit.by: unit.key,
        "matrices": unit.matrices,
        "weights": unit.weights,
        "sparsity": unit.zeros / unit.weights,
        "kl": fidelity["kl"],
        "top1": fidelity["top1"],
        "loss_increase": found["loss"] - dense["loss"],
        "loss_increase_stderr": fidelity["loss_increase_stderr"],
    }


class _Part:
    """The progress of a part, told as progress of the whole."""

    def __init__(self, whole: Progress) -> None:
        self.whole = whole

    def start(self, task: str, total: float, done: float = 0) -> None: ...

    def advance(self, done: float = 1, note: str | None = None) -> None:
        """The whole has come as far."""
        self.whole.advance(done, note)

    def finish(self) -> None: ...
