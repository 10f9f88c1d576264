"""Where a model's blocks come from: a checkpoint on disk (`disk_host`), or a model in memory (`live_host`).

Both hosts offer the same to the loop: a skeleton, and `block(i)`, a context that yields block i resident in
the computing dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .anatomy import Skeleton
from .matrices import Matrix, matrices


class Host(Protocol):
    """A model whose blocks can be made resident one at a time."""

    model: PreTrainedModel
    skeleton: Skeleton
    device: torch.device

    def block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Yield block `index`, resident."""

    def written_dtype(self, matrix: Matrix) -> torch.dtype:
        """The dtype in which a matrix's new weights are kept."""


def own_tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters and buffers that the modules hold themselves."""
    for module in modules:
        yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def block_matrices(host: Host, index: int) -> dict[str, Matrix]:
    """Return the matrices of block `index`, resident or not."""
    return matrices(host.skeleton.real[index], f"{host.skeleton.path}.{index}")
