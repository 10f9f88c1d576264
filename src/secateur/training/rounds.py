"""Iterative pruning: prune to the next level, train under the mask, and again.

Han et al. 2015, https://arxiv.org/abs/1506.02626. Any method serves, since each round is the same loop over blocks as
pruning in one shot (`pipeline/loop.py`), on the weights that training has reached.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from ..errors import OptionError
from ..models.in_memory import eager, model_in_memory, refuse_adapters
from ..models.live_host import LiveHost
from ..pipeline.calibration import Tokens
from ..pipeline.live import LiveRun
from ..pipeline.loop import Job, prune_blocks
from ..pipeline.plan import Request, make_plan
from ..pipeline.stream import Stream
from ..progress import Silent
from ..pruning import Target
from .gradual import check_course
from .masks import Masks
from .schedules import on_the_way, round_sparsity

log = logging.getLogger("secateur")


class Rounds:
    """The rounds of one model in training."""

    def __init__(
        self,
        model: PreTrainedModel,
        request: Request,
        *,
        rounds: int,
        initial: float,
        steps: int,
        tokens: Tokens | None,
    ) -> None:
        """Resolve a request for one model.

        Args:
            model: in memory.
            request: method, final sparsity, pattern, allocation, include, exclude.
            rounds: how many.
            initial: sparsity before the first.
            steps: of training, in all rounds.
            tokens: to calibrate on; None for a method that needs none.

        Raises:
            SecateurError: an option cannot be carried out.
        """
        check_rounds(rounds, steps)
        check_course(request, steps, initial)
        refuse_adapters(model)
        self.model, self.request, self.tokens = model_in_memory(model), request, tokens
        self.rounds, self.initial, self.steps = rounds, initial, steps
        self.masks = Masks.of_matrices(model)
        with eager(self.model):
            plan = make_plan(request, LiveHost(self.model), {"name": self.model.name_or_path, "digest": None}, tokens)
        self.targets = plan.job.targets

    def targets_of(self, number: int) -> dict[str, Target]:
        """Return the targets of a round, counted from 1."""
        targets = {}
        for name, final in self.targets.items():
            begin = min(self.initial, final.sparsity)
            rise = final.sparsity - begin
            reached = round_sparsity(final.sparsity, begin, number / self.rounds)
            targets[name] = on_the_way(final, begin, (reached - begin) / rise if rise and number < self.rounds else 1.0)
        return targets

    def before(self, step: int) -> bool:
        """Prune to the next level if a round begins at `step` (counted from 0); return whether one did."""
        starts = [self.steps * number // self.rounds for number in range(self.rounds)]
        if step not in starts:
            return False
        number = starts.index(step) + 1
        with eager(self.model), tempfile.TemporaryDirectory() as folder, (host := LiveHost(self.model)).borrowed():
            stream = Stream(host, self.tokens.rows, Path(folder)) if self.tokens else None
            job = Job(self.request.parsed_method, self.targets_of(number), self.request.propagate)
            prune_blocks(host, job, stream, LiveRun(host), Silent())
        self.masks.take()
        log.info("round %d of %d: %.2f%% of the weights are zero", number, self.rounds, 100 * self.masks.sparsity)
        return True


def check_rounds(rounds: int, steps: int) -> None:
    """Raise OptionError for rounds that cannot be."""
    if rounds < 1:
        raise OptionError(f"rounds {rounds}: at least 1 is needed")
    if rounds > steps:
        raise OptionError(f"rounds {rounds}: {steps} steps are fewer than one for each; give more --steps")
