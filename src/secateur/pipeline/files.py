"""Small files written whole or not at all, journals that only grow, and room on the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError, unwritable


def into_place(part: Path, path: Path) -> None:
    """Rename, and see the name itself on the disk where the system lets directories be flushed."""
    os.replace(part, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # file systems that cannot do it
                raise
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all.

    Raises:
        OutputError: the disk refuses.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        into_place(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise OutputError(f"{path}: {unwritable(error)}") from error


class Journal:
    """A file of JSON lines that only grows; a line is on the disk before `note` returns."""

    def __init__(self, path: Path) -> None:
        """Read the lines that are there; one that was torn by a kill is dropped.

        Raises:
            OutputError: a whole line is damaged.
        """
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if not path.exists():
            return
        whole = b""
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            whole += line
            try:
                self.lines.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise OutputError(f"{path}: line {len(self.lines) + 1} is damaged") from None
        with path.open("r+b") as file:
            file.truncate(len(whole))

    def note(self, event: Mapping[str, Any]) -> None:
        """Append a line, and see it on the disk.

        Raises:
            OutputError: the disk refuses.
        """
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(event).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):  # no half line, to which the next one would be joined
                os.truncate(self.path, whole)
            raise OutputError(f"{self.path.parent}: the journal {unwritable(error)}") from error
        self.lines.append(dict(event))

    def clear(self) -> None:
        """Begin anew."""
        self.path.unlink(missing_ok=True)
        self.lines.clear()


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise OutputError if the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder}: {what} takes {needed / 2**30:.1f} GiB of disk and {free / 2**30:.1f} GiB are free; make room "
            "or choose an OUTPUT on another disk"
        )
