"""The self-check before hours of work: blocks run one at a time give what the model itself gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, NumericsError, SecateurError
from .anatomy import BlockCall, Skeleton, hidden_of
from .matrices import matrices, watching
from .source import first_line

ROUNDING = 2  # steps of a 16-bit dtype, on average over a block's output

Load = Callable[[int], AbstractContextManager[nn.Module]]


def check_replay(skeleton: Skeleton, resident: Load, ids_BT: Tensor) -> frozenset[str]:
    """Compare the model's own forward with the replay of its blocks, block by block, on a short sequence.

    Also learns what the blocks return beside their hidden states. Each block is in memory only while it runs.

    Args:
        skeleton: the model's skeleton.
        resident: `resident(i)` is a context manager that yields block i with its weights.
        ids_BT: a short sequence of tokens.

    Returns:
        The names of the matrices whose inputs can be observed.

    Raises:
        ModelError: a block's output differs, as it does when blocks share state.
        NumericsError: a weight is NaN or Inf.
    """
    own = _own_outputs(skeleton, resident, ids_BT)
    if own[0].shape[:2] != ids_BT.shape:
        raise ModelError(
            f"{skeleton.path}.0: hidden states {list(own[0].shape)} are not [sequences, tokens, …]; "
            "such blocks cannot be pruned one at a time"
        )
    observed: set[str] = set()

    def see(inputs: Mapping[str, Tensor]) -> None:
        observed.update(inputs)

    # Another sequence runs in between, and every block meets arguments recorded anew, as in the loop and on resume.
    # It starts from the model's own hidden state, so that rounding does not grow from block to block.
    other, hidden = skeleton.record(ids_BT.flip(1))[0], skeleton.record(ids_BT)[0]
    for index, expected in enumerate(own):
        path, why = f"{skeleton.path}.{index}", "another output than inside the model"
        try:
            with resident(index) as block, torch.no_grad(), watching(matrices(block, path), see):
                replayed = skeleton.record(ids_BT)[1][index].run(block, hidden)
                other = skeleton.record(ids_BT.flip(1))[1][index].run(block, other)
            same = same_output(expected, replayed)
        except SecateurError:
            raise
        except Exception as error:  # whatever the block's own code raises without its neighbours
            same, why = False, f"an error ({first_line(error)})"
        if not same:
            raise ModelError(
                f"{path}: run by itself the block gives {why}, so blocks share state and cannot be pruned one at a time"
            )
        hidden = expected
    return frozenset(observed)


def same_output(expected: Tensor, found: Tensor) -> bool:
    """Whether two outputs of a block are equal but for rounding: the model runs experts by another kernel.

    In 16 bits, as on a GPU, rounding takes single values far, so there the mean counts.
    """
    if torch.finfo(expected.dtype).bits >= 32:
        return torch.allclose(expected, found, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    far, size = (expected.float() - found.float()).abs().mean(), expected.float().abs().mean()
    return bool(far <= ROUNDING * torch.finfo(expected.dtype).eps * size)


def _own_outputs(skeleton: Skeleton, resident: Load, ids_BT: Tensor) -> list[Tensor]:
    """The output of every block in the model's own forward."""
    own: list[Tensor] = []

    def keep(index: int, call: BlockCall, hidden: Tensor) -> Any:
        with resident(index) as block:
            out = call.raw(block, hidden)
            if not torch.isfinite(hidden_of(out)).all():
                where = f"{skeleton.path}.{index}"
                for matrix in matrices(block, where).values():
                    if not torch.isfinite(matrix.read()).all():
                        raise NumericsError(f"{matrix.name}: the weights hold NaN or Inf; check the model")
                raise ModelError(f"{where}: the block's output holds NaN or Inf; check the model's weights")
        skeleton.learn(index, out)
        own.append(hidden_of(out))
        return out

    skeleton.through(ids_BT, keep)
    return own
