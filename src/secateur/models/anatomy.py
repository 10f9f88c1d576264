"""The anatomy of a decoder: its blocks and its skeleton.

No table of architectures: the blocks are the one outermost module list as long as the config says, and what a
block needs besides the hidden state is recorded by running the model once with stubs in place of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of a decoder's blocks.

    Raises:
        ModelError: no module list, or more than one, has the config's number of layers.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if count is None:
        raise ModelError(f"{type(model).__name__}: its config tells no number of blocks (num_hidden_layers)")
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
        return hidden_of(self.raw(block, hidden_BTD))

    def shared_with(self, other: BlockCall) -> BlockCall:
        """Return this call with every tensor that equals `other`'s replaced by that one, to save memory."""
        return BlockCall(_shared(self.args, other.args), _shared(self.kwargs, other.kwargs))


def hidden_of(out: Any) -> Tensor:
    """The hidden state in what a block returned: a tensor, or a tuple or list that begins with it."""
    hidden: Tensor = out[0] if isinstance(out, (tuple, list)) else out
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
        self.companions: dict[int, int] = {}  # block -> how many values it returns beside its hidden state
        self.dtypes: dict[int, torch.dtype] = {}  # block -> of the hidden state that it returns

    def refuse_shared_weights(self) -> None:
        """Raise ModelError if two blocks hold the same parameter, which could not be pruned for each by itself."""
        owner: dict[int, int] = {}
        for index, block in enumerate(self.real):
            for name, parameter in block.named_parameters():
                if owner.setdefault(id(parameter), index) != index:
                    raise ModelError(
                        f"{self.path}.{index}.{name}: blocks {owner[id(parameter)]} and {index} share this weight, so "
                        "they cannot be pruned one at a time"
                    )

    @property
    def outside(self) -> list[nn.Module]:
        """The modules that belong to no block."""
        return [m for name, m in self.model.named_modules() if not f"{name}.".startswith(f"{self.path}.")]

    def learn(self, index: int, out: Any) -> None:
        """Note in what company, and in which dtype, a block returns its hidden state."""
        self.dtypes[index] = hidden_of(out).dtype
        if isinstance(out, (tuple, list)):
            self.companions[index] = len(out) - 1

    def returned(self, index: int, hidden: Tensor) -> Any:
        """Return a hidden state as the block would, its companions empty."""
        return (hidden, *[None] * self.companions[index]) if index in self.companions else hidden

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
            return self.returned(index, hidden)

        self.through(ids_BT, handler)
        return first[0], calls

    def logits(self, ids_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Return the logits [B, T, V] that follow from the hidden state after the last block.

        Raises:
            ModelError: the model predicts no tokens.
        """

        def handler(index: int, call: BlockCall, hidden: Tensor) -> Any:
            return self.returned(index, hidden_BTD)

        with self._stubbed(handler):
            out = self.model(input_ids=ids_BT, use_cache=False)
        logits: Tensor | None = getattr(out, "logits", None)
        kind = type(self.model)
        another_head = kind.__module__.startswith("transformers.") and not self.model.can_generate()
        if logits is None or logits.shape[:2] != ids_BT.shape or another_head:
            raise ModelError(f"{kind.__name__}: predicts no next token; give a causal language model")
        return logits
