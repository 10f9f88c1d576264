"""Which experts of a mixture it can do without."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.checkpoint import Checkpoint
from ..models.disk_host import DiskHost
from ..models.experts import Watch, expert_keys, experts_watched
from ..pipeline.stream import Stream
from ..progress import Progress
from .config import Config
from .cut import Kept
from .cutting import Cut, blocks_of_each_kind, cut_all, try_out
from .proof import silenced_experts
from .roles import Geometry
from .views import smaller_model, with_config


def expert_modules(block: nn.Module) -> list[Any]:
    """The modules of a block that hold fused experts."""
    return [module for module in block.modules() if expert_keys(module)]


def saliences(host: DiskHost, stream: Stream, progress: Progress) -> list[list[float] | None]:
    """Return, for each block with experts, how much each expert gives to the tokens that are routed to it.

    That is the mean over those tokens of its gate's weight times the norm of its output: REAP, Lasby et al. 2025,
    https://arxiv.org/abs/2510.13999. An expert that no token reached has 0.

    Args:
        host: the model.
        stream: calibration tokens, at the first block; moved to the end.
        progress: hears of micro-batches.
    """
    found: list[list[float] | None] = []
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
            found.append([total / max(count, 1) for total, count in sums] if modules else None)
    progress.finish()
    return found


def strongest(salience: Sequence[float], left: int) -> list[int]:
    """The numbers of the `left` experts that give most; of equals, the later."""
    order = sorted(range(len(salience)), key=lambda expert: (salience[expert], expert))
    return sorted(order[len(order) - left :])


class Thinning:
    """A mixture, and the one with fewer experts that a new config makes of it.

    Attributes:
        values: new ones for the config.
        left: experts.
    """

    def __init__(self, host: DiskHost, fraction: float, folder: Path) -> None:
        """Make the smaller model, without weights.

        Args:
            host: the model.
            fraction: of the experts, that goes.
            folder: for its config.json.

        Raises:
            SecateurError: it has no experts, or too few would be left.
        """
        config = Config(host.checkpoint.directory, host.model.config)
        self.host, self.values = host, config.fewer_experts(fraction)
        (self.left,) = self.values.values()
        self.has = [bool(expert_modules(block)) for block in host.skeleton.real]
        if not any(self.has):
            raise ModelError(f"{config.kind}: transformers does not run its experts through its interface of experts")
        view = with_config(host.checkpoint, config.changed(**self.values), folder)
        self.small = smaller_model(view, host)

    def settle(self) -> None:
        """Cut one block of each kind by way of trial, and prove it."""
        kept = [list(range(self.left)) if has else None for has in self.has]
        for index in blocks_of_each_kind(self.host):
            try_out(self.host, self.small, Geometry(1, 1), self._without(kept), index)

    def cut(self, kept: Sequence[Sequence[int] | None], folder: Path, progress: Progress) -> Checkpoint:
        """Cut and prove every block.

        Args:
            kept: for each block the experts that stay; None for one without.
            folder: where cut tensors go.
            progress: hears of blocks.

        Returns:
            The smaller checkpoint.
        """
        cut = self._without(kept)
        return cut_all(self.host, self.small, Geometry(1, 1), cut, lambda index: {}, folder / "experts", progress)

    def _without(self, kept: Sequence[Sequence[int] | None]) -> Cut:
        def cut(index: int, block: nn.Module) -> tuple[Kept, AbstractContextManager[None]]:
            silent = silenced_experts(self.host, block, index, self.small, kept[index] or [])
            return Kept(experts=kept[index]), silent

        return cut
