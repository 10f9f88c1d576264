"""Masks in a Trainer of transformers: callbacks that hold zeros, or prune on the way."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import OptionError
from .gradual import SUMS, Gradual
from .masks import Masks


class Course(Protocol):
    """Masks that change in the course of training."""

    masks: Masks

    def before(self, step: int) -> bool:
        """Set the masks that hold from `step` on, if new ones are due; return whether they were."""


class KeepSparsity(TrainerCallback):
    """Keeps zeros: those that the model has when training begins, or the masks that are given.

    Weights are zero again after every step of the optimiser, whatever it is; with gradient accumulation, checkpointing
    and mixed precision, and when training goes on from one of the trainer's checkpoints.

    >>> import secateur
    >>> callback = secateur.KeepSparsity()  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, masks: Masks | Mapping[str, Tensor] | None = None) -> None:
        """Hold masks.

        Args:
            masks: by name of parameter, boolean, True = keep; None takes the model's zeros.
        """
        self.masks = masks
        self._open = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the masks."""
        self._open.close()
        model: PreTrainedModel = kwargs["model"]
        masks = self.masks
        if masks is None:
            masks = Masks.of(model)
        elif not isinstance(masks, Masks):
            masks = Masks(model, masks)
        self._hold(masks)

    def _hold(self, masks: Masks) -> None:
        self._held = masks
        self._open.enter_context(masks.held())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go."""
        self._open.close()


class FollowCourse(KeepSparsity):
    """Prunes a model in the course of training."""

    def __init__(self, course: Course | None = None) -> None:
        """Follow a course; None is for subclasses that make theirs when training begins."""
        super().__init__()
        self.course = course

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the course, or take it up at a trainer's checkpoint."""
        self._open.close()
        assert self.course is not None
        self.course.masks.take()  # a checkpoint of the trainer may have been loaded since
        self._hold(self.course.masks)
        if isinstance(self.course, Gradual):
            self._open.enter_context(self.course.watched())
            if state.global_step:
                self.course.load(checkpoint_path(args, state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set new masks if they are due."""
        assert self.course is not None
        self.course.before(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep what scores have seen, unless the trainer did."""
        if not (checkpoint_path(args, state) / SUMS).exists():
            self.save(checkpoint_path(args, state))

    def save(self, folder: Path) -> None:
        """Keep what scores have seen."""
        if isinstance(self.course, Gradual):
            self.course.save(folder)


class GradualPruning(FollowCourse):
    """Prunes a model gradually while a Trainer trains it; options as in `secateur.gradual`, over all of its steps.

    >>> import secateur
    >>> callback = secateur.GradualPruning(final=0.5, schedule="cubic", every=10)  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, final: float | None = None, **options: Any) -> None:
        """Take the options of `secateur.gradual`, but for the number of steps."""
        super().__init__()
        self.options = {"final": final, **options}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the course, or take it up at a trainer's checkpoint."""
        try:
            self.course = Gradual(kwargs["model"], steps=state.max_steps, **self.options)
        except TypeError as error:
            raise OptionError(f"GradualPruning: {error}") from None
        super().on_train_begin(args, state, control, **kwargs)


def checkpoint_path(args: TrainingArguments, state: TrainerState) -> Path:
    """Return where a trainer keeps its checkpoint of the step that it is at."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
