"""The anatomy of a decoder: its blocks, its matrices, and its skeleton.

No table of architectures: the blocks are the one outermost module list as long as the config says, the
matrices are the linear layers inside it, and what a block needs besides the hidden state is recorded by
running the model once with stubs in place of its blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, NumericsError

# Linear layers that decide where tokens go: a router's few weights are never worth pruning.
ROUTERS = re.compile(r"(^|\.)(router|gate|shared_expert_gate)$")


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of a decoder's blocks.

    Raises:
        ModelError: no module list, or more than one, has the config's number of layers.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise ModelError(
            f"{type(model).__name__}: expected one list of {count} decoder blocks, found {found}; "
            "only decoders with one stack of blocks can be pruned"
        )
    return outermost[0], lists[outermost[0]]


@dataclass(frozen=True)
class Matrix:
    """One prunable matrix of a resident block, seen as [out, in] whatever its layout in memory.

    Attributes:
        name: whole name of its module in the model, such as ``model.layers.0.mlp.up_proj``.
        module: the layer whose input is the matrix's input.
        transposed: the parameter is held [in, out] (GPT-2's Conv1D).
    """

    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> Any:
        """The parameter, in its own layout."""
        return self.module.weight

    @property
    def parameter(self) -> str:
        """Whole name of the parameter in the model."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input dimension."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self) -> Tensor:
        """Return the weights [out, in]; a view where the layout allows."""
        weight: Tensor = self.weight.detach()
        return weight.T if self.transposed else weight

    def to_parameter(self, W_OI: Tensor) -> Tensor:
        """Return weights [out, in] in the parameter's own layout."""
        return W_OI.T.contiguous() if self.transposed else W_OI

    def write(self, W_OI: Tensor) -> None:
        """Put new weights [out, in] into the resident parameter."""
        self.weight.data.copy_(self.to_parameter(W_OI))
        self.weight.changed = True


def matrices(block: nn.Module, path: str) -> dict[str, Matrix]:
    """Return the prunable matrices of a block that lies at `path` in its model, in order of definition.

    Embeddings, heads, norms, routers and convolution kernels are no matrices.

    Raises:
        ModelError: the block has fused experts, which this version cannot prune.
    """
    found: dict[str, Matrix] = {}
    for name, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and not ROUTERS.search(name):
            whole = f"{path}.{name}"
            found[whole] = Matrix(whole, module, isinstance(module, Conv1D))
        elif not isinstance(module, nn.modules.conv._ConvNd):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    raise ModelError(f"{path}.{name}.{key}: fused experts cannot be pruned yet")
    return found


class BlockCall(NamedTuple):
    """What a block was called with, besides the hidden state; a first argument is the hidden state's place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def raw(self, block: nn.Module, hidden_BTD: Tensor) -> Any:
        """Run a block on a hidden state and return what it returns, a tensor or a tuple."""
        if self.args:
            return block(hidden_BTD, *self.args[1:], **self.kwargs)
        return block(hidden_states=hidden_BTD, **self.kwargs)

    def run(self, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """Run a block on a hidden state and return its hidden state."""
        return _hidden(self.raw(block, hidden_BTD))

    def shared_with(self, other: BlockCall) -> BlockCall:
        """Return this call with every tensor that equals `other`'s replaced by that one, to save memory."""
        return BlockCall(_shared(self.args, other.args), _shared(self.kwargs, other.kwargs))


def _hidden(out: Any) -> Tensor:
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def _shared(mine: Any, theirs: Any) -> Any:
    if isinstance(mine, Tensor):
        same = isinstance(theirs, Tensor) and mine.dtype == theirs.dtype and mine.shape == theirs.shape
        return theirs if same and (mine is theirs or torch.equal(mine, theirs)) else mine
    if type(mine) is not type(theirs):
        return mine
    if type(mine) in (tuple, list) and len(mine) == len(theirs):
        return type(mine)(_shared(a, b) for a, b in zip(mine, theirs, strict=True))
    if type(mine) is dict:
        return {key: _shared(value, theirs.get(key)) for key, value in mine.items()}
    return mine


Handler = Callable[[int, BlockCall, Tensor], Any]


class _Stub(nn.Module):
    """Stands for a block: hands its call to a handler, and every other question to the block."""

    def __init__(self, inner: nn.Module, index: int, handler: Handler) -> None:
        super().__init__()
        self.__dict__["inner"] = inner  # not registered: its parameters are not the stub's
        self.index, self.handler = index, handler

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["inner"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, call = args[0], BlockCall((None, *args[1:]), kwargs)
        else:
            hidden = kwargs.pop("hidden_states")
            call = BlockCall((), kwargs)
        return self.handler(self.index, call, hidden)


class Skeleton:
    """A model without its decoder blocks: embeddings, final norm, head, and how it calls each block."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.path, self.blocks = find_blocks(model)
        self.real = list(self.blocks)
        self.returns_tuple = False

    @property
    def outside(self) -> list[nn.Module]:
        """The modules that belong to no block."""
        return [m for name, m in self.model.named_modules() if not f"{name}.".startswith(f"{self.path}.")]

    @contextmanager
    def in_place(self, index: int) -> Iterator[nn.Module]:
        """Put the real block into its place for a while."""
        stub, self.blocks[index] = self.blocks[index], self.real[index]
        try:
            yield self.real[index]
        finally:
            self.blocks[index] = stub

    @contextmanager
    def _stubbed(self, handler: Handler) -> Iterator[None]:
        """Put stubs into the places of all blocks for a while."""
        for index, block in enumerate(self.real):
            self.blocks[index] = _Stub(block, index, handler)
        try:
            with torch.no_grad():
                yield
        finally:
            for index, block in enumerate(self.real):
                self.blocks[index] = block

    def through(self, ids_BT: Tensor, handler: Handler) -> None:
        """Run the model up to its head, with `handler` in place of every block."""
        with self._stubbed(handler):
            self.model.base_model(input_ids=ids_BT, use_cache=False)

    def record(self, ids_BT: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Return the hidden state before the first block [B, T, D], and each block's call."""
        first: list[Tensor] = []
        calls: list[BlockCall] = []

        def handler(index: int, call: BlockCall, hidden: Tensor) -> Any:
            if index == 0:
                first.append(hidden)
            calls.append(call)
            return (hidden,) if self.returns_tuple else hidden

        self.through(ids_BT, handler)
        return first[0], calls

    def logits(self, ids_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Return the logits [B, T, V] that follow from the hidden state after the last block."""

        def handler(index: int, call: BlockCall, hidden: Tensor) -> Any:
            return (hidden_BTD,) if self.returns_tuple else hidden_BTD

        with self._stubbed(handler):
            logits: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits


Load = Callable[[int], Any]


def check_replay(skeleton: Skeleton, resident: Load, ids_BT: Tensor) -> None:
    """Compare the model's own forward with the replay of its blocks, block by block, on a short sequence.

    Also learns whether the blocks return a tuple. Each block is in memory only while it runs.

    Args:
        skeleton: the model's skeleton.
        resident: `resident(i)` is a context manager that yields block i with its weights.
        ids_BT: a short sequence of tokens.

    Raises:
        ModelError: a block's output differs, as it does when blocks share state.
    """

    def first_is_real(index: int, call: BlockCall, hidden: Tensor) -> Any:
        if index == 0:
            with resident(0) as block:
                skeleton.returns_tuple = isinstance(call.raw(block, hidden), tuple)
        return (hidden,) if skeleton.returns_tuple else hidden

    skeleton.through(ids_BT, first_is_real)
    own: list[Tensor] = []

    def keep(index: int, call: BlockCall, hidden: Tensor) -> Any:
        with resident(index) as block:
            out = call.raw(block, hidden)
            if not torch.isfinite(_hidden(out)).all():
                for matrix in matrices(block, f"{skeleton.path}.{index}").values():
                    if not torch.isfinite(matrix.read()).all():
                        raise NumericsError(f"{matrix.name}: the weights hold NaN or Inf; check the model")
                where = f"{skeleton.path}.{index}"
                raise ModelError(f"{where}: the block's output holds NaN or Inf; check the model's weights")
        own.append(_hidden(out))
        return out

    skeleton.through(ids_BT, keep)
    if own[0].shape[:-1] != ids_BT.shape:
        raise ModelError(f"{skeleton.path}.0: hidden states {list(own[0].shape)} are not [sequences, tokens, width]")
    # Another sequence runs in between, and every block meets arguments recorded anew, as in the loop and on resume.
    other, replayed = skeleton.record(ids_BT.flip(1))[0], skeleton.record(ids_BT)[0]
    for index, expected in enumerate(own):
        try:
            with resident(index) as block, torch.no_grad():
                replayed = skeleton.record(ids_BT)[1][index].run(block, replayed)
                other = skeleton.record(ids_BT.flip(1))[1][index].run(block, other)
            same = torch.allclose(expected, replayed, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        except (AttributeError, IndexError, KeyError, TypeError):
            same = False
        if not same:
            raise ModelError(
                f"{skeleton.path}.{index}: run by itself the block gives another output than inside the model, so "
                "blocks share state and cannot be pruned one at a time"
            )
