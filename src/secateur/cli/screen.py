"""What the command line shows: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Any

from ..reporting.page.wording import tidy


def any_locale() -> None:
    """Have a terminal that knows fewer signs than we use show question marks in their place."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")


def listen(level: int) -> None:
    """Show messages from `level` on, on stderr."""
    log = logging.getLogger("secateur")
    log.setLevel(level)
    log.handlers = [_Stderr()]
    log.propagate = False
    # What matters of these, we say ourselves.
    for theirs in ("datasets", "huggingface_hub", "matplotlib", "transformers"):
        logging.getLogger(theirs).setLevel(logging.ERROR)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # logs what it raises
    if level >= logging.ERROR:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")


def say(text: str) -> None:
    """Write one line to stderr that is no warning, unless -q silences it."""
    if logging.getLogger("secateur").isEnabledFor(logging.INFO):
        note(text)


def note(text: str) -> None:
    """Write one line to stderr."""
    print("\\n".join(tidy(text).splitlines()), file=sys.stderr, flush=True)  # a name may have a line's end in it


def progress() -> Any:
    """The progress that fits stderr, and -q."""
    from ..reporting.terminal.progress import terminal_progress

    return terminal_progress(quiet=not logging.getLogger("secateur").isEnabledFor(logging.INFO))


def show(document: dict[str, Any], table: Callable[[dict[str, Any]], Any], as_json: bool) -> None:
    """Print a result, as JSON or as a table."""
    if as_json:
        print(json.dumps(document, indent=1))
        return
    from rich.console import Console

    console = Console(emoji=False)
    if not console.is_terminal:
        console = Console(width=160, emoji=False)
    console.print(table(tidy(document)))  # of names and texts, only what can be seen
