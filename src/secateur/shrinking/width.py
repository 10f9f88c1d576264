"""Neurons and heads: what goes is chosen by the pruning loop, as whole columns, and cut after it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.checkpoint import Checkpoint
from ..models.disk_host import DiskHost
from ..models.hosts import block_matrices
from ..models.matrices import Matrix
from ..pipeline.loop import Job
from ..progress import Progress
from ..pruning import GRAM, SUM, Method
from ..pruning.allocation import Target
from ..pruning.structured import Columns
from .config import WIDTHS, Config
from .cut import Kept, kept_groups, new_groups
from .cutting import blocks_of_each_kind, cut_all, try_out
from .proof import silenced_groups
from .roles import HEADS, LAYOUTS, NEURONS, Coupling, Geometry, find_couplings, of_kind
from .views import smaller_model, with_config


class Narrowing:
    """A model, and the narrower one that a new config makes of it.

    Attributes:
        host: the model.
        small: the narrower one; its tensors are still the model's.
        geometry, smaller: of the heads of both.
        counts: reader's name -> how many neurons or groups of heads it has, and will have.
    """

    def __init__(self, host: DiskHost, values: Mapping[str, int], folder: Path) -> None:
        """Make the narrower model, without weights.

        Args:
            host: the model.
            values: new ones for its config.
            folder: for its config.json.

        Raises:
            ModelError: the config does not make it.
        """
        config = Config(host.checkpoint.directory, host.model.config)
        self.host, self.config = host, config.changed(**values)
        view = with_config(host.checkpoint, self.config, folder)
        heads = "head_dim" in values
        try:
            self.small = smaller_model(view, host)
        except ModelError as error:
            raise (ModelError(no_heads(config)) if heads else error) from error
        self.geometry = self.smaller = Geometry(1, 1)
        if heads:
            self.geometry = Geometry(*config.heads)
            self.smaller = Geometry(*Config(folder, self.small.model.config).heads)
        self.counts: dict[str, tuple[int, int]] = {}
        for index in range(len(host.skeleton.real)):
            self.counts |= new_groups(host, self.small, index, self.geometry, self.smaller)
        wanted = [HEADS] if heads else []
        self._check(config, [*wanted, NEURONS] if values.keys() & set(WIDTHS) else wanted)

    def _check(self, config: Config, wanted: Collection[str]) -> None:
        """Raise ModelError if the new config does not remove what is wanted, or changes the width of heads."""
        found: set[str] = set()
        for index in range(len(self.host.skeleton.real)):
            theirs = {coupling.where: coupling for coupling in couplings_of(self.small, index)}
            for coupling in couplings_of(self.host, index):
                found |= {coupling.kind} if coupling.readers[0].name in self.counts else set()
                if coupling.kind == HEADS and HEADS in wanted:
                    old, new = coupling.pattern(self.geometry), theirs[coupling.where].pattern(self.smaller)
                    if old != new or coupling.readers[0].name not in self.counts:
                        raise ModelError(no_heads(config))
        for kind in wanted:
            if kind not in found:
                raise ModelError(f"{config.kind}: none of its layers are known to have {kind}, so none can be removed")

    def job(self, method: Method, propagate: str) -> Job:
        """What the pruning loop is to do: whole columns of readers go; biases make up for them if the rest does."""
        targets = {
            reader.name: Target((count - left) / count, Columns(width))
            for index in range(len(self.host.skeleton.real))
            for reader, width, count, left in self._readers(index)
        }
        return Job(method, targets, propagate, fold_mean={SUM, GRAM} <= method.needs)

    def settle(self, progress: Progress) -> None:
        """Cut one block of each kind by chance, and prove it: before hours of work, whatever would be wrong after them.

        Finds the layout of fused gate and up matrices on the way.

        Raises:
            ModelError: a cut block gives something else.
        """
        first, unknown = blocks_of_each_kind(self.host), True
        progress.start("proving the cut", len(first))
        for index in first:
            layouts = LAYOUTS if unknown and self._fused(index) else [self.geometry.layout]
            unknown = unknown and not self._fused(index)
            for layout in layouts:
                self.geometry = replace(self.geometry, layout=layout)
                try:
                    try_out(self.host, self.small, self.geometry, self._by_chance, index)
                except ModelError:
                    if layout == layouts[-1]:
                        raise
                else:
                    break
            progress.advance()
        progress.finish()

    def _readers(self, index: int) -> Iterator[tuple[Matrix, int, int, int]]:
        """The matrices of a block that lose columns; width of a group, and how many there are and will be."""
        for coupling in couplings_of(self.host, index):
            for reader in coupling.readers:
                if reader.name in self.counts:
                    yield reader, coupling.pattern(self.geometry).width, *self.counts[reader.name]

    def _by_chance(self, index: int, block: nn.Module) -> tuple[Kept, AbstractContextManager[None]]:
        generator, kept = torch.Generator().manual_seed(index), dict[str, Tensor]()
        for reader, _, count, left in self._readers(index):
            kept[reader.name] = torch.zeros(count, dtype=torch.bool)
            kept[reader.name][torch.randperm(count, generator=generator)[:left]] = True
        return Kept(kept), silenced_groups(self.host, index, kept)

    def _as_pruned(self, index: int, block: nn.Module) -> tuple[Kept, AbstractContextManager[None]]:
        kept = {reader.name: kept_groups(reader, width, left) for reader, width, _, left in self._readers(index)}
        return Kept(kept), nullcontext()

    def _fused(self, index: int) -> bool:
        """Whether a matrix of a block holds both the gate and the up projection."""
        return any(
            matrices[0].shape[0] == 2 * coupling.columns
            for coupling in of_kind(couplings_of(self.host, index), NEURONS)
            for matrices in coupling.writers.values()
        )

    def cut(self, written: Callable[[int], Mapping[str, Tensor]], folder: Path, progress: Progress) -> Checkpoint:
        """Cut every block, in which whole columns are zero, and prove it.

        Args:
            written: given a block's number, its new tensors by names on disk.
            folder: where cut tensors go.
            progress: hears of blocks.

        Returns:
            The narrower checkpoint; its new tensors lie in `folder`.
        """
        return cut_all(self.host, self.small, self.geometry, self._as_pruned, written, folder / "narrow", progress)


def couplings_of(host: DiskHost, index: int) -> list[Coupling]:
    """The couplings of one block."""
    return find_couplings(block_matrices(host, index))


def no_heads(config: Config) -> str:
    """Why a family's heads cannot be removed."""
    return (
        f"heads: {config.kind} makes its heads as wide as its hidden size allows, and no head_dim in its config says "
        "otherwise, so none can be removed; neurons and layers can"
    )
