"""The loop's results on their way to disk: cast, packed if they are to be, and kept block by block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..models.disk_host import DiskHost
from ..models.formats import Packing, pack, unpack
from ..models.matrices import Matrix
from ..models.shards import read_tensor
from .run_directory import RunDirectory


class DiskRun:
    """The loop's results on their way into a run directory."""

    def __init__(
        self, directory: RunDirectory, host: DiskHost, format: str = "dense", values: str | None = None
    ) -> None:
        """Take the results of a run.

        Args:
            directory: where they go.
            host: the model.
            format: of the pruned matrices.
            values: ``int8`` rounds their values; None keeps them.
        """
        self.directory, self.host, self.format, self.values = directory, host, format, values
        self._packed: dict[str, tuple[Packing, dict[str, Tensor]]] = {}

    @property
    def done(self) -> int:
        """How many blocks are finished."""
        return len(self.directory.blocks)

    def guarded(self, block: nn.Module) -> AbstractContextManager[None]:
        """A block from disk is dropped after an error."""
        return nullcontext()

    def as_written(self, matrix: Matrix, W_OI: Tensor) -> Tensor:
        """Return new weights as they will be read from the result, and remember them packed if they are to be.

        Raises:
            OptionError: their zeros do not have the pattern that the format asks for.
        """
        written = W_OI.to(self.host.written_dtype(matrix))
        name = name_if_packable(self.host, matrix)
        packed = pack(name, written, self.format, self.values) if name and self.format != "dense" else None
        if name is None or packed is None:
            return written
        packing, parts = packed
        self._packed[name] = replace(packing, transposed=matrix.transposed), parts
        return unpack(packing, parts)

    def cast(self, name: str, parameter: Tensor) -> Tensor:
        """Return a parameter cast to the dtype in which it is written."""
        return parameter.to(self.host.dtype_on_disk(name))

    @property
    def packed(self) -> dict[str, Packing]:
        """What of the resident block is packed so far, by names on disk."""
        return {name: packing for name, (packing, _) in self._packed.items()}

    def keep(self, index: int, pruned: Sequence[Matrix]) -> None:
        """Write the changed parameters of a resident block under their names on disk."""
        path = f"{self.host.skeleton.path}.{index}"
        changed = {
            f"{path}.{name}": self.cast(f"{path}.{name}", parameter.detach())
            for name, parameter in self.host.skeleton.real[index].named_parameters()
            if parameter.__dict__.get("changed")
        }
        tensors = self.host.on_disk(changed) if changed else {}
        for name, (_, parts) in self._packed.items():
            del tensors[name]
            tensors |= {name + suffix: part for suffix, part in parts.items()}
        self.directory.write_block(index, tensors, self.packed)
        self._packed.clear()

    def finish(self, index: int, record: dict[str, Any]) -> None:
        """Note that a block is finished."""
        self.directory.note(record)

    def written(self, index: int) -> dict[str, Tensor]:
        """Read a finished block's new tensors, by their names on disk."""
        return {name: read_tensor(info) for name, info in self.directory.block_tensors(index).items()}


def name_if_packable(host: DiskHost, matrix: Matrix) -> str | None:
    """Return a matrix's name on disk if it lies there as it does in memory; experts are fused in memory only."""
    names = host.names_of[matrix.parameter]
    own = (matrix.parameter, matrix.parameter.removeprefix(f"{host.model.base_model_prefix}."))
    return names[0] if matrix.expert is None and len(names) == 1 and names[0] in own else None
