"""One model in training: what is trained of it, what happens to its masks, and what it has become."""

from __future__ import annotations

import logging
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..errors import ModelError, NumericsError
from ..pipeline.calibration import Tokens
from ..pipeline.machine import alone
from ..progress import Progress
from .callbacks import FollowCourse, KeepSparsity
from .gradual import Gradual
from .lora import masked_lora, merge_lora
from .masks import Masks
from .request import FinetuneRequest
from .rounds import Rounds
from .trainer import DivergedError, Reporter, Row, SparseTrainer, collate, latest_checkpoint, number, trainer_state

log = logging.getLogger("secateur")

MOST_HELD_OUT = 32  # rows
EVAL_TOKENS = 1024  # of held-out rows at once: their logits are the largest tensors of all
WARM = 0.05  # of all steps: the learning rate rises, and then falls to 0

LORA = re.compile(r"\.lora_[AB]\..*")  # in the name of an adapter's parameter

Note = Callable[[dict[str, Any]], None]


class Recovery:
    """A model in memory, prepared for training."""

    def __init__(self, model: PreTrainedModel, request: FinetuneRequest, tokens: Tokens) -> None:
        """Freeze what is not trained, and find the masks.

        Args:
            model: whole, in float32, in memory.
            request: the options; already checked.
            tokens: the rows to train on, and to hold out.

        Raises:
            SecateurError: there are no zeros to keep, or an option does not fit the model.
        """
        self.model, self.request = model, request
        self.rows, self.held_out = divide(tokens, request.rows)
        self.course = self._course(tokens)
        self.masks = self.course.masks if self.course else Masks.of(model)
        trained = {name for name, p in model.named_parameters() if request.trained == "full" or p.ndim <= 1}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        if request.trained == "lora":
            with own_randomness():
                torch.manual_seed(request.seed)
                masked_lora(model, rank=request.rank)
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.changed = {LORA.sub(".weight", name) for name in self._changing()}  # adapters merged
        if not self.trainable:
            raise ModelError(
                f"{type(model).__name__}: has no parameters for train {request.trained}; give --train full"
            )

    def _course(self, tokens: Tokens) -> Gradual | Rounds | None:
        request, pruning = self.request, self.request.pruning
        if not request.prunes:
            return None
        if request.rounds is None:
            return Gradual(
                self.model, steps=request.steps, final=pruning.sparsity, initial=request.initial,
                schedule=request.schedule, every=request.masked_every, method=pruning.method, pattern=pruning.pattern,
                allocation=pruning.allocation, include=pruning.include, exclude=pruning.exclude,
            )  # fmt: skip
        text = Tokens([ids for ids, _ in self.rows[: request.samples]], tokens.source, tokens.available)
        return Rounds(
            self.model, pruning, rounds=request.rounds, initial=request.initial, steps=request.steps,
            tokens=text if pruning.parsed_method.needs else None,
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        """Bytes of a checkpoint of the trainer: what changes, and two moments of what is trained."""
        changing = sum(p.numel() for p in self._changing().values())
        return 4 * (changing + 2 * self.trainable)

    def _changing(self) -> dict[str, torch.nn.Parameter]:
        pruned = self.masks.parameters.keys() if self.course else ()
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad or n in pruned}

    def run(self, folder: Path, teacher: PreTrainedModel | None, progress: Progress, note: Note) -> dict[str, Any]:
        """Train, from the last whole checkpoint in `folder` on.

        Args:
            folder: of the trainer's checkpoints.
            teacher: whose predictions are learnt; None learns the text.
            progress: hears of every step.
            note: is told of every checkpoint.

        Returns:
            How it went: losses by step, and where it ended.

        Raises:
            NumericsError: the loss became NaN before anything could be kept.
        """
        last, stopped = latest_checkpoint(folder), None
        callback: TrainerCallback = FollowCourse(self.course) if self.course else KeepSparsity(self.masks)
        with own_randomness(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about each other
            trainer = SparseTrainer(
                model=self.model,
                changing=self._changing(),
                teacher=teacher,
                args=self._arguments(folder, begins=last is None),
                train_dataset=self.rows,
                eval_dataset=self.held_out or None,
                data_collator=collate,
                callbacks=[callback, Reporter(progress, note, evaluate=bool(self.held_out))],
            )
            trainer.remove_callback(PrinterCallback)
            try:
                if last is not None and number(last) >= self.request.steps:  # killed after the last step
                    trainer.take_up(last)
                else:
                    trainer.train(resume_from_checkpoint=None if last is None else str(last))
            except DivergedError as error:
                stopped = error.step
                callback.on_train_end(trainer.args, trainer.state, trainer.control)
        return self._outcome(trainer, folder, stopped)

    def _arguments(self, folder: Path, *, begins: bool) -> TrainingArguments:
        request, every = self.request, self.request.evaluated_every
        cuda = torch.cuda.is_available() and request.device != "cpu"
        evaluated = "steps" if self.held_out else "no"
        arguments = TrainingArguments(
            output_dir=str(folder.resolve()), max_steps=request.steps, per_device_train_batch_size=request.batch_size,
            per_device_eval_batch_size=max(1, EVAL_TOKENS // len(self.rows[0][0])),
            gradient_accumulation_steps=request.accumulate, optim="adamw_torch_fused",
            learning_rate=request.rate, lr_scheduler_type="linear", warmup_steps=int(WARM * request.steps),
            seed=request.seed, data_seed=request.seed,
            eval_strategy=evaluated, eval_steps=every, eval_on_start=begins and bool(self.held_out),
            save_strategy="steps", save_steps=every, save_total_limit=2,
            load_best_model_at_end=bool(self.held_out) and self.course is None, metric_for_best_model="eval_loss",
            greater_is_better=False, logging_steps=max(1, request.steps // 100), logging_nan_inf_filter=False,
            report_to="none", disable_tqdm=True, remove_unused_columns=False, label_names=["labels"],
            use_cpu=not cuda, bf16=cuda, dataloader_pin_memory=cuda,
            gradient_checkpointing=request.gradient_checkpointing,
        )  # fmt: skip
        arguments._n_gpu = min(arguments.n_gpu, 1)  # of several, one: or a step would be of several times the rows
        return arguments

    def _outcome(self, trainer: SparseTrainer, folder: Path, stopped: int | None) -> dict[str, Any]:
        """Where the training ended; of one that diverged, at its best or last checkpoint."""
        history, best = trainer.state.log_history, trainer.state.best_global_step
        at = best if self.course is None and best else trainer.state.global_step
        if stopped is not None:
            kept = latest_checkpoint(folder)
            if kept is None or self.course is not None:
                raise NumericsError(
                    f"the loss is NaN or Inf in step {stopped}, and no model before it is worth keeping; give a lower "
                    f"--learning-rate than {self.request.rate:g}, and --no-resume"
                )
            state = trainer_state(kept) or {}
            kept = folder / f"checkpoint-{state['best_global_step']}" if state.get("best_global_step") else kept
            trainer.take(kept)
            at = number(kept)
            log.warning(
                "the loss is NaN or Inf in step %d: training ends there, and the model of step %d is kept; a lower "
                "--learning-rate than %g may go further", stopped, at, self.request.rate,
            )  # fmt: skip
        losses = {line["step"]: line["loss"] for line in history if isfinite(line.get("loss", nan))}
        held = {line["step"]: line["eval_loss"] for line in history if isfinite(line.get("eval_loss", nan))}
        if self.course is None and held and held[at] >= held[0]:
            log.warning(
                "training did not lower the loss on held-out rows (%.3f before, %.3f now); give a lower "
                "--learning-rate than %g, or more text", held[0], held[at], self.request.rate,
            )  # fmt: skip
        return {
            "loss": "cross-entropy" if trainer.teacher is None else "divergence",
            "steps": at,
            "stopped": stopped,
            "trainable": self.trainable,
            "losses": list(map(list, losses.items())),
            "held_out": list(map(list, held.items())),
            "held_out_rows": len(self.held_out),
        }

    def finished(self) -> PreTrainedModel:
        """Return the model, adapters merged, masked weights zero."""
        if self.request.trained == "lora":
            merge_lora(self.model)
        self.masks.apply()
        return self.model


@contextmanager
def own_randomness() -> Iterator[None]:
    """Leave the random numbers of others as they are: a Trainer seeds them all."""
    with alone(), torch.random.fork_rng():
        theirs, numpys = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(theirs)
            np.random.set_state(numpys)


def divide(tokens: Tokens, needed: int) -> tuple[list[Row], list[Row]]:
    """Hold out the last rows: those that training can spare, a tenth at least, 32 at most; of fewer than ten none."""
    rows = list(zip(tokens.rows, tokens.labels or tokens.rows, strict=True))
    count = len(rows)
    held = min(max(count - needed, count // 10), MOST_HELD_OUT) if count >= 10 else 0
    return rows[: count - held], rows[count - held :]
