"""Which slices of a block's matrices belong together: found by the names that decoders give to their layers.

A neuron is a column of the matrix that reads it and a row of each matrix that writes it; a head is many of both.
Nothing here is trusted: before anything is cut, `proof` compares the cut block with the whole one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError
from ..models.matrices import Matrix
from ..pruning.structured import Columns

NEURONS, HEADS = "neurons", "heads"

# Reader and writers of an MLP's neurons, the longer lists first.
MLP_LEAVES = (
    ("down_proj", ("gate_proj", "up_proj")),
    ("down_proj", ("gate_up_proj",)),
    ("down_proj", ("up_proj",)),
    ("w2", ("w1", "w3")),
    ("c_proj", ("c_fc",)),
    ("c_proj", ("w1", "w2")),
    ("fc2", ("fc1",)),
    ("dense_4h_to_h", ("dense_h_to_4h",)),
    ("fc_out", ("fc_in",)),
    ("output_linear", ("input_linear",)),
    ("Wo", ("Wi",)),
)
# Reader of an attention's heads, and the matrices of queries, keys and values.
ATTENTION_LEAVES = (
    *((reader, ("q_proj", "k_proj", "v_proj")) for reader in ("o_proj", "out_proj", "dense")),
    ("o_proj", ("qkv_proj",)),
    ("c_proj", ("c_attn",)),
    ("dense", ("query_key_value",)),
    ("out_proj", ("qkv_proj",)),
)
# Gate and up in one matrix: one after the other, or row by row in turn.
LAYOUTS = ("halves", "turns")


@dataclass(frozen=True)
class Geometry:
    """How many heads a model has, and which of its rows are whose.

    Attributes:
        heads: of queries.
        groups: of heads that share keys and values.
        layout: of fused gate and up matrices.
    """

    heads: int
    groups: int
    layout: str = LAYOUTS[0]


@dataclass(frozen=True)
class Coupling:
    """Matrices whose slices go together.

    Attributes:
        kind: ``neurons`` or ``heads``.
        where: path of the module that holds them.
        reader: the matrix whose columns they are, one for each expert.
        writers: leaf name -> the matrices whose rows they are, one for each expert.
    """

    kind: str
    where: str
    readers: Sequence[Matrix]
    writers: Mapping[str, Sequence[Matrix]]

    @property
    def columns(self) -> int:
        """Columns of a reader."""
        return self.readers[0].shape[1]

    def pattern(self, geometry: Geometry) -> Columns:
        """The columns that go as one."""
        return Columns(1 if self.kind == NEURONS else self.columns // geometry.groups)

    def groups(self, geometry: Geometry) -> int:
        """How many neurons, or groups of heads, there are."""
        return self.columns if self.kind == NEURONS else geometry.groups

    @property
    def weights(self) -> int:
        """Weights in all its matrices."""
        return sum(m.weights for m in (*self.readers, *(m for ms in self.writers.values() for m in ms)))

    def rows(self, leaf: str, kept_N: Tensor, geometry: Geometry) -> Tensor:
        """Return the rows of a writer that stay when the groups marked in `kept_N` do.

        Raises:
            ModelError: its rows are not those of neurons or heads.
        """
        rows = self.writers[leaf][0].shape[0]
        if self.kind == NEURONS:
            if rows == len(kept_N):
                return kept_N.nonzero()[:, 0]
            if rows == 2 * len(kept_N):
                both = torch.cat([kept_N, kept_N]) if geometry.layout == "halves" else kept_N.repeat_interleave(2)
                return both.nonzero()[:, 0]
        else:
            query, value = self.columns, self.columns // geometry.heads * geometry.groups
            parts = [rows] if leaf in ("q_proj", "k_proj", "v_proj") else [query, value, value]
            if sum(parts) == rows and all(part % geometry.groups == 0 for part in parts):
                return torch.cat([kept_N.repeat_interleave(part // geometry.groups) for part in parts]).nonzero()[:, 0]
        raise ModelError(f"{self.where}.{leaf}: has {rows} rows, which are not those of {len(kept_N)} {self.kind}")


def find_couplings(matrices: Mapping[str, Matrix]) -> list[Coupling]:
    """Find the couplings among a block's matrices."""
    found: list[Coupling] = []
    for where, leaves in _by_parent(matrices).items():
        for kind, table in ((NEURONS, MLP_LEAVES), (HEADS, ATTENTION_LEAVES)):
            for reader, writers in table:
                if reader in leaves and all(name in leaves for name in writers):
                    found.append(Coupling(kind, where, leaves[reader], {name: leaves[name] for name in writers}))
                    break
    return found


def _by_parent(matrices: Mapping[str, Matrix]) -> dict[str, dict[str, list[Matrix]]]:
    """Sort matrices by the module that holds them and by leaf name, experts in order."""
    found: dict[str, dict[str, list[Matrix]]] = {}
    for name, matrix in matrices.items():
        where, _, leaf = re.sub(r"\[\d+\]$", "", name).rpartition(".")
        found.setdefault(where, {}).setdefault(leaf, []).append(matrix)
    return found


def of_kind(couplings: Sequence[Coupling], kind: str) -> Iterator[Coupling]:
    """Those of one kind."""
    return (coupling for coupling in couplings if coupling.kind == kind)
