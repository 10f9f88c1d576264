"""The proof of a cut: the smaller block gives what the whole block gives with the removed parts silenced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.anatomy import hidden_of
from ..models.disk_host import DiskHost
from ..models.experts import expert_keys
from ..models.hosts import Host, block_matrices
from ..models.replay import same_output
from ..models.source import first_line

PROBE_TOKENS = 24
SILENCED = -1e4  # a router's answer for an expert that is not there


def probe(host: Host) -> Tensor:
    """A short sequence of tokens, [1, T], for trying blocks out."""
    vocabulary = int(host.model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(8, vocabulary - 1), vocabulary, (1, PROBE_TOKENS), generator=generator).to(host.device)


def prove(
    host: Host,
    block: nn.Module,
    index: int,
    small: DiskHost,
    place: int,
    written: Mapping[str, Tensor],
    watched: Sequence[str],
) -> None:
    """Compare a resident block of the whole model, silenced in part, with the smaller model's.

    Args:
        host: the whole model.
        block: its block, resident, with the removed parts silenced.
        index: of the block.
        small: the smaller model.
        place: of the block in the smaller model.
        written: tensors of the smaller block that are not in its checkpoint, by names on disk.
        watched: modules inside the block, by their names in it, whose outputs must be equal too.

    Raises:
        ModelError: an output differs.
    """
    name, ids = f"{host.skeleton.path}.{index}", probe(host)
    hidden, calls = host.skeleton.record(ids)
    expected = _outputs(block, watched, lambda: calls[index].run(block, hidden))
    try:
        own = small.skeleton.record(ids)[1][place]
        with small.block(place, written) as cut:
            found = _outputs(cut, watched, lambda: own.run(cut, hidden))
    except Exception as error:  # whatever a model's code raises when its parts do not fit
        why = first_line(error).removeprefix(f"{small.checkpoint.directory}: ")
        raise ModelError(f"{name}: cannot be cut so; the smaller block does not run ({why})") from error
    for what, tensor in expected.items():
        if found[what].shape != tensor.shape or not same_output(tensor, found[what]):
            where = f"{name}.{what}".rstrip(".")
            raise ModelError(
                f"{where}: the smaller block gives another output than the whole one with the removed parts silenced, "
                f"so {host.model.config.get_text_config().model_type} cannot be cut so"
            )


def _outputs(block: nn.Module, watched: Sequence[str], run: Any) -> dict[str, Tensor]:
    """What modules of a block give, by their names; the block's own output last, without a name."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            found[name] = hidden_of(out).detach()

        return hook

    handles = [block.get_submodule(name).register_forward_hook(keep(name)) for name in watched]
    try:
        with torch.no_grad():
            out = run()
    finally:
        for handle in handles:
            handle.remove()
    return found | {"": out}


def readers_of(host: Host, index: int, names: Sequence[str]) -> list[str]:
    """The modules of a block that hold the matrices called `names`, by their names in the block."""
    prefix, matrices = f"{host.skeleton.path}.{index}.", block_matrices(host, index)
    return sorted({matrices[n].parameter.rpartition(".")[0].removeprefix(prefix) for n in names})


@contextmanager
def silenced_groups(host: Host, index: int, kept: Mapping[str, Tensor]) -> Iterator[None]:
    """Zero the columns of a resident block's readers that do not stay, for a while."""
    former: list[tuple[Any, Tensor]] = []
    matrices = block_matrices(host, index)
    try:
        for name, kept_N in kept.items():
            matrix = matrices[name]
            W_OI = matrix.read()
            former.append((matrix, W_OI.clone()))
            mark = kept_N.repeat_interleave(W_OI.shape[1] // len(kept_N)).to(W_OI.device)
            matrix.write(torch.where(mark, W_OI, 0))
        yield
    finally:
        for matrix, W_OI in former:
            matrix.write(W_OI)


@contextmanager
def silenced_experts(host: Host, block: nn.Module, index: int, small: Host, kept: Sequence[int]) -> Iterator[None]:
    """Have a resident block's routers never choose the experts that do not stay, on the probe's tokens, for a while.

    Their rows are exchanged for ones whose product with each token's hidden state is `SILENCED`.

    Raises:
        ModelError: what chooses the experts is not a linear layer.
    """
    theirs = small.skeleton.real[index].state_dict()
    changed = {
        name: tensor
        for name, tensor in block.state_dict().items()
        if tensor.shape != theirs[name].shape and not expert_keys(block.get_submodule(name.rpartition(".")[0]))
    }
    weights = [name for name, tensor in changed.items() if tensor.ndim == 2]
    mixtures: list[Any] = [module for module in block.modules() if expert_keys(module)]
    count = max((module.num_experts for module in mixtures), default=0)
    for name, tensor in changed.items():
        if len(tensor) != count or tensor.ndim > 2:
            raise ModelError(f"{host.skeleton.path}.{index}.{name}: is not one row for each of {count} experts")
    gone = torch.tensor(sorted(set(range(count)) - set(kept)), dtype=torch.long)
    owners = {name: block.get_submodule(name.rpartition(".")[0]) for name in weights}
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[name] = (args[0] if args else next(iter(kwargs.values()))).detach()

        return hook

    handles = [module.register_forward_pre_hook(keep(n), with_kwargs=True) for n, module in owners.items()]
    former = {name: tensor.clone() for name, tensor in changed.items()}
    try:
        hidden, calls = host.skeleton.record(probe(host))
        with torch.no_grad():
            calls[index].run(block, hidden)
            for name, tensor in changed.items():
                if tensor.ndim == 1:
                    tensor[gone] = SILENCED
                    continue
                x_TI = (
                    inputs[name].reshape(-1, inputs[name].shape[-1]).double() if name in inputs else torch.empty(0, 0)
                )
                if x_TI.shape[-1] != tensor.shape[1] or len(x_TI) > tensor.shape[1]:
                    raise ModelError(
                        f"{host.skeleton.path}.{index}.{name}: is no router that can be silenced, so the removal of "
                        "experts cannot be proved"
                    )
                row_I = torch.linalg.lstsq(x_TI, torch.full((len(x_TI), 1), SILENCED, dtype=x_TI.dtype)).solution[:, 0]
                tensor[gone] = row_I.to(tensor)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, tensor in changed.items():
            tensor.copy_(former[name])
