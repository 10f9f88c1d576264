"""The matrices of a block: what can be pruned, seen as [out, in], and a way to watch their inputs.

This is the one door through which layouts are normalised: no method ever sees GPT-2's Conv1D or fused experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import See, Watch, expert_keys, experts_watched

# Linear layers that decide where tokens go: a router's few weights are never worth pruning.
ROUTERS = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")

# Modules that hold experts: DBRX stacks them in 2-D parameters.
EXPERTS = re.compile(r"(^|\.)experts(\.|$)")


@dataclass(frozen=True)
class Matrix:
    """One prunable matrix of a resident block, seen as [out, in] whatever its layout in memory.

    Attributes:
        name: whole name in the model, such as ``model.layers.0.mlp.up_proj`` or ``….experts.down_proj[3]``.
        parameter: whole name of the parameter that holds it.
        module: the module whose parameter it is.
        key: the parameter's name in its module.
        transposed: it is held [in, out] (GPT-2's Conv1D, some fused experts).
        expert: its place in a fused parameter [experts, …]; None for a parameter of its own.
    """

    name: str
    parameter: str
    module: nn.Module
    key: str = "weight"
    transposed: bool = False
    expert: int | None = None

    @property
    def weight(self) -> Any:
        """The whole parameter, in its own layout."""
        return getattr(self.module, self.key)

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input dimension."""
        rows, columns = self.weight.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def owner(self) -> tuple[int, int | None]:
        """What all matrices of one expert have in common."""
        return id(self.module), self.expert

    @property
    def bias(self) -> tuple[str, Any] | None:
        """The name in the model, and the whole parameter, of the matrix's bias; None without one."""
        key = "bias" if self.expert is None else f"{self.key}_bias"
        held = self.module._parameters.get(key)
        return None if held is None else (f"{self.parameter.rpartition('.')[0]}.{key}", held)

    def part(self, held: Tensor) -> Tensor:
        """Return this matrix's part [out, in], a view, of a tensor that is laid out like the whole parameter."""
        if self.expert is not None:
            held = held[self.expert]
        return held.T if self.transposed else held

    def read(self) -> Tensor:
        """Return the weights [out, in], a view."""
        return self.part(self.weight.detach())

    def write(self, W_OI: Tensor) -> None:
        """Put new weights [out, in] into the resident parameter."""
        self.part(self.weight.detach()).copy_(W_OI)
        self.weight.changed = True

    def add_to_bias(self, change_O: Tensor) -> None:
        """Change the resident bias [out]; there must be one."""
        assert self.bias is not None
        held = self.bias[1]
        (held if self.expert is None else held[self.expert]).detach().add_(change_O)
        held.changed = True


def matrices(block: nn.Module, path: str) -> dict[str, Matrix]:
    """Return the prunable matrices of a block that lies at `path` in its model, in order of definition.

    Embeddings, heads, norms, routers and convolution kernels are no matrices.
    """
    found: list[Matrix] = []
    for name, module in block.named_modules():
        whole = f"{path}.{name}"
        if isinstance(module, (nn.Linear, Conv1D)):
            if not ROUTERS.search(name):
                found.append(Matrix(whole, f"{whole}.weight", module, transposed=isinstance(module, Conv1D)))
            continue
        for key in expert_keys(module):
            parameter, held = f"{whole}.{key}", module._parameters[key]
            for expert in range(len(held)):
                found.append(Matrix(f"{parameter}[{expert}]", parameter, module, key, module.is_transposed, expert))
    return {matrix.name: matrix for matrix in found}


def unreadable(block: nn.Module, path: str) -> dict[str, int]:
    """Return the weights of a block's fused parameters whose layout nothing tells, by name.

    They are 3-D, or 2-D among experts, belong to no linear layer or convolution, and are not behind transformers'
    interface of experts.
    """
    return {
        f"{path}.{name}.{key}": parameter.numel()
        for name, module in block.named_modules()
        if not isinstance(module, (nn.Linear, Conv1D, nn.modules.conv._ConvNd)) and not expert_keys(module)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 or (parameter.ndim == 2 and EXPERTS.search(name))
        if min(parameter.shape[1:]) > 1
    }


@contextmanager
def watching(chosen: Mapping[str, Matrix], see: See, everywhere: Collection[str] = ()) -> Iterator[None]:
    """Show `see` the inputs of matrices, by name, each time just before they are used.

    Args:
        chosen: the matrices.
        see: called with the inputs [..., in] of all matrices that are about to be used together.
        everywhere: names of experts' matrices that are shown all tokens of their layer, not only those routed to
            them; may grow meanwhile.
    """
    experts: dict[nn.Module, dict[str, dict[int, str]]] = {}
    with ExitStack() as stack:
        for name, matrix in chosen.items():
            if matrix.expert is not None:
                experts.setdefault(matrix.module, {}).setdefault(matrix.key, {})[matrix.expert] = name
            else:
                stack.enter_context(_hooked(matrix, see))
        stack.enter_context(experts_watched({m: Watch(names, see, everywhere) for m, names in experts.items()}))
        yield


@contextmanager
def _hooked(matrix: Matrix, see: See) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see({matrix.name: args[0] if args else next(v for v in kwargs.values() if torch.is_tensor(v))})

    handle = matrix.module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
