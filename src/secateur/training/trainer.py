"""transformers' Trainer, with what recovery needs besides: a teacher, a stop at NaN, and checkpoints of what changes.

Distillation: the loss is KL(teacher || student) over the vocabulary, averaged over predicted tokens, without
cross-entropy beside it and at temperature 1, as Muralidharan et al. 2024 found best (https://arxiv.org/abs/2407.14679).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import OutputError
from ..models.source import first_line
from ..pipeline.records import IGNORED
from ..progress import Progress
from .callbacks import FollowCourse

WEIGHTS = "changing.safetensors"
STATE = "trainer_state.json"

Row = tuple[Tensor, Tensor]  # token ids, and what is learnt of them


class DivergedError(Exception):
    """The loss, or a weight, is NaN or Inf."""

    def __init__(self, step: int) -> None:
        """Diverged in a step, counted from 1."""
        super().__init__(f"the loss is NaN or Inf in step {step}")
        self.step = step


class SparseTrainer(Trainer):
    """A Trainer that keeps in its checkpoints only the parameters that change, under their names in memory.

    The Trainer's own way would write a mixture's experts under names that it cannot read back.
    """

    def __init__(self, *, changing: Iterable[str], teacher: PreTrainedModel | None, **options: Any) -> None:
        """Make a trainer.

        Args:
            changing: names of the parameters that change, trained or pruned.
            teacher: whose predictions are learnt; None learns the text.
            options: of `Trainer`.
        """
        super().__init__(**options)
        assert self.model is not None
        parameters = dict(self.model.named_parameters())
        self.changing: dict[str, nn.Parameter] = {name: parameters[name] for name in changing}
        self.teacher = teacher
        if teacher is not None:
            teacher.eval().requires_grad_(False).to(self.args.device)
            self.model_accepts_loss_kwargs = False  # the loss is a mean over each micro-batch

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss, or the divergence from the teacher."""
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        with torch.no_grad():
            known = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        loss = distance(known, outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; NaN stops the training.

        Raises:
            DivergedError: the loss is no number.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            raise DivergedError(self.state.global_step + 1)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the parameters that change."""
        if not all(torch.isfinite(parameter).all() for parameter in self.changing.values()):
            raise DivergedError(self.state.global_step)
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self.changing.items()}, folder / WEIGHTS)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, FollowCourse):  # before the state, which tells that a checkpoint is whole
                callback.save(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:  # how torch and safetensors tell of a full disk
            raise OutputError(
                f"{self.args.output_dir}: a checkpoint cannot be written ({first_line(error)[:120]}); make room and "
                "give the same command again"
            ) from None

    def take(self, folder: Path) -> None:
        """Read the parameters that change from a checkpoint."""
        for name, tensor in load_file(folder / WEIGHTS).items():
            self.changing[name].data.copy_(tensor)

    def take_up(self, folder: Path) -> None:
        """Read a checkpoint after which no step is left, and then the best one, if that is what is wanted."""
        self.state = TrainerState.load_from_json(str(folder / STATE))
        self.take(folder)
        if self.args.load_best_model_at_end and self.state.best_global_step:
            self._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.take(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.take(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}")


def distance(known_BTV: Tensor, own_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return KL(known || own) of logits, in nats, averaged over the positions whose next label counts."""
    counts_BT = labels_BT[:, 1:] != IGNORED
    known, own = (logits[:, :-1][counts_BT].float().log_softmax(-1) for logits in (known_BTV, own_BTV))
    return nn.functional.kl_div(own, known, reduction="batchmean", log_target=True)


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Make a batch of rows of token ids; shorter ones are filled up, and what fills them counts nowhere."""
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([ids for ids, _ in rows], batch_first=True),
        "labels": pad([labels for _, labels in rows], batch_first=True, padding_value=IGNORED),
        "attention_mask": pad([torch.ones_like(ids) for ids, _ in rows], batch_first=True),
    }


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a trainer; its state is written last, so one without it was torn."""
    found = sorted(folder.glob("checkpoint-*"), key=number, reverse=True)
    return next((path for path in found if trainer_state(path) is not None), None)


def number(checkpoint: Path) -> int:
    """The step of a trainer's checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def trainer_state(folder: Path) -> dict[str, Any] | None:
    """Return what a trainer's checkpoint says of its course; None if it is not whole."""
    try:
        return dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


class Reporter(TrainerCallback):
    """Tells how training goes, and notes each checkpoint."""

    def __init__(self, progress: Progress, note: Callable[[dict[str, Any]], None], *, evaluate: bool) -> None:
        """Report.

        Args:
            progress: hears of every step.
            note: is told of every checkpoint, and the seconds since the one before.
            evaluate: the last step is to be evaluated too.
        """
        self.progress, self.note, self.evaluate = progress, note, evaluate
        self.since = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin, or go on."""
        self.progress.start("training", state.max_steps, done=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count a step."""
        self.progress.advance()
        if state.global_step >= state.max_steps:
            control.should_save = True
            control.should_evaluate = self.evaluate

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say the loss."""
        last = state.log_history[-1]
        if "eval_loss" in last:
            self.progress.advance(0, f"held-out loss {last['eval_loss']:.3f}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that a killed run can go on from here."""
        now = time.perf_counter()
        self.note({"step": "saved", "at": state.global_step, "seconds": now - self.since})
        self.since = now

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Come to an end."""
        self.progress.finish()
