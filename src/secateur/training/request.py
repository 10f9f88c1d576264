"""What the user asked `finetune` for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError, nearest
from ..pipeline.plan import MOST_THREADS, Request
from ..pruning.allocation import Rules
from .gradual import check_course, scored
from .lora import need_peft
from .rounds import check_rounds
from .schedules import parse_schedule

# What is trained, and the learning rate that goes with it.
TRAIN = {"full": 1e-4, "lora": 1e-3, "bias": 2e-3}


@dataclass(frozen=True, kw_only=True)
class FinetuneRequest:
    """The options of one training, as `secateur.finetune` documents them."""

    data: Any
    train: str | None = None
    steps: int = 200
    batch_size: int = 2
    accumulate: int = 1
    seqlen: int | None = None
    learning_rate: float | None = None
    rank: int = 16
    teacher: str | None = None
    sparsity: float | None = None
    initial: float = 0.0
    schedule: str = "cubic"
    every: int | None = None
    rounds: int | None = None
    method: str | None = None
    pattern: str | None = None
    allocation: str | Rules = "uniform"
    include: str | Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    samples: int = 64
    eval_steps: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    evaluate: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise OptionError for what can be refused before a model is opened."""
        if self.trained not in TRAIN:
            raise OptionError(f"unknown train {self.trained!r}: {nearest(self.trained, TRAIN)}")
        if self.trained == "lora":
            need_peft()
        for name in ("batch_size", "accumulate", "rank", "samples", "eval_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} {value}: at least 1 is needed")
        if not 0 < self.rate < 1:
            raise OptionError(f"learning_rate {self.rate:g}: between 0 and 1, such as {TRAIN[self.trained]:g}")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise OptionError(f"threads {self.threads}: at least 1 is needed, and {MOST_THREADS} are the most")
        if self.teacher == "" or self.evaluate == "":
            raise OptionError(f"{'teacher' if self.teacher == '' else 'evaluate'} is empty; leave it out or name one")
        if not 0 <= self.seed < 2**32:
            raise OptionError(f"seed {self.seed}: at least 0 and below 2^32")
        if self.steps < 1:
            raise OptionError(f"steps {self.steps}: at least 1 is needed")
        parse_schedule(self.schedule)
        if self.prunes:
            self._check_pruning()
            return
        usual = FinetuneRequest(data=None)
        for name in ("initial", "schedule", "every", "method", "allocation", "include", "exclude", "samples"):
            if getattr(self, name) != getattr(usual, name):
                raise OptionError(f"{name}: is for pruning on the way; give sparsity, pattern or rounds as well")

    def _check_pruning(self) -> None:
        if self.trained == "lora":
            raise OptionError(
                "train lora: adapters cannot follow masks that change; give --train full (or bias), or prune first and "
                "train LoRA afterwards"
            )
        self.pruning.check()
        if self.rounds is None:
            scored(self.pruning.parsed_method, self.steps)
            check_course(self.pruning, self.steps, self.initial, self.masked_every)
            return
        check_rounds(self.rounds, self.steps)
        check_course(self.pruning, self.steps, self.initial)
        if self.schedule != "cubic" or self.every is not None:
            raise OptionError("rounds: have their own course; leave out schedule and every")

    @property
    def prunes(self) -> bool:
        """Whether the model is to be pruned on the way."""
        return self.sparsity is not None or self.pattern is not None or self.rounds is not None

    @property
    def trained(self) -> str:
        """What is trained."""
        return self.train or ("full" if self.prunes else "lora")

    @property
    def rate(self) -> float:
        """The learning rate."""
        return TRAIN[self.trained] if self.learning_rate is None else self.learning_rate

    @property
    def pruning(self) -> Request:
        """What is to be pruned on the way."""
        method = self.method or "wanda"
        return Request(
            method=method, sparsity=self.sparsity, pattern=self.pattern, allocation=self.allocation,
            include=self.include, exclude=self.exclude, device=self.device,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Rows that all steps take, if none is read twice."""
        return self.steps * self.batch_size * self.accumulate

    @property
    def masked_every(self) -> int:
        """Steps from one mask to the next."""
        return max(1, min(10, self.steps // 10)) if self.every is None else self.every

    @property
    def evaluated_every(self) -> int:
        """Steps from one evaluation on held-out rows, and one checkpoint, to the next."""
        return self.eval_steps or -(-self.steps // 5)
