"""Neurons and heads: which of them go, in the pruning loop as whole columns, and the cut after it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.checkpoint import Checkpoint
from ..models.hosts import DiskHost, block_matrices
from ..models.shards import Info, read_header, tensor_entry, write_safetensors
from ..pipeline.files import into_place
from ..pipeline.loop import Job
from ..progress import Progress
from ..pruning import Method
from ..pruning.allocation import Target
from .config import Config
from .cut import Kept, cut_block, kept_groups, new_groups
from .proof import prove, readers_of, silenced_groups
from .roles import HEADS, LAYOUTS, NEURONS, Coupling, Geometry, find_couplings, of_kind
from .views import with_config, with_tensors


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
            self.small = DiskHost(view, host.device, host.dtype)
        except ModelError as error:
            raise (ModelError(no_heads(config)) if heads else error) from error
        self.geometry = self.smaller = Geometry(1, 1)
        if heads:
            self.geometry = Geometry(*config.heads)
            self.smaller = Geometry(*Config(folder, self.small.model.config).heads)
        self.counts: dict[str, tuple[int, int]] = {}
        for index in range(len(host.skeleton.real)):
            self.counts |= new_groups(host, self.small, index, self.geometry, self.smaller)
        self._check(config, heads=heads)

    def _check(self, config: Config, *, heads: bool) -> None:
        theirs = {c.where: c for i in range(len(self.small.skeleton.real)) for c in couplings_of(self.small, i)}
        for index in range(len(self.host.skeleton.real)):
            for coupling in of_kind(couplings_of(self.host, index), HEADS):
                other = theirs[coupling.where]
                width, new = (c.columns // g.groups for c, g in ((coupling, self.geometry), (other, self.smaller)))
                if heads and (width != new or coupling.readers[0].name not in self.counts):
                    raise ModelError(no_heads(config))

    def job(self, method: Method, propagate: str) -> Job:
        """What the pruning loop is to do: whole columns of readers go."""
        targets: dict[str, Target] = {}
        for index in range(len(self.host.skeleton.real)):
            for coupling in couplings_of(self.host, index):
                for reader in coupling.readers:
                    if reader.name in self.counts:
                        count, left = self.counts[reader.name]
                        targets[reader.name] = Target((count - left) / count, coupling.pattern(self.geometry))
        return Job(method, targets, propagate, fold_mean=True)

    def settle(self, progress: Progress) -> None:
        """Cut one block of each kind by chance, and prove it: before hours of work, whatever would be wrong after them.

        Finds the layout of fused gate and up matrices on the way.

        Raises:
            ModelError: a cut block gives something else.
        """
        first = {self._signature(index): index for index in reversed(range(len(self.host.skeleton.real)))}
        progress.start("proving the cut", len(first))
        for number, index in enumerate(sorted(first.values())):
            for layout in LAYOUTS if number == 0 else [self.geometry.layout]:
                self.geometry = replace(self.geometry, layout=layout)
                try:
                    self._try(index)
                except ModelError:
                    if layout == LAYOUTS[-1] or number or not self._fused:
                        raise
                else:
                    break
            progress.advance()
        progress.finish()

    @property
    def _fused(self) -> bool:
        """Whether a matrix holds both the gate and the up projection."""
        return any(
            matrices[0].shape[0] == 2 * coupling.columns
            for index in range(len(self.host.skeleton.real))
            for coupling in of_kind(couplings_of(self.host, index), NEURONS)
            for matrices in coupling.writers.values()
        )

    def _signature(self, index: int) -> tuple[object, ...]:
        """What blocks of one kind have in common."""
        block = self.host.skeleton.real[index]
        return tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items())

    def _try(self, index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        with self.host.block(index) as block:
            kept = {
                reader.name: _chance(*self.counts[reader.name], generator)
                for coupling in couplings_of(self.host, index)
                for reader in coupling.readers
                if reader.name in self.counts
            }
            if kept:
                with silenced_groups(self.host, index, kept):
                    prove_cut(self.host, block, index, self.small, Kept(kept), self.geometry, {})

    def cut(self, written: Callable[[int], Mapping[str, Tensor]], folder: Path, progress: Progress) -> Checkpoint:
        """Cut every block, in which whole columns are zero, and prove it.

        Args:
            written: given a block's number, its new tensors by names on disk.
            folder: where cut tensors go.
            progress: hears of blocks.

        Returns:
            The narrower checkpoint; its new tensors lie in `folder`.
        """

        def cut(index: int, block: nn.Module) -> tuple[Kept, AbstractContextManager[None]]:
            kept = {}
            for coupling in couplings_of(self.host, index):
                for reader in coupling.readers:
                    if reader.name in self.counts:
                        width = coupling.pattern(self.geometry).width
                        kept[reader.name] = kept_groups(reader, width, self.counts[reader.name][1])
            return Kept(kept), _nothing()

        return cut_all(self.host, self.small, self.geometry, cut, written, folder, progress)


def couplings_of(host: DiskHost, index: int) -> list[Coupling]:
    """The couplings of one block."""
    return find_couplings(block_matrices(host, index))


def no_heads(config: Config) -> str:
    """Why a family's heads cannot be removed."""
    return (
        f"heads: {config.kind} makes its heads as wide as its hidden size allows, and no head_dim in its config says "
        "otherwise, so none can be removed; neurons and layers can"
    )


def _chance(count: int, left: int, generator: torch.Generator) -> Tensor:
    kept_N = torch.zeros(count, dtype=torch.bool)
    kept_N[torch.randperm(count, generator=generator)[:left]] = True
    return kept_N


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def prove_cut(
    host: DiskHost,
    block: nn.Module,
    index: int,
    small: DiskHost,
    kept: Kept,
    geometry: Geometry,
    written: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Cut a resident block in which the removed parts are silent, and prove that the smaller block gives the same.

    Returns:
        All new tensors of the smaller block by their names on disk.
    """
    resized = cut_block(host, block, small, index, kept, geometry)
    new = host.on_disk({n: t.to(host.dtype_on_disk(n)) for n, t in resized.items()}, resized=True)
    tensors = {**written, **new}
    gone = {name for parameter in resized for name in host.names_of[parameter]} - new.keys()
    small.names[index] = [name for name in host.names[index] if name not in gone]
    prove(host, block, index, small, index, tensors, readers_of(host, index, list(kept.groups)))
    return tensors


Cut = Callable[[int, nn.Module], tuple[Kept, AbstractContextManager[None]]]


def cut_all(
    host: DiskHost,
    small: DiskHost,
    geometry: Geometry,
    cut: Cut,
    written: Callable[[int], Mapping[str, Tensor]],
    folder: Path,
    progress: Progress,
) -> Checkpoint:
    """Cut every block and keep its new tensors in a folder.

    Args:
        host: the whole model.
        small: the smaller one.
        geometry: of the whole one's heads.
        cut: tells, for a resident block, what stays, and a context in which the rest is silent.
        written: a block's tensors that are new already, by names on disk.
        folder: where the cut ones go.
        progress: hears of blocks.

    Returns:
        The smaller checkpoint.
    """
    folder.mkdir(exist_ok=True)
    infos: dict[str, Info] = {}
    count = len(host.skeleton.real)
    progress.start("cutting", count)
    for index in range(count):
        new = written(index)
        with host.block(index, new) as block:
            kept, silent = cut(index, block)
            with silent:
                tensors = prove_cut(host, block, index, small, kept, geometry, new)
        path = folder / f"{index:04d}.safetensors"
        write_safetensors(path.with_suffix(".part"), [tensor_entry(name, t) for name, t in tensors.items()])
        into_place(path.with_suffix(".part"), path)
        infos |= read_header(path)[0]
        progress.advance()
    progress.finish()
    here: Collection[str] = {name for index in range(count) for name in small.names.get(index, [])}
    gone = {name for index in range(count) for name in host.names.get(index, [])} - set(here)
    return with_tensors(small.checkpoint, infos, gone)
