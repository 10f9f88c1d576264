"""Which experts of a mixture it can do without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.experts import Watch, expert_keys, experts_watched
from ..models.hosts import DiskHost
from ..pipeline.stream import Stream
from ..progress import Progress


def expert_modules(block: nn.Module) -> list[Any]:
    """The modules of a block that hold fused experts."""
    return [module for module in block.modules() if expert_keys(module)]


def saliences(host: DiskHost, stream: Stream, progress: Progress) -> list[Tensor | None]:
    """Return, for each block with experts, how much each expert gives to the tokens that are routed to it.

    That is the mean over those tokens of its gate's weight times the norm of its output: REAP, Lasby et al. 2025,
    https://arxiv.org/abs/2510.13999. An expert that no token reached has 0.

    Args:
        host: the model.
        stream: calibration tokens, at the first block; moved to the end.
        progress: hears of micro-batches.
    """
    found: list[Tensor | None] = []
    progress.start("observing experts", len(host.skeleton.real) * len(stream.batches))
    for index in range(len(host.skeleton.real)):
        with host.block(index) as block:
            modules = expert_modules(block)
            if len(modules) > 1:
                raise ModelError(f"{host.skeleton.path}.{index}: has several lists of experts, and none can be cut")
            sums: list[list[float]] = [[0.0, 0] for _ in range(modules[0].num_experts if modules else 0)]

            def hear(expert: int, y_TD: Tensor, gate_T: Tensor, sums: list[list[float]] = sums) -> None:
                sums[expert][0] += float((torch.linalg.vector_norm(y_TD.float(), dim=-1) * gate_T.abs()).double().sum())
                sums[expert][1] += len(gate_T)

            with experts_watched({module: Watch({}, lambda inputs: None, (), hear) for module in modules}):
                stream.forward(index, block, progress)
            found.append(torch.tensor([total / max(count, 1) for total, count in sums]) if modules else None)
    progress.finish()
    return found


def strongest(salience_E: Tensor, left: int) -> list[int]:
    """The numbers of the `left` experts that give most; of equals, the later."""
    order: Any = torch.sort(salience_E, stable=True).indices
    kept: Sequence[int] = order[len(order) - left :].tolist()
    return sorted(kept)
