"""A block's tensors cut to the shapes that a smaller model has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.disk_host import DiskHost
from ..models.hosts import Host, block_matrices
from ..models.matrices import Matrix
from .roles import HEADS, NEURONS, Coupling, Geometry, find_couplings


@dataclass(frozen=True)
class Kept:
    """What stays of one block; what is not named stays whole.

    Attributes:
        groups: reader's name -> True for each neuron or group of heads that stays.
        experts: numbers of the experts that stay.
    """

    groups: Mapping[str, Tensor] = field(default_factory=dict)
    experts: Sequence[int] | None = None


def new_groups(
    host: Host, small: Host, index: int, geometry: Geometry, smaller: Geometry
) -> dict[str, tuple[int, int]]:
    """Return by reader how many neurons or groups of heads a block has, and how many the smaller model's block has.

    Only those whose numbers differ.

    Raises:
        ModelError: the smaller model's block is made otherwise.
    """
    found: dict[str, tuple[int, int]] = {}
    theirs = {c.where: c for c in find_couplings(block_matrices(small, index))}
    for coupling in find_couplings(block_matrices(host, index)):
        other = theirs.get(coupling.where)
        if other is None or len(other.readers) != len(coupling.readers):
            raise ModelError(f"{coupling.where}: the smaller model has no such part; its config cannot say this cut")
        counts = coupling.groups(geometry), other.groups(smaller)
        if counts[0] != counts[1]:
            found |= {reader.name: counts for reader in coupling.readers}
    return found


def kept_groups(reader: Matrix, width: int, left: int) -> Tensor:
    """Return which groups of a pruned matrix's columns stay: those that are not all zero, then others up to `left`."""
    sums_N = reader.read().float().abs().sum(0).unflatten(0, (-1, width)).sum(1)
    order = torch.sort((sums_N > 0).int(), descending=True, stable=True).indices
    kept_N = torch.zeros(len(sums_N), dtype=torch.bool)
    kept_N[order[:left].cpu()] = True
    if (sums_N.cpu()[~kept_N] != 0).any():
        raise ModelError(f"{reader.name}: more than {left} groups are left; a defect of Secateur, please report it")
    return kept_N


def cut_block(
    host: Host, block: nn.Module, small: DiskHost, index: int, kept: Kept, geometry: Geometry
) -> dict[str, Tensor]:
    """Cut a resident block to the shapes of a smaller model's.

    Args:
        host: the whole model.
        block: its block, resident.
        small: the smaller model, which needs no weights.
        index: of the block, in both.
        kept: what stays.
        geometry: of the whole model.

    Returns:
        The tensors whose shapes change, by their names in memory.

    Raises:
        ModelError: a shape changes and nothing tells which of its slices stay.
    """
    path = f"{host.skeleton.path}.{index}."
    wanted = {path + name: tensor.shape for name, tensor in small.skeleton.real[index].state_dict().items()}
    held = {path + name: tensor for name, tensor in block.state_dict().items()}
    if wanted.keys() != held.keys():
        name = min(wanted.keys() ^ held.keys())
        raise ModelError(f"{name}: is only in one of the two models; the config cannot say this cut")
    couplings = find_couplings(block_matrices(host, index))
    slices = _slices(couplings, kept, geometry)
    new: dict[str, Tensor] = {}
    for name, tensor in held.items():
        if tensor.shape == wanted[name]:
            continue
        if name in slices:
            dim, indices = slices[name]
            cut = _select(tensor, dim, indices)
        else:
            cut = _by_size(name, tensor, wanted[name], couplings, kept, geometry)
        if cut.shape != wanted[name]:
            raise ModelError(
                f"{name}: the smaller config makes {list(wanted[name])} of {list(tensor.shape)}, the cut "
                f"{list(cut.shape)}; the config of this family cannot say this cut"
            )
        new[name] = cut.contiguous()
    return new


def _slices(couplings: Sequence[Coupling], kept: Kept, geometry: Geometry) -> dict[str, tuple[int, list[Tensor]]]:
    """By parameter: the dimension that is cut, and the indices that stay, one list for each expert."""
    found: dict[str, tuple[int, list[Tensor]]] = {}
    for coupling in couplings:
        marks = [kept.groups[reader.name] for reader in coupling.readers if reader.name in kept.groups]
        if not marks:
            continue
        width = coupling.pattern(geometry).width
        reader = coupling.readers[0]
        columns = [mark.repeat_interleave(width).nonzero()[:, 0] for mark in marks]
        found[reader.parameter] = -2 if reader.transposed else -1, columns
        for leaf, matrices in coupling.writers.items():
            rows = [coupling.rows(leaf, mark, geometry) for mark in marks]
            writer = matrices[0]
            found[writer.parameter] = -1 if writer.transposed else -2, rows
            if writer.bias:
                found[writer.bias[0]] = -1, rows
    return found


def _select(tensor: Tensor, dim: int, indices: Sequence[Tensor]) -> Tensor:
    if len(indices) == 1:
        return tensor.index_select(dim, indices[0].to(tensor.device))
    return torch.stack([t.index_select(dim, i.to(t.device)) for t, i in zip(tensor, indices, strict=True)])


def _by_size(
    name: str, tensor: Tensor, wanted: Sequence[int], couplings: Sequence[Coupling], kept: Kept, geometry: Geometry
) -> Tensor:
    """Cut a tensor that belongs to no matrix, such as a router's, by what its sizes are."""
    for dim, (old, new) in enumerate(zip(tensor.shape, wanted, strict=True)):
        if old != new:
            stays = _stays(name, old, new, couplings, kept, geometry)
            if stays is None:
                raise ModelError(
                    f"{name}: becomes {list(wanted)} from {list(tensor.shape)}, and nothing tells which parts stay; "
                    "this family cannot be cut so"
                )
            tensor = tensor.index_select(dim, stays.to(tensor.device))
    return tensor


def _stays(
    name: str, old: int, new: int, couplings: Sequence[Coupling], kept: Kept, geometry: Geometry
) -> Tensor | None:
    if kept.experts is not None and len(kept.experts) == new and old > max(kept.experts):
        return torch.tensor(kept.experts)
    for coupling in couplings:
        mark = kept.groups.get(coupling.readers[0].name)
        if mark is None or not name.startswith(f"{coupling.where}."):
            continue
        if coupling.kind == NEURONS and old == len(mark) and len(coupling.readers) == 1:
            return mark.nonzero()[:, 0]
        if coupling.kind == HEADS:
            head = coupling.columns // geometry.heads
            for size in (1, head):  # one value for each head, or for each of its columns
                for count in (geometry.heads, geometry.groups):
                    if old == count * size:
                        return mark.repeat_interleave(count // geometry.groups * size).nonzero()[:, 0]
    return None
