"""The directory in which measurements are kept: one process at a time, and nobody else's files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import OutputError, unwritable
from ..pipeline.files import Journal

WORK, LOCK, MEASUREMENTS = "work", "lock", "measurements.jsonl"
KINDS: dict[str, type | tuple[type, ...]] = {"cell": dict, "what": str, "settings": dict, "result": (dict, list)}


@contextmanager
def kept_in(folder: Path) -> Iterator[tuple[Journal, Path]]:
    """A folder with a journal of measurements, and a place for models while they are measured.

    What stops before anything was measured leaves nothing behind, and what stops later all that it takes to go on.

    Raises:
        OutputError: another process is at work there, it holds something else, or it cannot be written.
    """
    try:
        new = _check_ours(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            journal, finished = _measurements(folder / MEASUREMENTS), False
            journal.path.touch()  # from here on the folder is known as ours
            try:
                yield journal, folder / WORK
                finished = True
            finally:
                if finished or not journal.lines:
                    shutil.rmtree(folder / WORK, ignore_errors=True)
                    (folder / LOCK).unlink(missing_ok=True)  # while it is held, or it might be another process's
                if not journal.lines:
                    journal.clear()
                    with suppress(OSError):
                        folder.rmdir() if new else None
    except Timeout:
        raise OutputError(f"{folder}: another process measures there; wait for it or choose another place") from None
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: {unwritable(error)}") from error


def _check_ours(folder: Path) -> bool:
    """Refuse a folder with somebody's files, among which ours would be taken for theirs; return whether it is new."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        raise OutputError(f"{folder}: is a file; give a directory")
    if not (folder / MEASUREMENTS).exists() and any(child.name != LOCK for child in folder.iterdir()):
        raise OutputError(f"{folder}: is not empty and holds no {MEASUREMENTS}; choose another directory")
    return False


def _measurements(path: Path) -> Journal:
    hint = "remove that line, and what it held is measured again"
    try:
        journal = Journal(path)
    except OutputError as error:
        raise OutputError(f"{error}; {hint}") from None
    for number, line in enumerate(journal.lines, 1):
        if not all(isinstance(line.get(key), kind) for key, kind in KINDS.items()):
            raise OutputError(f"{path}: line {number} is damaged; {hint}")
    return journal
