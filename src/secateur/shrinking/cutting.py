"""The cut of a whole model: tried on a block of each kind before the work, made and proved on every block after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import NumericsError
from ..models.checkpoint import Checkpoint
from ..models.disk_host import DiskHost
from ..models.shards import Info, read_header, tensor_entry, write_safetensors
from ..pipeline.files import into_place
from ..progress import Progress
from .cut import Kept, cut_block
from .proof import prove, readers_of
from .roles import Geometry
from .views import with_tensors

# Tells, for a resident block, what stays, and gives a context in which the rest is silent.
Cut = Callable[[int, nn.Module], tuple[Kept, AbstractContextManager[None]]]


def kinds_of_blocks(host: DiskHost) -> list[object]:
    """The kind of each block: the names and shapes of its tensors."""
    return [tuple((n, tuple(t.shape)) for n, t in block.state_dict().items()) for block in host.skeleton.real]


def blocks_of_each_kind(host: DiskHost) -> list[int]:
    """The first block of each kind."""
    kinds = kinds_of_blocks(host)
    return sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())


def try_out(host: DiskHost, small: DiskHost, geometry: Geometry, cut: Cut, index: int) -> None:
    """Cut one block and prove it; nothing is kept.

    Raises:
        ModelError: the smaller block gives something else.
    """
    with host.block(index) as block:
        kept, silent = cut(index, block)
        with silent:
            prove_cut(host, block, index, small, kept, geometry, {})


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
    new = host.on_disk(resized, resized=True)
    gone = {name for parameter in resized for name in host.names_of[parameter]} - new.keys()
    small.names[index] = [name for name in host.names[index] if name not in gone]
    prove(host, block, index, small, index, {**written, **new}, readers_of(host, index, list(kept.groups)))
    rounded = host.on_disk({n: t.to(host.dtype_on_disk(n)) for n, t in resized.items()}, resized=True)
    for name, tensor in rounded.items():
        if not torch.isfinite(tensor).all():
            raise NumericsError(f"{name}: does not fit {tensor.dtype}; use --dtype float32 or bfloat16")
    return {**written, **rounded}


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
        cut: tells what stays.
        written: a block's tensors that are new already, by names on disk.
        folder: where the cut ones go.
        progress: hears of blocks.

    Returns:
        The smaller checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
    before, after = ({name for i in range(count) for name in one.names.get(i, [])} for one in (host, small))
    return with_tensors(small.checkpoint, infos, before - after)
