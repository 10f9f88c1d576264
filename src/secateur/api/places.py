"""What functions of the interface share: models and outputs as users name them, commands as they type them."""

from __future__ import annotations

import logging
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..evaluation.fidelity import Reading
from ..evaluation.perplexity import perplexity
from ..evaluation.records import record_evaluation
from ..models.disk_host import DiskHost
from ..models.gguf import as_checkpoint
from ..models.in_memory import is_path, model_name
from ..models.source import load_tokenizer, locate, open_checkpoint
from ..pipeline.calibration import usual_windows
from ..pipeline.files import write_text
from ..pipeline.machine import choose_device
from ..pipeline.prune import Evaluate
from ..progress import Progress
from ..reporting.markdown.card import model_card, refresh_card

log = logging.getLogger("secateur")

README = "README.md"
DEFAULT_TEXT = "wikitext2"


def output_path(output: str | Path) -> Path:
    """Return where OUTPUT is, a home directory filled in."""
    if not is_path(output):
        raise OutputError(f"{type(output).__name__}: is no directory's name")
    try:
        return Path(output).expanduser()
    except RuntimeError:
        raise OutputError(f"{output}: nobody of that name has a home here") from None


@contextmanager
def opened(model: Any, device: str, trust_remote_code: bool) -> Iterator[DiskHost]:
    """Open MODEL for a while; a GGUF file is dequantised meanwhile."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = as_checkpoint(locate(model_name(model), trust_remote_code), Path(scratch))
        yield DiskHost(open_checkpoint(directory, trust_remote_code), choose_device(device))


def measured_on(
    text: str, tokenizer: Any, seqlen: int | None, device: str, progress: Progress, trust_remote_code: bool
) -> Evaluate:
    """Return what measures the perplexity of a checkpoint's directory on the usual windows of a text."""

    def measure(directory: Path) -> dict[str, Any]:
        host = DiskHost(open_checkpoint(directory, trust_remote_code), choose_device(device))
        words = tokenizer or load_tokenizer(directory, trust_remote_code)
        tokens = usual_windows(text, words, host.model.config, seqlen)
        with tempfile.TemporaryDirectory() as folder:
            return perplexity(Reading(host, tokens, Path(folder)), progress)

    return measure


def command_line(function: Callable[..., Any], words: Sequence[str], options: Mapping[str, Any]) -> str:
    """Return the command that asks for the same: its words, then every option that differs from its default.

    >>> from secateur import inspect
    >>> command_line(inspect, ["a model"], {"trust_remote_code": True})
    "secateur inspect 'a model' --trust-remote-code"
    """
    command = ["secateur", function.__name__, *words]
    for name, parameter in signature(function).parameters.items():
        value = options.get(name, parameter.default)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = tuple(value)
        value = str(value) if isinstance(value, Path) else value
        if parameter.default is parameter.empty or value == parameter.default or name == "progress":
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command.append(flag if value else f"--no-{name.replace('_', '-')}")
        else:
            command += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(command)


def note_evaluation(directory: Path, found: dict[str, Any]) -> None:
    """Note a result in a directory that Secateur wrote, and in its card; the result is more than either."""
    record_evaluation(directory, found)
    try:
        refresh_card(directory)
    except OutputError as error:
        log.warning("%s", error)


def write_card(target: Path, source: Path) -> None:
    """Write a model card into a finished directory; licence and language come from the card of its source."""
    card = source / README
    write_text(
        target / README,
        model_card(target, card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None),
    )
