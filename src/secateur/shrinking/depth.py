"""Which blocks a model can do without."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..errors import OptionError
from ..models.disk_host import DiskHost
from ..progress import Progress
from .config import Config
from .trials import Trial, Trials

log = logging.getLogger("secateur")

BY = ("kl", "influence", "random")

Note = Callable[[dict[str, Any]], None]


def units(config: Config) -> list[tuple[int, ...]]:
    """What can be removed at a time: any block; or, where kinds of blocks repeat, any run of blocks as long as that."""
    period = config.period
    return [tuple(range(first, first + period)) for first in range(config.layers - period + 1)]


def check_layers(layers: int | Sequence[int], config: Config) -> None:
    """Raise OptionError if so many layers, or these layers, cannot be removed."""
    count, period = config.layers, config.period
    if isinstance(layers, int):
        if not 0 < layers < count:
            raise OptionError(f"layers {layers}: the model has {count}, so 1 to {count - 1} can be removed")
        if layers % period:
            nearest = max(period, round(layers / period) * period)
            raise OptionError(
                f"layers {layers}: kinds of blocks repeat after {period}, which engines take for granted, so only "
                f"multiples of {period} can go; nearest: {nearest if nearest < count else nearest - period}"
            )
        return
    outside = [index for index in layers if not 0 <= index < count]
    if outside:
        raise OptionError(f"layers {outside[0]}: the model has blocks 0 to {count - 1}")
    if len(set(layers)) == count:
        raise OptionError(f"layers: all {count} would go; leave one at least")
    kept = [index for index in range(count) if index not in layers]
    moved = next((index for place, index in enumerate(kept) if index % period != place % period), None)
    if moved is not None:
        raise OptionError(
            f"layers {','.join(map(str, sorted(layers)))}: block {moved} would come to a place of another kind, since "
            f"kinds repeat after {period}; runs of {period} neighbouring blocks may go, and the last {period - 1}"
        )


def share(target: float, config: Config) -> int:
    """Return how many blocks a fraction of them is, as the nearest multiple of their period.

    Raises:
        OptionError: none, or all of them.
    """
    period, most = config.period, (config.layers - 1) // config.period * config.period
    count = round(config.layers * target / period) * period
    if 0 < count < config.layers:
        return count
    nearest = period if count == 0 else most
    raise OptionError(
        f"target {target:g}: is {count} of {config.layers} blocks, which go in multiples of {period}; "
        f"the nearest legal fraction is {nearest / config.layers:.4g}"
    )


def influences(host: DiskHost, rows: Sequence[Tensor], progress: Progress) -> list[float]:
    """Return how much each block changes the hidden state: 1 less the mean cosine between its input and output.

    Men et al. 2024 (ShortGPT, eq. 1), https://arxiv.org/abs/2403.03853; on `trials.TRIAL_TOKENS` tokens.
    """
    trials, found = Trials(host, rows), list[float]()
    state = trials.first
    progress.start("influence of blocks", len(host.skeleton.real))
    for index in range(len(host.skeleton.real)):
        with host.block(index) as block:
            after = trials.run(index, block, state)
        cosines = torch.cat(
            [cosine_similarity(a.float(), b.float(), dim=-1).flatten() for a, b in zip(state, after, strict=True)]
        )
        found.append(1 - float(cosines.double().mean()))
        state = after
        progress.advance()
    progress.finish()
    return found


def least_influential(influence: Sequence[float], units: Sequence[tuple[int, ...]], count: int) -> list[int]:
    """Return `count` blocks, unit by unit those whose influences add up to least."""
    removed: list[int] = []
    while len(removed) < count:
        free = [unit for unit in units if not set(unit) & set(removed)]
        removed += min(free, key=lambda unit: sum(influence[index] for index in unit))
    return sorted(removed)


def greedy(
    host: DiskHost,
    rows: Sequence[Tensor],
    units: Sequence[tuple[int, ...]],
    count: int,
    progress: Progress,
    removed: Sequence[int] = (),
    note: Note = lambda event: None,
) -> list[int]:
    """Remove blocks one after the other, each time the one without which predictions change least.

    As SLEB (Song et al. 2024, https://arxiv.org/abs/2402.09025) and BlockPruner (Zhong et al. 2024,
    https://arxiv.org/abs/2406.10594) do, who measure perplexity where this measures KL(model || without): that needs no
    true next tokens, and varies less between texts.

    Args:
        host: the model.
        rows: of tokens.
        units: what is removed at a time.
        count: how many blocks are to go.
        progress: hears of the work.
        removed: by an earlier process.
        note: told of every step.
    """
    trials, gone = Trials(host, rows), list(removed)
    while len(gone) < count:
        free = [unit for unit in units if not set(unit) & set(gone)]
        tried = [Trial(0, _without(gone)), *(Trial(unit[0], _without([*gone, *unit])) for unit in free)]
        distances = trials.distances(tried, progress)[1:]
        best = min(range(len(free)), key=distances.__getitem__)
        gone += free[best]
        log.info("without block %s: KL %.4f", ", ".join(map(str, sorted(gone))), distances[best])
        note(
            {
                "removed": list(gone),
                "kl": distances[best],
                "tried": dict(zip(map(_named, free), distances, strict=True)),
            }
        )
    return sorted(gone)


def _named(unit: Sequence[int]) -> str:
    """``3``, or ``3-5`` for a run of blocks."""
    return str(unit[0]) if len(unit) == 1 else f"{unit[0]}-{unit[-1]}"


def _without(removed: Collection[int]) -> Callable[[int, nn.Module], Any]:
    @contextmanager
    def change(index: int, block: nn.Module) -> Iterator[bool]:
        yield index not in removed

    return change
