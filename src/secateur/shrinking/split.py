"""How a number of parameters is best taken from heads and from neurons: tried out, and measured by predictions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import ModelError, OptionError
from ..models.disk_host import DiskHost
from ..models.matrices import Matrix
from ..pipeline.loop import Job, prune_matrix
from ..pipeline.observation import Observer, at_once
from ..pipeline.stream import Stream
from ..progress import Progress, Silent
from ..pruning import Method
from .config import Config
from .roles import HEADS, NEURONS, of_kind
from .trials import Trial, Trials
from .width import Narrowing, couplings_of

log = logging.getLogger("secateur")


@dataclass(frozen=True)
class Share:
    """What is taken from where; None: nothing.

    Attributes:
        heads: groups of heads that are left.
        neurons: fraction of the neurons that goes.
    """

    heads: int | None
    neurons: float | None

    def __str__(self) -> str:
        words = [f"{self.heads} group{'s' * (self.heads > 1)} of heads left"] if self.heads is not None else []
        words += [f"{self.neurons:.1%} of the neurons removed"] if self.neurons else []
        return " and ".join(words) or "nothing removed"


class Way(NamedTuple):
    """What the pruning loop would do for a share, and how many parameters of blocks go, widths being rounded."""

    job: Job
    removed: int


def block_parameters(host: DiskHost) -> int:
    """How many parameters a model's blocks hold."""
    return sum(parameter.numel() for block in host.skeleton.real for parameter in block.parameters())


def shares(host: DiskHost, target: float, of: Sequence[str]) -> list[Share]:
    """Return the ways to take a fraction of the blocks' parameters from heads and neurons.

    Raises:
        OptionError: there is none.
    """
    config = Config(host.checkpoint.directory, host.model.config)
    blocks = [couplings_of(host, index) for index in range(len(host.skeleton.real))]
    total = block_parameters(host)
    weights = {k: sum(c.weights for block in blocks for c in of_kind(block, k)) for k in (NEURONS, HEADS)}
    wanted = target * total
    groups = config.heads[1] if HEADS in of and weights[HEADS] else 1
    found: list[Share] = []
    for left in range(groups, 0, -1) if HEADS in of else [groups]:
        rest = wanted - weights[HEADS] * (groups - left) / groups
        fraction = rest / weights[NEURONS] if weights[NEURONS] else 1.0
        heads = left if left < groups else None
        if NEURONS in of and 0 < fraction < 1:
            found.append(Share(heads, fraction))
        if (
            HEADS in of and heads is not None and abs(rest) <= weights[HEADS] / groups / 2
        ):  # as near as heads alone come
            found.append(Share(heads, None))
    if not found:
        most = sum(weights[kind] for kind in of) / total
        raise OptionError(
            f"target {target:g}: cannot be taken from {' and '.join(of)}, which hold {most:.0%} of the blocks' weights"
        )
    return found


def values_of(config: Config, share: Share, widths: Sequence[int], multiple: int) -> dict[str, int]:
    """New values for a config from which a share is taken."""
    values = config.fewer_heads(share.heads) if share.heads is not None else {}
    return values | (config.narrower(share.neurons, widths, multiple) if share.neurons else {})


def best_share(
    host: DiskHost,
    candidates: Sequence[Share],
    multiple: int,
    method: Method,
    rows: Sequence[Tensor],
    folder: Path,
    progress: Progress,
) -> tuple[Share, dict[str, float]]:
    """Try all shares out on a few rows, and return the one that harms least for each parameter that goes.

    All of them with the statistics of the whole model.

    Args:
        host: the model.
        candidates: two or more.
        multiple: that new widths are of.
        method: chooses what goes.
        rows: of calibration tokens.
        folder: for what is needed meanwhile.
        progress: hears of blocks.

    Returns:
        The share, and KL(model || trial) in nats per token by share.
    """
    ways = possible(host, candidates, multiple, method, folder)
    jobs = {share: way.job for share, way in ways.items()}
    trials = Trials(host, rows)
    stream = Stream(host, [row for ids in trials.batches for row in ids], folder) if method.needs else None
    tried = _Tried(host, method, jobs, stream)
    distances = trials.distances([tried.trial(share) for share in jobs], progress, tried.visit)
    if stream:
        stream.close()
    found = dict(zip(jobs, distances, strict=True))
    for share, distance in found.items():
        log.info("%s: KL %.4f", share, distance)
    best = min(found, key=lambda share: found[share] / ways[share].removed)
    return best, {str(share): distance for share, distance in found.items()}


def possible(
    host: DiskHost, candidates: Sequence[Share], multiple: int, method: Method, folder: Path
) -> dict[Share, Way]:
    """Return what the pruning loop would do for each share that can be taken, proved; equal ones after rounding once.

    Raises:
        SecateurError: none can be; why not the last.
    """
    config = Config(host.checkpoint.directory, host.model.config)
    found: dict[Share, Way] = {}
    known: list[dict[str, int]] = []
    for share in candidates:
        try:
            values = values_of(config, share, widths_of(host), multiple)
            if values in known:
                continue
            narrowing = Narrowing(host, values, folder / "config")
            narrowing.settle(Silent())
        except (ModelError, OptionError) as error:
            log.info("%s: not possible (%s)", share, error)
            reason = error
            continue
        known.append(values)
        left = block_parameters(narrowing.small)
        found[share] = Way(narrowing.job(method, "dense"), block_parameters(host) - left)
        del narrowing  # and the embeddings that it holds
    if not found:
        raise reason
    return found


class _Tried:
    """Shares as trials: each prunes a resident block by the statistics of the whole model, for a while."""

    def __init__(self, host: DiskHost, method: Method, jobs: Mapping[Share, Job], stream: Stream | None) -> None:
        self.host, self.jobs, self.stream = host, jobs, stream
        self.observer = Observer({}, method.needs)

    def visit(self, index: int, block: nn.Module) -> None:
        """Observe a block's inputs."""
        chosen: dict[str, Matrix] = {}
        for job in self.jobs.values():
            chosen |= job.chosen(self.host, index)
        self.observer = Observer(chosen, self.observer.needs)
        if self.stream:
            for _ in at_once(self.stream, index, block, self.observer, Silent()):
                pass

    def trial(self, share: Share) -> Trial:
        """The model from which a share is taken."""
        job = self.jobs[share]

        @contextmanager
        def change(index: int, block: nn.Module) -> Iterator[bool]:
            chosen = job.chosen(self.host, index)
            touched = {id(p): p for m in chosen.values() for p in (m.weight, m.bias and m.bias[1]) if p is not None}
            former = [(parameter, parameter.detach().clone()) for parameter in touched.values()]
            try:
                for matrix in (m for m in chosen.values() if self.stream is None or self.observer.seen(m.name)):
                    prune_matrix(lambda matrix, W_OI: W_OI, matrix, job, self.observer)
                yield True
            finally:
                for parameter, weights in former:
                    parameter.data.copy_(weights)

        return Trial(0, change)


def widths_of(host: DiskHost) -> list[int]:
    """The widths of a model's MLPs."""
    found: set[int] = set()
    for index in range(len(host.skeleton.real)):
        found |= {c.columns for c in of_kind(couplings_of(host, index), NEURONS)}
    return sorted(found)
