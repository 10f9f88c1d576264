"""What is asked of a model in one evaluation: perplexity, zero-shot tasks, a few texts; alone or against another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..models.disk_host import DiskHost
from ..models.source import load_tokenizer
from ..pipeline.calibration import Tokens, evaluation_windows
from ..progress import Progress
from .fidelity import Reading
from .generation import prepare_generations, sample_generations
from .perplexity import perplexity
from .tasks import TaskOptions, measure_tasks


@dataclass(frozen=True)
class Questions:
    """What is asked.

    Attributes:
        text: a SOURCE for perplexity; None leaves it out.
        seqlen: tokens of a window; None is min(2048, context).
        windows: how many; None is all.
        tasks: to be answered; None leaves them out.
        generations: how many texts the model goes on with.
    """

    text: str | None
    seqlen: int | None = None
    windows: int | None = None
    tasks: TaskOptions | None = None
    generations: int = 0

    def check(self) -> None:
        """Raise SecateurError for what can be refused before a model is opened."""
        if self.generations < 0:
            raise OptionError(f"generations {self.generations}: a number of texts is needed, or 0 for none")
        if self.tasks:
            self.tasks.check()


def read_windows(host: DiskHost, questions: Questions, tokenizer: Any = None) -> Tokens | None:
    """Return the text as a model reads it, or None; refuse what could not be asked after hours of other questions."""
    if questions.text is None:
        return None
    directory, trusted = host.checkpoint.directory, host.checkpoint.trust_remote_code
    words = tokenizer or load_tokenizer(directory, trusted)
    tokens = evaluation_windows(questions.text, words, host.model.config, questions.seqlen, questions.windows)
    if questions.generations:
        prepare_generations(directory, tokens, questions.generations, trust_remote_code=trusted)
    return tokens


def answer(
    host: DiskHost,
    questions: Questions,
    tokens: Tokens | None,
    folder: Path,
    progress: Progress,
    *,
    dense: Reading | None = None,
    keep: bool = False,
) -> tuple[dict[str, Any], Reading | None]:
    """Ask a model on disk.

    Args:
        host: the model.
        questions: what is asked.
        tokens: the windows of text (`read_windows`).
        folder: where hidden states may lie.
        progress: hears of the work.
        dense: of the model that this one was made from, read with `keep`; tells the distance from it.
        keep: whether another model is to be compared with this one.

    Returns:
        The answers (docs/json.md, ``eval``), and what was read for the perplexity, if that was asked.
    """
    found: dict[str, Any] = {}
    reading = None
    directory, trusted = host.checkpoint.directory, host.checkpoint.trust_remote_code
    if tokens:
        reading = Reading(host, tokens, folder)
        found |= perplexity(reading, progress, dense=dense, keep=keep)
        if questions.generations:
            found["generations"] = sample_generations(
                directory, tokens, questions.generations, host.device, progress, trust_remote_code=trusted
            )
    if questions.tasks:
        found["tasks"] = measure_tasks(directory, questions.tasks, host.device, progress, trust_remote_code=trusted)
    return found, reading
