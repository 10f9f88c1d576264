"""The command line: each command calls the function of the same name in secateur.api.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 a named error, 2 what the parser
refuses, 130 interrupted.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence

from typer.exceptions import Abort, TyperException

from ..coming_from import translate
from ..errors import SecateurError, nearest, unwritable
from . import making, measuring, screen, shrinking, training  # noqa: F401  (which register their commands)
from .app import app

COMMANDS = (
    "prune", "shrink", "finetune", "pack", "unpack", "eval", "inspect", "generate", "bench", "compare",
    "sensitivity", "report",
)  # fmt: skip
GLOBAL_FLAGS = ("-q", "--quiet", "-v", "--verbose", "--debug")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {word for word in words if word in GLOBAL_FLAGS}
    screen.any_locale()
    screen.listen(
        logging.ERROR if flags & {"-q", "--quiet"} else logging.DEBUG if flags & {"-v", "--verbose"} else logging.INFO
    )
    if foreign := translate(words):
        screen.note(foreign)
        return 2
    try:
        words = [word for word in words if word not in GLOBAL_FLAGS]
        code = app(words, prog_name="secateur", standalone_mode=False)
        if code == 130:  # the parser swallows a KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TyperException as error:
        if what := error.format_message().rstrip("."):
            if unknown := re.fullmatch(r"No such command '(.*)'", what):
                what += f"; {nearest(unknown[1], COMMANDS)}"
            context = getattr(error, "ctx", None)
            screen.note(f"error: {what} ({context.command_path if context else 'secateur'} -h says more)")
        return error.exit_code
    except SecateurError as error:
        if "--debug" in flags:
            raise
        screen.note(f"error: {error}")
        return 1
    except (KeyboardInterrupt, Abort):
        kept = bool({"prune", "shrink", "finetune", "pack", "compare"} & set(words)) and "--no-resume" not in words
        screen.note("interrupted; the same command goes on where it stopped" if kept else "interrupted")
        return 130
    except Exception as error:
        if "--debug" in flags:
            raise
        if isinstance(error, OSError) and error.strerror:
            screen.note(f"error: {error.filename or 'stdout or a temporary file'}: {unwritable(error)}")
            return 1
        first_line = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in first_line:
            screen.note(f"error: out of memory ({first_line[:160]}); make room and give the same command again")
            return 1
        screen.note(f"error: {type(error).__name__}: {first_line} (--debug shows where)")
        return 1
